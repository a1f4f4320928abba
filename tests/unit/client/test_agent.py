"""Rules of an agent: its steps in order, its groups exactly once, its joint batches proven."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import step_pb2
from hacrl_exchange.client import Agent, Exchange, Step, connect
from hacrl_exchange.errors import (
    CountMismatchError,
    DigestMismatchError,
    ExchangeError,
    InvalidRequestError,
    LogFailedError,
    NotJoinedError,
    OverloadedError,
    SessionSupersededError,
    StepClosedError,
    UnknownPromptError,
    UnreachableError,
    WrongGroupSizeError,
)
from hacrl_exchange.types import Group, ModelSpec, Rollout, Scored, StepOutcome

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeBroker

MakeGroup = Callable[..., Group]


@pytest.fixture
def exchange(broker: FakeBroker, target: str) -> Iterator[Exchange]:
    """A connection with little patience."""
    with connect(target, patience_seconds=5.0) as connected:
        yield connected


@pytest.fixture
def agent(broker: FakeBroker, exchange: Exchange) -> Agent:
    """Agent "a" in a pool whose step 1 is open."""
    broker.add_step(1)
    return exchange.join("math", agent="a")


# --- steps -----------------------------------------------------------------------------------------


def test_steps_come_in_order_and_moving_on_acknowledges(broker: FakeBroker, exchange: Exchange) -> None:
    broker.add_step(4)
    broker.add_step(6)

    with exchange.join("math", agent="a") as agent:
        seen = [(step.number, len(broker.requests("AckStep"))) for step in agent.steps()]

    assert seen == [(4, 0), (6, 1)]
    assert [request.step for request in broker.requests("AckStep")] == [4, 6]
    assert [request.caller.session for request in broker.requests("AwaitStep")] == [7, 7, 7]


def test_a_step_shows_its_prompts_and_roster(agent: Agent) -> None:
    step = next(agent.steps())

    assert [prompt.prompt_id for prompt in step.prompts] == ["p0", "p1", "p2"]
    assert step.prompts[0].messages[0].content == "2+2?"
    assert step.roster == ("a", "b")
    assert not step.closed
    assert repr(step) == "<Step 1 [0 of 3 prompts committed]>"
    assert repr(agent) == "<Agent a in pool math [session 7, step 1]>"


def test_without_resume_after_the_past_is_past(broker: FakeBroker, exchange: Exchange) -> None:
    """Step 1 is closed; of the open steps 2 and 4 with a closed one between, only the open ones come."""
    broker.add_step(1, state=step_pb2.STEP_STATE_CLOSED)
    broker.add_step(2)
    broker.add_step(3, state=step_pb2.STEP_STATE_CLOSED)
    broker.add_step(4)

    agent = exchange.join("math", agent="a")

    assert [step.number for step in agent.steps()] == [2, 4]


def test_a_step_that_closes_after_joining_still_comes(broker: FakeBroker, exchange: Exchange) -> None:
    agent = exchange.join("math", agent="a")
    broker.add_step(1, state=step_pb2.STEP_STATE_CLOSED)

    assert [(step.number, step.closed) for step in agent.steps()] == [(1, True)]


def test_resume_after_gives_closed_steps_again(broker: FakeBroker, exchange: Exchange) -> None:
    for number in (1, 2, 3):
        broker.add_step(number, state=step_pb2.STEP_STATE_CLOSED)
    broker.add_step(4)

    agent = exchange.join("math", agent="a", resume_after=1)

    assert [(step.number, step.closed) for step in agent.steps()] == [(2, True), (3, True), (4, False)]


def test_a_wait_for_a_step_may_be_bounded(broker: FakeBroker, exchange: Exchange) -> None:
    broker.ended = False
    agent = exchange.join("math", agent="a")

    with pytest.raises(TimeoutError, match=r"^A step of pool math for agent a did not come within 0\.1 s\.$"):
        next(agent.steps(timeout_seconds=0.1))


def test_waiting_survives_an_absent_broker(broker: FakeBroker, agent: Agent) -> None:
    broker.fail["AwaitStep"].extend([grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
    broker.fail["AckStep"].append(LogFailedError("The log failed."))

    assert [step.number for step in agent.steps()] == [1]


@pytest.mark.parametrize("error", [SessionSupersededError("Superseded."), NotJoinedError("Who?")], ids=str)
def test_the_end_of_a_session_is_raised(broker: FakeBroker, agent: Agent, error: ExchangeError) -> None:
    broker.fail["AwaitStep"].append(error)

    with pytest.raises(type(error)):
        next(agent.steps())


def test_a_clean_end_leaves_and_an_exception_does_not(broker: FakeBroker, exchange: Exchange) -> None:
    with exchange.join("math", agent="a"):
        pass
    assert len(broker.requests("LeavePool")) == 1

    with pytest.raises(KeyError), exchange.join("math", agent="a"):
        raise KeyError
    assert len(broker.requests("LeavePool")) == 1


def test_a_pool_that_cannot_be_left_does_not_spoil_the_end(
    broker: FakeBroker, exchange: Exchange, caplog: pytest.LogCaptureFixture
) -> None:
    broker.fail["LeavePool"].append(SessionSupersededError("A newer one joined."))

    with exchange.join("math", agent="a"):
        pass

    assert [record.getMessage() for record in caplog.records] == [
        "agent a could not leave pool math: A newer one joined."
    ]


def test_joining_states_the_model(broker: FakeBroker, exchange: Exchange) -> None:
    exchange.join("math", agent="a", model=ModelSpec("tiny", "LlamaForCausalLM", 7, "cd" * 32))

    (request,) = broker.requests("JoinPool")
    assert (request.pool, request.agent, request.model.architecture) == (
        "pools/math",
        "a",
        "LlamaForCausalLM",
    )


# --- publishing ------------------------------------------------------------------------------------


def test_publishing_answers_receipts_and_marks_the_step(agent: Agent, group: MakeGroup) -> None:
    step = next(agent.steps())

    report = agent.publish([group("p0"), group("p2")])

    assert [receipt.slot.prompt_id for receipt in report.receipts] == ["p0", "p2"]
    assert {receipt.rollout_count for receipt in report.receipts} == {2}
    assert report.kept == report.late == ()
    assert [prompt.prompt_id for prompt in step.missing] == ["p1"]
    assert set(step.committed) == {"p0", "p2"}


def test_publishing_needs_a_step(broker: FakeBroker, exchange: Exchange, group: MakeGroup) -> None:
    agent = exchange.join("math", agent="a")

    with pytest.raises(
        InvalidRequestError, match=r"^There is no step to publish in: take one from steps\(\) first\.$"
    ):
        agent.publish([group("p0")])


def test_publishing_takes_an_iterator_and_splits_it_into_calls(
    broker: FakeBroker, agent: Agent, group: MakeGroup
) -> None:
    next(agent.steps())

    report = agent.publish(group(f"p{number}") for number in range(150))

    sizes = [len(request.groups) for request in broker.requests("PublishGroups")]
    assert sum(sizes) == len(report.receipts) == 150
    assert max(sizes) <= 64


def test_a_call_stays_below_the_servers_message_limit(
    broker: FakeBroker, target: str, group: MakeGroup
) -> None:
    broker.limits.max_message_size = 4000
    broker.limits.max_groups_per_publish = 5
    broker.add_step(1)
    with connect(target) as exchange:
        agent = exchange.join("math", agent="a")
        next(agent.steps())
        agent.publish(group(f"p{number}") for number in range(20))

    requests = broker.requests("PublishGroups")
    assert max(len(request.groups) for request in requests) <= 5
    assert max(sum(one.ByteSize() for one in request.groups) for request in requests) <= 4000


@pytest.mark.parametrize(
    "error",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        LogFailedError("The log failed."),
        OverloadedError("Full.", retry_seconds=0.01),
    ],
    ids=str,
)
def test_a_failed_call_is_repeated_and_publishes_once(
    broker: FakeBroker, agent: Agent, group: MakeGroup, error: ExchangeError | grpc.StatusCode
) -> None:
    broker.fail["PublishGroups"].extend([error, error])
    next(agent.steps())

    report = agent.publish([group("p0"), group("p1")])

    assert len(report.receipts) == 2
    assert len(broker.requests("PublishGroups")) == 3
    assert len(broker.stored) == 2


def test_a_group_that_alone_meets_a_passing_error_is_repeated_alone(
    broker: FakeBroker, agent: Agent, group: MakeGroup
) -> None:
    broker.refuse["p1"].extend([LogFailedError("The log failed.")] * 2)
    next(agent.steps())

    report = agent.publish([group("p0"), group("p1"), group("p2")])

    assert [receipt.slot.prompt_id for receipt in report.receipts] == ["p0", "p1", "p2"]
    assert [len(request.groups) for request in broker.requests("PublishGroups")] == [3, 1, 1]


def test_a_taken_slot_keeps_the_stored_group(broker: FakeBroker, agent: Agent, group: MakeGroup) -> None:
    """The stored group came from an earlier life, after this one fetched the step."""
    step = next(agent.steps())
    broker.store(group("p1", "older", rollouts=group("p1", "older").rollouts))

    report = agent.publish([group("p0"), group("p1", "newer")])

    assert report.kept == ("p1",)
    assert sorted(receipt.slot.prompt_id for receipt in report.receipts) == ["p0", "p1"]
    assert step.committed["p1"].rollouts[0].text == "older 0"
    assert step.committed["p0"].rollouts[0].text == "four 0"
    assert step.missing == (step.prompts[2],)


def test_what_is_committed_is_not_sent_again(
    broker: FakeBroker, exchange: Exchange, group: MakeGroup
) -> None:
    broker.store(group("p0", "older"))
    broker.add_step(1)
    agent = exchange.join("math", agent="a")
    step = next(agent.steps())

    report = agent.publish([group("p0", "newer"), group("p1")])

    assert report.kept == ("p0",)
    assert [len(request.groups) for request in broker.requests("PublishGroups")] == [1]
    assert not broker.requests("StreamOwnGroups")
    assert step.committed["p0"].rollouts[0].text == "older 0"
    assert set(step.committed) == {"p0", "p1"}
    assert len(broker.requests("StreamOwnGroups")) == 1


def test_a_committed_group_comes_back_with_its_numbers(
    broker: FakeBroker, exchange: Exchange, group: MakeGroup
) -> None:
    broker.store(group("p0"))
    broker.store(group("p0"), agent="b")
    broker.add_step(1)
    broker.fail["StreamOwnGroups"].append(grpc.StatusCode.UNAVAILABLE)

    step = next(exchange.join("math", agent="a").steps())

    first = step.committed["p0"].rollouts[1]
    assert first.token_ids is not None
    assert first.logprobs is not None
    assert list(first.token_ids) == [1, 1]
    assert list(first.logprobs) == [-0.5, -0.25]


def test_late_groups_are_listed_not_raised(broker: FakeBroker, agent: Agent, group: MakeGroup) -> None:
    broker.refuse["p1"].append(StepClosedError("Publishing has ended."))
    next(agent.steps())

    report = agent.publish([group("p0"), group("p1"), group("p2")])

    assert report.late == ("p1",)
    assert [receipt.slot.prompt_id for receipt in report.receipts] == ["p0", "p2"]


def test_a_refused_group_is_raised_after_the_others_went_through(
    broker: FakeBroker, agent: Agent, group: MakeGroup
) -> None:
    broker.refuse["p0"].append(WrongGroupSizeError("Two rollouts instead of four."))
    broker.refuse["p9"].append(UnknownPromptError("No such prompt."))
    nan = Rollout("x", 1, float("nan"), token_ids=[1], logprobs=[float("nan")])
    step = next(agent.steps())

    with pytest.raises(WrongGroupSizeError, match=r"^Two rollouts instead of four\.") as raised:
        agent.publish([group("p0"), group("p1"), group("p9"), group("p2", rollouts=(nan, nan))])

    assert raised.value.__notes__ == [
        "This is about the group for prompt p0 of step 1.",
        "Also refused, for prompt p9: No such prompt.",
        "Also refused, for prompt p2: A log-prob of rollout 0 is NaN, infinite or positive; "
        "check how it was computed.",
    ]
    assert [prompt.prompt_id for prompt in step.missing] == ["p0", "p2"]


@pytest.mark.parametrize("how", ["call", "group"])
def test_a_superseded_agent_stops_publishing(
    broker: FakeBroker, agent: Agent, group: MakeGroup, how: str
) -> None:
    error = SessionSupersededError("A newer process joined.")
    (broker.fail["PublishGroups"] if how == "call" else broker.refuse["p0"]).append(error)
    next(agent.steps())

    with pytest.raises(SessionSupersededError, match=r"^A newer process joined\."):
        agent.publish([group("p0"), group("p1")])


def test_every_receipt_is_in_the_journal_even_when_publishing_raises(
    broker: FakeBroker, exchange: Exchange, group: MakeGroup, tmp_path: Path
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text('{"whole": 1}\n{"torn by a cra', encoding="utf-8")
    broker.add_step(1)
    broker.refuse["p1"].append(WrongGroupSizeError("No."))

    with exchange.join("math", agent="a", journal=path) as agent:
        next(agent.steps())
        with pytest.raises(WrongGroupSizeError):
            agent.publish([group("p0"), group("p1")])
        report = agent.publish([group("p2")])

    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {"whole": 1}
    assert [line["prompt_id"] for line in lines[1:]] == ["p0", "p2"]
    assert lines[2] == {
        "pool": "math",
        "step": 1,
        "prompt_id": "p2",
        "agent": "a",
        "session": 7,
        "digest": report.receipts[0].digest.hex(),
        "rollouts": 2,
    }


# --- joint batches ---------------------------------------------------------------------------------


@pytest.fixture
def closed(broker: FakeBroker, agent: Agent, group: MakeGroup) -> Step:
    """Step 1, which closed after both agents had published everything."""
    step = next(agent.steps())
    for name in ("a", "b"):
        for number in range(3):
            broker.store(group(f"p{number}", f"{name}{number}"), agent=name)
    return step


def test_a_joint_batch_holds_everybodys_groups_in_the_manifests_order(closed: Step) -> None:
    batch = closed.joint_batch()

    assert [(one.agent, one.group.prompt_id) for one in batch.groups] == [
        (agent, f"p{number}") for number in range(3) for agent in ("a", "b")
    ]
    assert (batch.step, batch.outcome, batch.quorum_met) == (1, StepOutcome.COMPLETE, True)
    assert batch.prompts == closed.prompts
    assert [model.model for model in batch.models] == ["a", "b"]
    assert all(one.verdicts == (Scored(1.0), Scored(1.0)) for one in batch.groups)
    assert batch.capabilities == {"a": 3 / 6, "b": 4 / 6}
    assert [one.agent for one in batch.own("a")] == ["a"] * 3
    assert [one.agent for one in batch.peers("a")] == ["b"] * 3
    assert batch.wire_bytes > 500


def test_a_broken_stream_goes_on_at_the_next_entry(broker: FakeBroker, closed: Step) -> None:
    broker.break_after.extend([2, 0, 3])

    batch = closed.joint_batch()

    assert len(batch.groups) == 6
    assert [request.start_entry for request in broker.requests("StreamGroups")] == [0, 2, 2, 5]


def test_only_the_parts_asked_for_travel(broker: FakeBroker, closed: Step) -> None:

    texts = closed.joint_batch(parts=("text",))
    everything = closed.joint_batch()

    assert texts.groups[0].group.rollouts[0].text == "a0 0"
    assert texts.groups[0].group.rollouts[0].logprobs is None
    assert everything.groups[0].group.rollouts[0].logprobs is not None
    assert texts.wire_bytes < everything.wire_bytes
    with pytest.raises(InvalidRequestError, match=r"^parts must name some of text, tokens, logprobs, meta, "):
        closed.joint_batch(parts=())


def test_a_wait_for_a_batch_may_be_bounded(broker: FakeBroker, closed: Step) -> None:
    broker.ended = False

    with pytest.raises(TimeoutError, match=r"^The end of step 1 of pool math did not come within 0\.1 s\.$"):
        closed.joint_batch(timeout_seconds=0.1)


def test_a_delivery_that_never_goes_on_is_an_end(broker: FakeBroker, closed: Step) -> None:
    broker.on_manifest = lambda manifest: manifest.entries.append(manifest.entries[0])

    with pytest.raises(
        CountMismatchError,
        match=r"^Step 1 of pool math lists 7 groups; the broker delivered 6 of them and no more\.$",
    ):
        closed.joint_batch()


@pytest.mark.parametrize("tamper", ["body", "sum", "name", "generation", "entry", "verdicts"])
def test_a_delivery_that_is_not_what_the_manifest_lists_is_refused(
    broker: FakeBroker, closed: Step, tamper: str
) -> None:
    def change(delivered: pb.DeliveredGroup) -> None:
        match tamper:
            case "body":
                delivered.group.parts[0] = bytes(len(delivered.group.parts[0]))
            case "sum":
                delivered.group.envelope.rollouts[0].logprob_sum = -9.0
            case "name":
                delivered.group.name = delivered.group.name.replace("agents/a", "agents/c")
            case "generation":
                delivered.verdict.generation = 2
            case "entry":
                delivered.entry += 1
            case "verdicts":
                del delivered.verdict.verdicts[0]

    broker.on_delivery = change

    with pytest.raises((DigestMismatchError, CountMismatchError)):
        closed.joint_batch()


def test_a_broker_that_stays_away_ends_a_batch(broker: FakeBroker, target: str) -> None:
    broker.add_step(1)
    broker.fail["AwaitManifest"].extend([grpc.StatusCode.UNAVAILABLE] * 100)
    with connect(target, patience_seconds=0.2) as exchange:
        step = next(exchange.join("math", agent="a").steps())

        with pytest.raises(UnreachableError):
            step.joint_batch()
