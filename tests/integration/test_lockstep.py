"""A lockstep pool through real sockets: joining, publishing, verifying, closing, delivering."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from hacrl_exchange import codec
from hacrl_exchange._pb import exchange_service_pb2, pool_pb2, step_pb2, verdict_pb2
from hacrl_exchange.errors import (
    AgentTakenError,
    NotJoinedError,
    PoolEndedError,
    PoolNotFoundError,
    SessionSupersededError,
    StepNotFoundError,
)
from hacrl_exchange.status import from_rpc_error
from hacrl_exchange.testing import running_broker
from rawdesk import Desk

PROMPTS = ("q0", "q1", "q2", "q3")


def publish_all(desk: Desk, agent: str, *, step: int = 1) -> None:
    groups = [desk.encoded(agent, prompt_id, step=step, seed=len(agent)) for prompt_id in PROMPTS]
    results = desk.publish(agent, *groups).results
    assert [result.error.message for result in results] == [""] * 4


def test_two_agents_get_the_identical_joint_batch_once_all_is_published_and_verified(desk: Desk) -> None:
    desk.create_pool(min_members=2)
    desk.join("a")
    assert not desk.await_step("a", wait=0.0).HasField("step")
    desk.join("b")
    step = desk.await_step("a").step
    assert list(step.roster) == ["a", "b"]
    assert sorted(prompt.prompt_id for prompt in step.prompts) == list(PROMPTS)
    publish_all(desk, "a")
    publish_all(desk, "b")
    assert not desk.manifest(1, agent="a", wait=0.0).HasField("manifest")

    desk.verify_all(desk.register_worker(), 8)

    ours, theirs = desk.manifest(1, agent="a").manifest, desk.manifest(1, agent="b").manifest
    assert ours == theirs
    assert ours.outcome == step_pb2.STEP_OUTCOME_COMPLETE
    assert [(entry.prompt_index, entry.roster_index) for entry in ours.entries] == [
        (prompt, member) for prompt in range(4) for member in range(2)
    ]
    assert [entry.counts[-1].success_count for entry in ours.roster] == [8, 8]
    messages = list(
        desk.exchange.StreamGroups(
            exchange_service_pb2.StreamGroupsRequest(pool=desk.pool, caller=desk.caller("a"), step=1),
            timeout=10,
        )
    )
    delivered = [group for message in messages for group in message.groups]
    assert [codec.group_digest(group.group.envelope) for group in delivered] == [
        entry.digest for entry in ours.entries
    ]
    assert all(group.verdict.verdicts[0].scored.score == 1.0 for group in delivered)


def test_a_stream_resumes_at_any_entry(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    publish_all(desk, "a")
    desk.verify_all(desk.register_worker(), 4)
    desk.manifest(1, agent="a")
    request = exchange_service_pb2.StreamGroupsRequest(
        pool=desk.pool, caller=desk.caller("a"), step=1, start_entry=3
    )
    (message,) = desk.exchange.StreamGroups(request, timeout=10)
    assert [group.entry for group in message.groups] == [3]


def test_a_repeat_gets_the_first_receipt_and_another_group_gets_slot_taken(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    first = desk.publish("a", desk.encoded("a", "q0")).results[0]
    again = desk.publish("a", desk.encoded("a", "q0")).results[0]
    other = desk.publish("a", desk.encoded("a", "q0", seed=9)).results[0]
    assert again.receipt == first.receipt
    assert other.error.message.endswith(".")
    assert "SLOT_TAKEN" in str(other.error)
    assert desk.status().accepted_count == 2


def test_a_repeat_after_the_step_closed_still_gets_the_first_receipt(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    first = desk.publish("a", *[desk.encoded("a", prompt_id) for prompt_id in PROMPTS]).results[0]
    desk.verify_all(desk.register_worker(), 4)
    desk.manifest(1, agent="a")
    again = desk.publish("a", desk.encoded("a", "q0")).results[0]
    other = desk.publish("a", desk.encoded("a", "q0", seed=9)).results[0]
    assert again.receipt == first.receipt
    assert "SLOT_TAKEN" in str(other.error)


def test_a_newer_session_supersedes_an_older_one_in_every_call(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a", instance="old")
    old = desk.caller("a")
    desk.join("a", instance="new")
    calls: dict[str, Callable[[], object]] = {
        "publish": lambda: desk.exchange.PublishGroups(
            exchange_service_pb2.PublishGroupsRequest(
                pool=desk.pool, caller=old, groups=[desk.encoded("a", "q0")]
            ),
            timeout=10,
        ),
        "await step": lambda: desk.exchange.AwaitStep(
            exchange_service_pb2.AwaitStepRequest(pool=desk.pool, caller=old), timeout=10
        ),
        "manifest": lambda: desk.exchange.AwaitManifest(
            exchange_service_pb2.AwaitManifestRequest(pool=desk.pool, caller=old, step=1), timeout=10
        ),
        "stream": lambda: list(
            desk.exchange.StreamGroups(
                exchange_service_pb2.StreamGroupsRequest(pool=desk.pool, caller=old, step=1), timeout=10
            )
        ),
        "own": lambda: list(
            desk.exchange.StreamOwnGroups(
                exchange_service_pb2.StreamOwnGroupsRequest(pool=desk.pool, caller=old, step=1), timeout=10
            )
        ),
        "ack": lambda: desk.exchange.AckStep(
            exchange_service_pb2.AckStepRequest(pool=desk.pool, caller=old, step=1), timeout=10
        ),
        "leave": lambda: desk.exchange.LeavePool(
            exchange_service_pb2.LeavePoolRequest(pool=desk.pool, caller=old), timeout=10
        ),
    }
    for call in calls.values():
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert isinstance(from_rpc_error(caught.value), SessionSupersededError)


def test_joining_again_with_the_same_instance_keeps_the_session_and_tells_what_is_committed(
    desk: Desk,
) -> None:
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    desk.publish("a", desk.encoded("a", "q2"))
    again = desk.join("a")
    assert again.member.session == 1
    assert [list(step.committed_prompt_ids) for step in again.open_steps] == [["q2"]]
    assert desk.join("a", instance="next").member.session == 2


def test_own_groups_of_an_open_step_come_back(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    sent = desk.encoded("a", "q2")
    desk.publish("a", sent)
    messages = desk.exchange.StreamOwnGroups(
        exchange_service_pb2.StreamOwnGroupsRequest(pool=desk.pool, caller=desk.caller("a"), step=1),
        timeout=10,
    )
    (group,) = [group for message in messages for group in message.groups]
    assert (group.name, group.envelope, list(group.parts)) == (sent.name, sent.envelope, list(sent.parts))


def test_a_late_member_is_away_and_its_next_call_brings_it_back(desk: Desk) -> None:
    desk.create_pool(min_members=2, publish_timeout_seconds=0.5)
    desk.join("a")
    desk.join("b")
    desk.await_step("a")
    publish_all(desk, "a")
    desk.publish("b", desk.encoded("b", "q0"))
    worker = desk.register_worker()
    desk.verify_all(worker, 5)
    manifest = desk.manifest(1).manifest
    assert manifest.outcome == step_pb2.STEP_OUTCOME_DEGRADED
    assert not manifest.quorum_met
    assert [entry.state for entry in manifest.roster] == [
        step_pb2.ROSTER_STATE_COMPLETE,
        step_pb2.ROSTER_STATE_LATE,
    ]
    members = desk.exchange.ListMembers(
        exchange_service_pb2.ListMembersRequest(parent=desk.pool), timeout=10
    ).members
    assert members[1].state == pool_pb2.MEMBER_STATE_AWAY
    assert list(desk.await_step("a", after=1).step.roster) == ["a"]
    desk.await_step("b", after=1, wait=0.0)
    members = desk.exchange.ListMembers(
        exchange_service_pb2.ListMembersRequest(parent=desk.pool), timeout=10
    ).members
    assert members[1].state == pool_pb2.MEMBER_STATE_ACTIVE


def test_give_to_get_an_agent_sees_others_only_for_prompts_it_answered(desk: Desk) -> None:
    desk.create_pool(min_members=2, publish_timeout_seconds=0.5)
    desk.join("a")
    desk.join("b")
    desk.await_step("a")
    publish_all(desk, "a")
    desk.publish("b", desk.encoded("b", "q0"))
    desk.verify_all(desk.register_worker(), 5)
    seen = desk.manifest(1, agent="b").manifest
    assert len(seen.entries) == 2
    assert seen.unrevealed_count == 3
    assert len(desk.manifest(1, agent="a").manifest.entries) == 5


def test_nobody_verifies_and_the_step_closes_as_unsupported(desk: Desk) -> None:
    desk.create_pool(verify_timeout_seconds=0.2)
    desk.join("a")
    desk.await_step("a")
    publish_all(desk, "a")
    desk.manifest(1, agent="a")
    (message,) = desk.exchange.StreamGroups(
        exchange_service_pb2.StreamGroupsRequest(pool=desk.pool, caller=desk.caller("a"), step=1), timeout=10
    )
    verdict = message.groups[0].verdict.verdicts[0]
    assert verdict.WhichOneof("outcome") == "unsupported"
    assert verdict.reason == verdict_pb2.VERDICT_REASON_NO_WORKER
    status = desk.status()
    assert (status.accepted_count, status.unscored_count, status.pending_count) == (8, 8, 0)


def test_a_pool_that_reached_its_last_step_says_so(desk: Desk) -> None:
    desk.create_pool(max_steps=1)
    desk.join("a")
    desk.await_step("a")
    publish_all(desk, "a")
    desk.verify_all(desk.register_worker(), 4)
    desk.manifest(1, agent="a")
    with pytest.raises(grpc.RpcError) as caught:
        desk.await_step("a", after=1)
    assert isinstance(from_rpc_error(caught.value), PoolEndedError)


def test_names_that_do_not_exist_are_refused_with_their_reason(desk: Desk) -> None:
    desk.create_pool()
    desk.join("a")
    with pytest.raises(grpc.RpcError) as caught:
        desk.exchange.GetPool(exchange_service_pb2.GetPoolRequest(name="pools/none"), timeout=10)
    assert isinstance(from_rpc_error(caught.value), PoolNotFoundError)
    with pytest.raises(grpc.RpcError) as caught:
        desk.manifest(7)
    assert isinstance(from_rpc_error(caught.value), StepNotFoundError)
    desk.sessions["ghost"] = 1
    with pytest.raises(grpc.RpcError) as caught:
        desk.await_step("ghost")
    assert isinstance(from_rpc_error(caught.value), NotJoinedError)
    assert AgentTakenError.reason == "AGENT_TAKEN"


def test_a_restarted_broker_goes_on_where_it_stopped(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker, grpc.insecure_channel(broker.target) as channel:
        desk = Desk(channel)
        desk.create_pool()
        desk.join("a")
        desk.await_step("a")
        first = desk.publish("a", *[desk.encoded("a", prompt_id) for prompt_id in PROMPTS]).results
        sessions = desk.sessions
    with running_broker(tmp_path) as broker, grpc.insecure_channel(broker.target) as channel:
        desk = Desk(channel, sessions=sessions)
        assert desk.status().pending_count == 8
        again = desk.publish("a", desk.encoded("a", "q1")).results[0]
        assert again.receipt == first[1].receipt
        desk.verify_all(desk.register_worker(), 4)
        assert len(desk.manifest(1, agent="a").manifest.entries) == 4
