"""The worker's loop against a broker and slots that the test holds in its hand. No processes, no network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hacrl_exchange.client.worker import (
    Lease,
    LeasedGroup,
    OfferedVerifier,
    VerdictReport,
    WorkerRegistration,
)
from hacrl_exchange.errors import (
    AlreadyVerifiedError,
    ExchangeError,
    LeaseExpiredError,
    PartUndecodableError,
    PermissionDeniedError,
    UnreachableError,
    WorkerNotFoundError,
)
from hacrl_exchange.types import (
    Prompt,
    PromptEntry,
    Rollout,
    Scored,
    Unscored,
    UnscoredKind,
    VerdictReason,
    VerifierIdentity,
)
from hacrl_verifiers._work import Finished, WorkInHand
from hacrl_verifiers.api import config_digest
from hacrl_verifiers.isolation import IsolationError, Job, Offered, Pool
from hacrl_verifiers.results import Judgement, failed
from hacrl_verifiers.worker import Worker

PATIENCE_SECONDS = 10.0


def group(
    name: str, *, verifier: str = "equal", texts: Sequence[str] = ("a", "b"), **changes: Any
) -> LeasedGroup:
    values: dict[str, Any] = {
        "name": name,
        "generation": 1,
        "verifier": verifier,
        "config_json": "{}",
        "item_timeout_seconds": 5.0,
        "prompt": PromptEntry(Prompt("p", ()), '"a"'),
        "rollout_count": len(texts),
        "rollouts": tuple(Rollout(text, 1, -1.0) for text in texts),
    }
    return LeasedGroup(**(values | changes))


class FakeBroker:
    """Leases what the test queues. `refusals` are raised, one per call of the method they are queued for."""

    def __init__(self) -> None:
        self.leases: deque[Lease] = deque()
        self.refusals: dict[str, deque[ExchangeError]] = {
            name: deque() for name in ("register", "acquire", "renew", "report")
        }
        self.answers: deque[ExchangeError | None] = deque()
        self.registered: list[list[OfferedVerifier]] = []
        self.reports: list[tuple[str, VerdictReport]] = []
        self.lease_timeout_seconds = 60.0
        self.changed = threading.Condition()
        self.acquired = 0

    def _refuse(self, method: str) -> None:
        with self.changed:
            refusals = self.refusals[method]
            refusal = refusals.popleft() if refusals else None
            self.changed.notify_all()
        if refusal is not None:
            raise refusal

    def register(self, identity: str, *, offered: Sequence[OfferedVerifier]) -> WorkerRegistration:
        self._refuse("register")
        self.registered.append(list(offered))
        return WorkerRegistration(f"worker-{len(self.registered)}", self.lease_timeout_seconds)

    def acquire(self, worker: str, *, max_groups: int, wait_seconds: float) -> Lease | None:
        self._refuse("acquire")
        with self.changed:
            self.changed.wait_for(lambda: self.leases, timeout=0.05)
            if not self.leases:
                return None
            self.acquired += 1
            self.changed.notify_all()
            return self.leases.popleft()

    def renew(self, worker: str, *, lease: str) -> float:
        self._refuse("renew")
        return self.lease_timeout_seconds

    def report(
        self, worker: str, *, lease: str, reports: Sequence[VerdictReport]
    ) -> Sequence[ExchangeError | None]:
        self._refuse("report")
        with self.changed:
            self.reports += [(worker, report) for report in reports]
            self.changed.notify_all()
        return [self.answers.popleft() if self.answers else None for _ in reports]

    def await_until(self, condition: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_SECONDS)


class FakeSlot:
    """Judges by equality with "a"; waits for `gate` first. `error` is raised instead."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.error: Exception | None = None

    def run(self, job: Job) -> list[Judgement]:
        self.jobs.append(job)
        self.started.set()
        assert self.gate.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        texts = [text for responses in job.groups for text in responses.texts]
        return [
            failed(VerdictReason.RAISED, "boom") if text == "boom" else Judgement(Scored(float(text == "a")))
            for text in texts
        ]


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def slot() -> FakeSlot:
    return FakeSlot()


@pytest.fixture
def make_worker(broker: FakeBroker, slot: FakeSlot) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**options: Any) -> Worker:
        offered = (Offered("equal", "3", 1.0, False),)
        pool = cast(Pool, SimpleNamespace(offered=offered, slots=(slot,), close=slot.gate.set))
        made.append(Worker(broker, pool, identity="w", **options))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


class Running:
    """A worker in a thread of its own."""

    def __init__(self, worker: Worker) -> None:
        self.error: Exception | None = None
        self._worker = worker
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._worker.run()
        except (ExchangeError, IsolationError) as error:
            self.error = error

    def stop(self) -> None:
        self._worker.stop()
        self.join()

    def join(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()


def test_verdicts_are_reported_with_who_judged_and_details(
    broker: FakeBroker, make_worker: Callable[..., Worker]
) -> None:
    broker.leases.append(Lease("l1", (group("g1"), group("g2", texts=("boom", "a"), config_json='{"x": 1}'))))

    make_worker(once=True).run()

    raised = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.RAISED)
    assert broker.registered == [[OfferedVerifier("equal", "3", False)]]
    assert [report for _, report in broker.reports] == [
        VerdictReport(
            "g1", 1, VerifierIdentity("equal", "3", config_digest("{}")), (Scored(1.0), Scored(0.0)), ()
        ),
        VerdictReport(
            "g2",
            1,
            VerifierIdentity("equal", "3", config_digest('{"x":1}')),
            (raised, Scored(1.0)),
            ("boom", ""),
        ),
    ]


def test_what_cannot_be_verified_here_is_reported_as_unavailable(
    broker: FakeBroker, slot: FakeSlot, make_worker: Callable[..., Worker]
) -> None:
    torn = group("g2", rollouts=(), problem=PartUndecodableError("The text part is torn."))
    broker.leases.append(Lease("l1", (group("g1", verifier="other"), torn, group("g3"))))

    make_worker(once=True).run()

    unavailable = Unscored(UnscoredKind.UNSUPPORTED, VerdictReason.VERIFIER_UNAVAILABLE)
    reports = {report.group: report for _, report in broker.reports}
    assert reports["g1"].verdicts == reports["g2"].verdicts == (unavailable, unavailable)
    assert reports["g1"].details[0] == "This worker does not offer the verifier 'other'."
    assert reports["g2"].details[0] == "The text part is torn."
    assert reports["g3"].verdicts == (Scored(1.0), Scored(0.0))
    assert len(slot.jobs) == 1


def test_the_next_lease_is_taken_while_one_is_verified(
    broker: FakeBroker, slot: FakeSlot, make_worker: Callable[..., Worker]
) -> None:
    slot.gate.clear()
    broker.leases += [Lease("l1", (group("g1"),)), Lease("l2", (group("g2"),))]
    running = Running(make_worker())

    broker.await_until(lambda: broker.acquired == 2)
    assert not broker.reports
    slot.gate.set()
    broker.await_until(lambda: len(broker.reports) == 2)

    running.stop()


def test_a_worker_the_broker_forgot_registers_again(
    broker: FakeBroker, make_worker: Callable[..., Worker]
) -> None:
    broker.refusals["acquire"] += [WorkerNotFoundError("Who?")]
    broker.leases.append(Lease("l1", (group("g1"),)))

    make_worker(once=True).run()

    assert len(broker.registered) == 2
    assert [worker for worker, _ in broker.reports] == ["worker-2"]


def test_verdicts_made_before_the_broker_forgot_us_are_reported_all_the_same(
    broker: FakeBroker, make_worker: Callable[..., Worker]
) -> None:
    broker.refusals["report"] += [WorkerNotFoundError("Who?")]
    broker.leases.append(Lease("l1", (group("g1"),)))
    running = Running(make_worker())

    broker.await_until(lambda: broker.reports)

    assert [worker for worker, _ in broker.reports] == ["worker-2"]
    running.stop()


@pytest.mark.parametrize("method", ["register", "acquire", "report"])
def test_a_broker_that_is_away_is_waited_for(
    broker: FakeBroker, make_worker: Callable[..., Worker], method: str
) -> None:
    broker.refusals[method] += [UnreachableError("No answer.")] * 3
    broker.leases.append(Lease("l1", (group("g1"),)))
    running = Running(make_worker())

    broker.await_until(lambda: broker.reports)

    assert len(broker.reports) == 1
    running.stop()
    assert running.error is None


def test_a_worker_that_runs_once_does_not_wait_for_a_broker(
    broker: FakeBroker, make_worker: Callable[..., Worker]
) -> None:
    broker.refusals["register"] += [UnreachableError("No answer.")]

    with pytest.raises(UnreachableError, match=r"No answer\."):
        make_worker(once=True).run()


def test_a_worker_that_may_not_work_ends_with_the_reason(
    broker: FakeBroker, make_worker: Callable[..., Worker]
) -> None:
    broker.refusals["register"] += [PermissionDeniedError("Not with this key.")]

    with pytest.raises(PermissionDeniedError, match=r"Not with this key\."):
        make_worker().run()


def test_a_worker_without_children_ends_with_the_reason(
    broker: FakeBroker, slot: FakeSlot, make_worker: Callable[..., Worker]
) -> None:
    slot.error = IsolationError("No child can be forked.")
    broker.leases.append(Lease("l1", (group("g1"),)))

    with pytest.raises(IsolationError, match=r"No child can be forked\."):
        make_worker().run()


def test_verdicts_that_are_not_needed_any_more_are_let_go(
    broker: FakeBroker, make_worker: Callable[..., Worker]
) -> None:
    broker.answers.append(AlreadyVerifiedError("Someone was faster."))
    broker.leases.append(Lease("l1", (group("g1"),)))

    make_worker(once=True).run()

    assert len(broker.reports) == 1


def test_a_lease_that_ran_out_is_dropped(
    broker: FakeBroker, slot: FakeSlot, make_worker: Callable[..., Worker]
) -> None:
    slot.gate.clear()
    broker.lease_timeout_seconds = 0.03
    broker.leases.append(Lease("l1", (group("g1"), group("g2", config_json='{"x": 1}'))))
    running = Running(make_worker())
    assert slot.started.wait(PATIENCE_SECONDS)

    broker.refusals["renew"].append(LeaseExpiredError("Too late."))
    broker.await_until(lambda: not broker.refusals["renew"])
    broker.leases.append(Lease("l2", (group("g3"),)))
    broker.await_until(lambda: broker.acquired == 2)
    slot.gate.set()
    broker.await_until(lambda: len(broker.reports) == 2)

    running.stop()
    assert [report.group for _, report in broker.reports] == ["g1", "g3"]


def test_leases_are_renewed_while_they_are_worked_on(
    broker: FakeBroker, slot: FakeSlot, make_worker: Callable[..., Worker]
) -> None:
    slot.gate.clear()
    broker.lease_timeout_seconds = 0.03
    broker.leases.append(Lease("l1", (group("g1"),)))
    broker.refusals["renew"] += [UnreachableError("No answer.")] * 3
    running = Running(make_worker())

    broker.await_until(lambda: not broker.refusals["renew"])
    slot.gate.set()
    broker.await_until(lambda: broker.reports)

    running.stop()


def test_stop_finishes_what_is_in_hand(
    broker: FakeBroker, slot: FakeSlot, make_worker: Callable[..., Worker]
) -> None:
    slot.gate.clear()
    broker.leases.append(Lease("l1", (group("g1"), group("g2", config_json='{"x": 1}'))))
    worker = make_worker()
    running = Running(worker)
    assert slot.started.wait(PATIENCE_SECONDS)

    worker.stop()
    slot.gate.set()
    running.join()

    assert [report.group for _, report in broker.reports] == ["g1", "g2"]


# what is in hand


def test_one_job_holds_groups_of_one_kind_that_fit() -> None:
    hand = WorkInHand(slots=1)
    for _ in range(50):
        hand.finish([Finished("warm", group("g"), ())], seconds=0.0)
    large = group("g4", texts=("x" * (3 << 20),))
    other = group("g3", config_json='{"x": 1}')
    hand.add("l1", [group("g1"), group("g2"), other, large, group("g5", texts=("x" * (2 << 20),))])

    tasks = [hand.next_task() for _ in range(4)]

    names = [[one.name for one in task.groups] for task in tasks if task is not None]
    assert names == [["g1", "g2"], ["g3"], ["g4"], ["g5"]]


def test_a_lease_is_shared_among_the_slots() -> None:
    hand = WorkInHand(slots=4)
    for _ in range(50):
        hand.finish([Finished("warm", group("g"), ())], seconds=0.0)
    hand.add("l1", [group(f"g{n}") for n in range(8)])

    first = hand.next_task()

    assert first is not None
    assert len(first.groups) == 2


def test_slow_groups_are_held_in_small_numbers() -> None:
    fast, slow = WorkInHand(slots=2), WorkInHand(slots=2)
    for _ in range(50):
        fast.finish([Finished("warm", group("g"), ())], seconds=0.0001)
        slow.finish([Finished("warm", group("g"), ())], seconds=10.0)

    assert fast.room() == 256
    assert slow.room() == 4
