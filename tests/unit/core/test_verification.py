"""The queue of groups to verify: fair, patient with workers that die, and never stuck."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hacrl_exchange.broker.core.verification import (
    Failed,
    GroupRef,
    Statistics,
    VerificationQueue,
    WorkerInfo,
    pending_groups,
)
from hacrl_exchange.errors import LeaseExpiredError, WorkerNotFoundError

if TYPE_CHECKING:
    from tests.unit.core.conftest import World


def ref(prompt: int, *, step: int = 1, pool: str = "sums", verifier: str = "math") -> GroupRef:
    return GroupRef(pool, step, prompt, 0, 1, verifier, 2)


def queue_with(*refs: GroupRef, workers: int = 1) -> VerificationQueue:
    queue = VerificationQueue(lease_seconds=10.0)
    for index in range(1, workers + 1):
        queue.register(f"w{index}", identity=f"host-{index}", verifiers=("math",), principal="local", now=0.0)
    for item in refs:
        queue.add(item)
    return queue


def taken(
    queue: VerificationQueue, lease_id: str, *, count: int = 64, now: float = 0.0
) -> tuple[GroupRef, ...]:
    lease = queue.acquire("w1", lease_id=lease_id, max_groups=count, now=now)
    return lease.items if lease else ()


def test_groups_are_leased_by_step_then_arrival() -> None:
    queue = queue_with(ref(0, step=2), ref(1, step=2), ref(5), ref(4))
    assert taken(queue, "l1", count=3) == (ref(5), ref(4), ref(0, step=2))
    assert taken(queue, "l2") == (ref(1, step=2),)
    assert taken(queue, "l3") == ()
    assert repr(queue) == "<VerificationQueue [0 waiting, 4 leased, 1 workers]>"
    assert queue.statistics() == Statistics(0, 4, 2, 1)


def test_pools_are_served_by_who_waits_longest() -> None:
    queue = queue_with(ref(0, pool="new", step=900), ref(0, pool="old", step=1), ref(1, pool="new", step=900))
    assert [item.pool for item in taken(queue, "l1")] == ["new", "old", "new"]


def test_a_worker_gets_only_what_it_offers_and_may_judge() -> None:
    queue = queue_with(ref(0, verifier="boxed"), ref(1, pool="own"), ref(2))
    lease = queue.acquire("w1", lease_id="l1", max_groups=9, now=0.0, excluded_pools=frozenset({"own"}))
    assert lease is not None
    assert (lease.worker_id, lease.expires_at, lease.items) == ("w1", 10.0, (ref(2),))
    assert queue.acquire("w1", lease_id="l2", max_groups=9, now=0.0, excluded_pools={"own"}) is None


def test_a_group_is_queued_once_and_finished_wherever_it_is() -> None:
    queue = queue_with(ref(0), ref(0), ref(1))
    assert taken(queue, "l1", count=1) == (ref(0),)
    queue.add(ref(0))
    assert queue.finish(ref(0))
    assert queue.finish(ref(1))
    assert not queue.finish(ref(1))
    assert queue.statistics() == Statistics(0, 0, 0, 1)
    queue.add(ref(1))
    assert taken(queue, "l2") == (ref(1),)


def test_a_lease_that_is_done_or_foreign_cannot_be_renewed() -> None:
    queue = queue_with(ref(0), workers=2)
    taken(queue, "l1")
    assert queue.renew("w1", "l1", now=5.0) == 15.0
    message = "^The lease l1 ran out or is done: stop working on it and acquire another\\.$"
    with pytest.raises(LeaseExpiredError, match=message):
        queue.renew("w2", "l1", now=5.0)
    queue.finish(ref(0))
    with pytest.raises(LeaseExpiredError, match=message):
        queue.renew("w1", "l1", now=5.0)


def test_a_renewed_lease_runs_out_at_its_new_time() -> None:
    queue = queue_with(ref(0))
    taken(queue, "l1")
    queue.renew("w1", "l1", now=6.0)
    assert queue.next_expiry() == 16.0
    assert queue.expire(now=15.9) == Failed()
    assert queue.expire(now=16.0) == Failed((ref(0),), (), ())


def test_a_failed_lease_of_several_is_retried_singly_and_free_of_charge() -> None:
    queue = queue_with(ref(0), ref(1), ref(2))
    taken(queue, "l1", count=2)
    assert queue.expire(now=10.0) == Failed((ref(0), ref(1)), (), ())
    assert taken(queue, "l2", now=10.0) == (ref(0),)
    assert taken(queue, "l3", now=10.0) == (ref(1),)
    assert taken(queue, "l4", now=10.0) == (ref(2),)
    queue.finish(ref(2))
    assert queue.expire(now=20.0) == Failed((ref(0), ref(1)), (), ())
    assert taken(queue, "l5", now=20.0) == (ref(0),)
    assert queue.expire(now=30.0) == Failed((), (ref(0),), ())


def test_a_single_retry_is_not_mixed_into_a_larger_lease() -> None:
    queue = queue_with(ref(0, step=2), ref(1, step=2))
    taken(queue, "l1")
    queue.expire(now=10.0)
    queue.add(ref(0, step=1))
    assert taken(queue, "l2", now=10.0) == (ref(0, step=1),)
    assert taken(queue, "l3", now=10.0) == (ref(0, step=2),)
    assert taken(queue, "l4", now=10.0) == (ref(1, step=2),)


def test_failing_alone_is_charged_until_the_attempts_are_exhausted() -> None:
    queue = queue_with(ref(0))
    taken(queue, "l1")
    assert queue.expire(now=10.0) == Failed((ref(0),), (), ())
    taken(queue, "l2", now=10.0)
    assert queue.expire(now=20.0) == Failed((), (ref(0),), ())
    assert queue.statistics() == Statistics(0, 0, 0, 1)


def test_a_group_put_back_was_not_tried() -> None:
    queue = queue_with(ref(0), ref(1))
    taken(queue, "l1")
    queue.put_back(ref(1))
    queue.put_back(ref(9))
    assert queue.expire(now=10.0) == Failed((ref(0),), (), ())
    assert taken(queue, "l2", now=10.0) == (ref(0),)
    assert queue.expire(now=20.0) == Failed((), (ref(0),), ())
    assert taken(queue, "l3", now=20.0) == (ref(1),)


def test_a_worker_that_died_gives_back_its_groups_at_once() -> None:
    queue = queue_with(ref(0), ref(1), ref(2), workers=2)
    taken(queue, "l1", count=2)
    assert queue.release_worker("w1") == Failed((ref(0), ref(1)), (), ("w1",))
    assert queue.release_worker("w1") == Failed()
    with pytest.raises(
        WorkerNotFoundError, match=re.escape("The broker does not know worker w1: register again.")
    ):
        queue.touch("w1", now=0.0)
    assert queue.statistics() == Statistics(3, 0, 0, 1)


def test_a_silent_worker_is_dropped_unless_it_waits_in_a_long_poll() -> None:
    queue = queue_with(workers=3)
    queue.begin_wait("w2", now=0.0)
    queue.touch("w3", now=5.0)
    assert queue.next_expiry() == 30.0
    assert queue.verifier_alive("math", now=29.9)
    assert queue.expire(now=30.0).dropped_workers == ("w1",)
    assert queue.expire(now=35.0).dropped_workers == ("w3",)
    queue.end_wait("w2", now=40.0)
    queue.end_wait("w1", now=40.0)
    assert queue.expire(now=69.9).dropped_workers == ()
    assert queue.expire(now=70.0).dropped_workers == ("w2",)
    assert not queue.verifier_alive("math", now=70.0)
    assert queue.next_expiry() is None


def test_a_verifier_is_alive_only_if_somebody_offers_it() -> None:
    queue = queue_with()
    assert queue.verifier_alive("math", now=0.0)
    assert not queue.verifier_alive("boxed", now=0.0)


def test_a_closed_step_and_a_pool_folded_again_leave_nothing_behind() -> None:
    queue = queue_with(ref(0), ref(1), ref(2, step=2), ref(3, pool="other"))
    taken(queue, "l1", count=1)
    queue.remove_step("sums", 1)
    assert queue.statistics() == Statistics(2, 0, 0, 1)
    queue.remove_pool("sums")
    assert taken(queue, "l2") == (ref(3, pool="other"),)
    queue.remove_pool("other")
    assert queue.statistics() == Statistics(0, 0, 0, 1)


def test_workers_are_listed_with_what_they_hold() -> None:
    queue = queue_with(ref(0), ref(1), workers=2)
    taken(queue, "l1")
    assert queue.workers() == (
        WorkerInfo("w1", "host-1", "local", ("math",), 2),
        WorkerInfo("w2", "host-2", "local", ("math",), 0),
    )


def test_pending_groups_are_those_without_verdicts_in_manifest_order(
    make_world: Callable[..., World],
) -> None:
    world = make_world()
    world.join("a")
    world.join("b")
    world.publish("b")
    world.publish("a", 0)
    world.judge(0, 1, 1.0, 1.0)
    found = pending_groups(world.state)
    assert found == (
        GroupRef("sums", 1, 0, 0, 1, "exact_match", 3),
        GroupRef("sums", 1, 1, 1, 1, "exact_match", 3),
    )


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["add", "acquire", "finish", "back", "expire", "release", "step"]), st.integers(0, 11)
    ),
    max_size=60,
)


@given(OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_no_group_is_lost_or_leased_twice_whatever_workers_do(operations: list[tuple[str, int]]) -> None:
    queue = queue_with(workers=0)
    known: set[GroupRef] = set()
    held: dict[str, set[GroupRef]] = {}
    now = 0.0
    for number, (kind, value) in enumerate(operations):
        item = ref(value, step=value % 3)
        worker = f"w{value % 3}"
        match kind:
            case "add":
                queue.add(item)
                known.add(item)
            case "acquire":
                queue.register(worker, identity="", verifiers=("math",), principal="", now=now)
                lease = queue.acquire(worker, lease_id=f"l{number}", max_groups=1 + value % 4, now=now)
                if lease is not None:
                    assert not set(lease.items) & set().union(*held.values())
                    held[lease.lease_id] = set(lease.items)
            case "finish":
                assert queue.finish(item) is (item in known)
                known.discard(item)
                held = {lease_id: items - {item} for lease_id, items in held.items()}
            case "back":
                queue.put_back(item)
                held = {lease_id: items - {item} for lease_id, items in held.items()}
            case "step":
                queue.remove_step("sums", value % 3)
                gone = {item for item in known if item.step == value % 3}
                known -= gone
                held = {lease_id: items - gone for lease_id, items in held.items()}
            case _:
                now += value
                failed = queue.release_worker(worker) if kind == "release" else queue.expire(now=now)
                known -= set(failed.exhausted)
                gone = {*failed.returned, *failed.exhausted}
                held = {lease_id: items - gone for lease_id, items in held.items()}
        leased = set().union(*held.values())
        statistics = queue.statistics()
        assert (statistics.leased_count, statistics.waiting_count) == (len(leased), len(known - leased))
    for _ in range(3 * len(known) + 10):
        queue.register("last", identity="", verifiers=("math",), principal="", now=now)
        lease = queue.acquire("last", lease_id=f"last-{now}", max_groups=4, now=now)
        for item in lease.items if lease else ():
            assert queue.finish(item)
            known.discard(item)
        now += 10.0
        known -= set(queue.expire(now=now).exhausted)
    assert not known


def test_a_group_is_put_back_only_out_of_the_lease_that_is_named_and_is_not_charged() -> None:
    queue = queue_with(ref(0), ref(1), workers=2)
    taken(queue, "l1")
    queue.put_back(ref(0), lease_id="other")
    assert queue.statistics().leased_count == 2
    for item in (ref(0), ref(1)):
        queue.put_back(item, lease_id="l1")
    assert taken(queue, "l2") == (ref(0), ref(1))


def test_a_lease_cannot_be_renewed_beyond_its_end() -> None:
    queue = queue_with(ref(0), ref(1))
    taken(queue, "l1")
    queue.bound("l1", ends_at=15.0)
    assert queue.renew("w1", "l1", now=9.0) == 15.0
    assert queue.renew("w1", "l1", now=14.0) == 15.0
    assert queue.next_expiry() == 15.0
    assert queue.expire(now=15.0).returned == (ref(0), ref(1))


def test_renewals_leave_one_entry_each() -> None:
    queue = queue_with(ref(0))
    taken(queue, "l1")
    for number in range(1000):
        queue.renew("w1", "l1", now=number / 1000)
    assert len(queue._expiries) == 1
    assert queue.next_expiry() == 10.999
