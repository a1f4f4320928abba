"""The rules of a lockstep pool, one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from hacrl_exchange.broker.core import records as r
from hacrl_exchange.broker.core import spec, timers
from hacrl_exchange.broker.core.pool import decide, evolve
from hacrl_exchange.errors import (
    AgentTakenError,
    AlreadyVerifiedError,
    CorruptLogError,
    ExchangeError,
    GroupNotFoundError,
    InvalidRequestError,
    InvalidVerdictError,
    NotJoinedError,
    NotOnRosterError,
    PoolEndedError,
    PoolExistsError,
    PoolFullError,
    PoolNotFoundError,
    SessionSupersededError,
    SlotTakenError,
    StepClosedError,
    StepNotFoundError,
    StepRetiredError,
    UnknownPromptError,
    WrongGroupSizeError,
)
from hacrl_exchange.types import (
    MemberState,
    ModelSpec,
    PoolSpec,
    RosterState,
    Scored,
    StepCounts,
    StepOutcome,
    UnscoredKind,
    VerifierIdentity,
)

if TYPE_CHECKING:
    from tests.unit.core.conftest import World

MakeWorld = Callable[..., "World"]
MakeSpec = Callable[..., PoolSpec]


def refused(world: World, command: r.Command, error: type[ExchangeError], message: str) -> ExchangeError:
    """The command is refused with exactly this message and leaves no record."""
    before = len(world.records)
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        world.send(command)
    assert type(caught.value) is error
    assert len(world.records) == before
    return caught.value


def closings(world: World) -> list[r.StepClosed]:
    return [record.body for record in world.records if isinstance(record.body, r.StepClosed)]


# --- the pool itself ---


def test_a_pool_is_created_once_and_a_retry_finds_it_so(world: World) -> None:
    assert world.send(r.CreatePool("sums", world.state.spec, 6)) is None
    refused(
        world,
        r.CreatePool("sums", replace(world.state.spec, seed=8), 6),
        PoolExistsError,
        "Pool sums exists with another spec: pools are immutable, choose another name.",
    )


def test_without_a_pool_every_other_command_is_refused() -> None:
    with pytest.raises(PoolNotFoundError):
        decide(None, r.Touch("a", 1), now_us=1)


# --- members ---


def test_sessions_count_from_one_and_the_same_instance_finds_its_session_again(world: World) -> None:
    member = world.state.members["a"]
    again = r.Join("a", "local", member.instance, ModelSpec())
    assert (member.session, world.send(again)) == (1, None)
    assert world.join("a", instance="another life") == 2
    assert world.join("b") == 2


def test_an_older_session_can_do_nothing(world: World) -> None:
    old = world.publish_command("a", 0)
    world.join("a")
    message = "Session 1 of agent a was superseded by session 2: stop this process."
    for command in (old, r.Touch("a", 1), r.Leave("a", 1), r.Ack("a", 1, 0)):
        error = refused(world, command, SessionSupersededError, message)
        assert error.metadata == {"agent": "a", "pool": "sums", "session": "1", "newest_session": "2"}


def test_another_principal_cannot_take_an_agent(world: World) -> None:
    refused(
        world,
        r.Join("a", "mallory", "x", ModelSpec()),
        AgentTakenError,
        "The agent a of pool sums belongs to another principal: choose another name.",
    )


def test_a_full_pool_takes_no_new_agent_but_lets_its_members_come_back(world: World) -> None:
    for index in range(spec.MAX_MEMBERS - len(world.state.members)):
        world.join(f"m{index}")
    refused(
        world,
        r.Join("one-more", "local", "x", ModelSpec()),
        PoolFullError,
        "Pool sums has 1024 members, the most a pool may ever have: "
        "join as one of them, or make another pool.",
    )
    world.send(r.Leave("m0", 1))
    with pytest.raises(PoolFullError):
        world.send(r.Join("one-more", "local", "x", ModelSpec()))
    assert world.join("m0", instance="another life") == 2


@pytest.mark.parametrize(
    ("agent", "instance"), [("", "x"), ("A", "x"), ("a/b", "x"), ("a" * 64, "x"), ("a", "")]
)
def test_names_of_agents_and_instances_are_checked(world: World, agent: str, instance: str) -> None:
    with pytest.raises(InvalidRequestError):
        world.send(r.Join(agent, "local", instance, ModelSpec()))


@pytest.mark.parametrize(("agent", "session"), [("nobody", 1), ("a", 0), ("a", 2)])
def test_a_session_that_never_was_must_join(world: World, agent: str, session: int) -> None:
    refused(
        world,
        r.Touch(agent, session),
        NotJoinedError,
        f"Agent {agent} has no session {session} in pool sums: join the pool first.",
    )


def test_leaving_is_safe_to_retry_and_ends_the_session(world: World) -> None:
    assert world.send(r.Leave("a", 1)) == r.MemberLeft("a")
    assert world.send(r.Leave("a", 1)) is None
    refused(
        world,
        r.Touch("a", 1),
        NotJoinedError,
        "Agent a has no session 1 in pool sums: join the pool first.",
    )


def test_a_member_that_left_starts_a_new_session_even_with_its_old_instance(world: World) -> None:
    instance = world.state.members["a"].instance
    world.send(r.Leave("a", 1))
    assert world.join("a", instance=instance) == 2
    assert world.state.members["a"].state is MemberState.ACTIVE


def test_an_away_member_returns_by_any_call_or_by_joining_again(world: World) -> None:
    world.publish("a")
    world.advance(60)
    assert world.state.members["b"].state is MemberState.AWAY
    assert world.send(r.Touch("b", 1)) == r.MemberReturned("b")
    assert world.send(r.Touch("b", 1)) is None
    world.advance(200)
    member = world.state.members["a"]
    assert member.state is MemberState.AWAY
    assert world.send(r.Join("a", "local", member.instance, member.model)) == r.MemberReturned("a")
    assert (world.join("a", instance=member.instance), member.session) == (1, 1)


def test_acks_are_cumulative_and_only_for_closed_steps(world: World) -> None:
    refused(
        world,
        r.Ack("a", 1, 1),
        InvalidRequestError,
        "Step 1 is not closed: only closed steps can be acknowledged, and the newest is 0.",
    )
    for _ in range(2):
        world.publish("a")
        world.publish("b")
        world.judge_all()
    assert world.send(r.Ack("a", 1, 2)) == r.StepAcked("a", 2)
    assert world.send(r.Ack("a", 1, 1)) is None
    assert world.state.members["a"].acked_step == 2


# --- opening ---


def test_the_first_step_waits_for_min_members_and_a_later_one_for_anybody(make_world: MakeWorld) -> None:
    world = make_world()
    world.join("b")
    assert world.state.last_step == 0
    world.join("a")
    assert world.state.open_steps[1].roster == ("a", "b")
    world.publish("a")
    world.publish("b")
    world.send(r.Leave("b", 1))
    world.judge_all()
    assert world.state.open_steps[2].roster == ("a",)


def test_no_step_opens_without_an_active_member(world: World) -> None:
    world.advance(1000)
    assert (world.state.open_steps, world.state.last_step) == ({}, 1)
    assert timers.wake_us(world.state) is None
    world.send(r.Touch("a", 1))
    world.settle()
    assert world.state.open_steps[2].roster == ("a",)


def test_joiners_take_part_from_the_next_step(world: World) -> None:
    world.join("c")
    command = replace(world.publish_command("a", 0), agent="c")
    refused(
        world,
        command,
        NotOnRosterError,
        "Agent c is not on the roster of step 1: it takes part from the next step.",
    )
    world.publish("a")
    world.publish("b")
    world.judge_all()
    assert world.state.open_steps[2].roster == ("a", "b", "c")


def test_max_open_steps_may_overlap_and_max_steps_ends_the_pool(
    make_world: MakeWorld, make_spec: MakeSpec
) -> None:
    world = make_world(make_spec(max_open_steps=2, max_steps=3))
    world.join("a")
    world.join("b")
    assert list(world.state.open_steps) == [1, 2]
    world.advance(90)
    world.send(r.Touch("a", 1))
    world.settle()
    assert list(world.state.open_steps) == [3]
    assert world.state.has_ended
    world.advance(90)
    refused(
        world,
        r.OpenStep(4, 0, ("p0", "p1")),
        PoolEndedError,
        "Pool sums ended with step 3: no further step opens.",
    )


def test_steps_close_in_order(make_world: MakeWorld, make_spec: MakeSpec) -> None:
    world = make_world(make_spec(max_open_steps=2))
    world.join("a")
    world.join("b")
    world.publish("a", step=2)
    world.publish("b", step=2)
    world.judge_all(step=2)
    assert sorted(world.state.open_steps) == [1, 2]
    refused(
        world,
        r.CloseStep(2, True),
        InvalidRequestError,
        "It is not time to close step 2: ask timers.due.",
    )
    world.advance(60)
    assert [closed.step for closed in closings(world)] == [1, 2]


def test_a_step_opens_only_when_due_and_with_the_prompts_of_the_schedule(make_world: MakeWorld) -> None:
    world = make_world()
    world.send(r.Join("a", "local", "1", ModelSpec()))
    refused(
        world,
        r.OpenStep(1, 0, ("p0", "p1")),
        InvalidRequestError,
        "It is not time to open step 1: ask timers.due.",
    )
    world.send(r.Join("b", "local", "1", ModelSpec()))
    assert timers.due(world.state, now_us=world.now_us) == timers.OpenDue(1, 0, 0)
    refused(
        world,
        r.OpenStep(2, 0, ("p0", "p1")),
        InvalidRequestError,
        "The next step is 1 in epoch 0, not 2 in 0.",
    )
    refused(
        world,
        r.OpenStep(1, 0, ("p0", "p0")),
        InvalidRequestError,
        "Step 1 needs 2 different prompts, not 2.",
    )
    world.settle()
    assert world.send(r.OpenStep(1, 0, ("p0", "p1"))) is None


# --- publishing ---


def test_the_same_group_again_changes_nothing_and_another_is_refused(world: World) -> None:
    command = world.publish_command("a", 0)
    assert isinstance(world.send(command), r.GroupAccepted)
    assert world.send(command) is None
    message = (
        f"Agent a already published another group for prompt {command.prompt_id} of step 1: "
        "fetch the stored group and go on with it."
    )
    refused(world, replace(command, digest=b"other"), SlotTakenError, message)
    world.advance(60)
    assert world.state.open_steps[1].publishing_end_time_us
    assert world.send(command) is None
    refused(world, replace(command, digest=b"other"), SlotTakenError, message)


def test_a_group_must_belong_to_the_step_and_have_the_right_size(world: World) -> None:
    command = world.publish_command("a", 0)
    refused(
        world,
        replace(command, prompt_id="p-none"),
        UnknownPromptError,
        "Prompt p-none does not belong to step 1: answer the step's prompts.",
    )
    refused(
        world,
        replace(command, rollout_count=3),
        WrongGroupSizeError,
        "The group holds 3 rollouts, but groups of pool sums hold 2.",
    )
    for step in (0, 2):
        refused(
            world,
            replace(command, step=step),
            StepNotFoundError,
            f"Step {step} of pool sums was not opened: the newest is 1.",
        )


def test_a_publish_after_the_deadline_is_refused_before_the_broker_noticed(world: World) -> None:
    command = world.publish_command("a", 0)
    world.now_us = timers.wake_us(world.state) or 0
    refused(world, command, StepClosedError, "Publishing has ended for step 1: go on with the next step.")
    world.now_us -= 1
    assert isinstance(world.send(command), r.GroupAccepted)


def test_a_clock_before_the_last_record_counts_as_the_last_record(world: World) -> None:
    world.now_us = 1
    world.publish("a", 0)
    assert world.records[-1].time_us == world.records[-2].time_us


def test_a_closed_step_answers_from_what_the_log_found(make_world: MakeWorld, make_spec: MakeSpec) -> None:
    world = make_world(make_spec(retained_steps=1))
    world.join("a")
    world.join("b")
    command = world.publish_command("a", 0)
    world.publish("a")
    world.advance(100)
    found = r.StoredGroup(command.digest, 1, 2)
    assert world.send(replace(command, stored=found)) is None
    with pytest.raises(SlotTakenError):
        world.send(replace(command, digest=b"other", stored=found))
    refused(world, command, StepClosedError, "Publishing has ended for step 1: go on with the next step.")
    world.send(r.Ack("a", 1, 1))
    for _ in range(3):
        world.publish("a")
        world.judge_all()
    assert world.state.retired_through >= 1
    refused(world, command, StepRetiredError, "Step 1 was retired: go on with the next step.")


def test_leaving_forfeits_the_open_slots_of_the_step_for_later_sessions_too(world: World) -> None:
    world.publish("a", 0)
    world.send(r.Leave("a", 1))
    world.join("a")
    command = world.publish_command("a", 1)
    refused(
        world,
        command,
        StepClosedError,
        "Agent a left and forfeited step 1: go on with the next step.",
    )
    world.publish("b")
    world.judge_all()
    (closed,) = closings(world)
    assert [entry.state for entry in closed.roster] == [RosterState.LEFT, RosterState.COMPLETE]
    assert (closed.outcome, closed.quorum_met, len(closed.entries)) == (StepOutcome.DEGRADED, False, 3)


def test_a_member_that_completes_and_leaves_is_complete(world: World) -> None:
    world.publish("a")
    world.send(r.Leave("a", 1))
    world.publish("b")
    world.judge_all()
    assert closings(world)[0].outcome is StepOutcome.COMPLETE


def test_a_superseding_session_goes_on_with_what_is_committed(world: World) -> None:
    world.publish("a", 0)
    world.join("a")
    assert world.state.open_steps[1].committed("a") == (world.state.open_steps[1].prompt_ids[0],)
    world.publish("a", 1)
    world.publish("b")
    world.judge_all()
    assert closings(world)[0].outcome is StepOutcome.COMPLETE


# --- the end of publishing ---


def test_late_members_are_away_and_nobody_waits_for_them(world: World) -> None:
    world.publish("a")
    world.publish("b", 0)
    world.advance(60)
    step = world.state.open_steps[1]
    assert step.roster_states == (RosterState.COMPLETE, RosterState.LATE)
    assert world.state.members["b"].state is MemberState.AWAY
    world.judge_all()
    assert world.state.open_steps[2].roster == ("a",)
    assert [(e.prompt_index, e.roster_index) for e in closings(world)[0].entries] == [(0, 0), (0, 1), (1, 0)]


def test_a_late_member_that_left_after_being_judged_stays_left(
    make_world: MakeWorld, make_spec: MakeSpec
) -> None:
    world = make_world(make_spec(max_open_steps=2))
    world.join("a")
    world.join("b")
    world.send(r.Leave("b", 1))
    world.advance(60)
    assert world.state.members["b"].state is MemberState.LEFT


def test_publishing_ends_once_and_only_when_due(world: World) -> None:
    refused(
        world,
        r.EndPublishing(1),
        InvalidRequestError,
        "It is not time to end publishing of step 1: ask timers.due.",
    )
    world.publish("a")
    world.publish("b")
    assert world.send(r.EndPublishing(1)) is None
    with pytest.raises(StepNotFoundError):
        world.send(r.EndPublishing(2))


# --- verdicts and closing ---


@pytest.mark.parametrize(
    ("complete", "members", "outcome", "quorum_met"),
    [
        (3, 3, StepOutcome.COMPLETE, True),
        (2, 3, StepOutcome.QUORUM, True),
        (1, 3, StepOutcome.DEGRADED, False),
        (0, 3, StepOutcome.DEGRADED, False),
    ],
)
def test_the_outcome_says_who_completed(
    make_world: MakeWorld, complete: int, members: int, outcome: StepOutcome, quorum_met: bool
) -> None:
    world = make_world()
    agents = [f"a{index}" for index in range(members)]
    for agent in agents:
        world.send(r.Join(agent, "local", "1", ModelSpec()))
    world.settle()
    for agent in agents[:complete]:
        world.publish(agent)
    world.advance(60)
    if world.state.open_steps.get(1):
        world.judge_all(step=1)
    closed = closings(world)[0]
    assert (closed.outcome, closed.quorum_met) == (outcome, quorum_met)


@pytest.mark.parametrize(
    ("verifier_alive", "kind"), [(True, UnscoredKind.TIMEOUT), (False, UnscoredKind.UNSUPPORTED)]
)
def test_what_nobody_judged_expires_at_the_verify_deadline(
    world: World, verifier_alive: bool, kind: UnscoredKind
) -> None:
    world.publish("a")
    world.publish("b")
    world.judge(0, 0, 1.0, 0.0)
    world.advance(29.999, verifier_alive=verifier_alive)
    assert not closings(world)
    world.advance(0.001, verifier_alive=verifier_alive)
    (closed,) = closings(world)
    expired = tuple(r.ExpiredGroup(prompt, member, kind) for prompt, member in [(0, 1), (1, 0), (1, 1)])
    assert closed.expired == expired
    assert [entry.generation for entry in closed.entries] == [1, 1, 1, 1]
    state = world.state
    assert (state.accepted_count, state.scored_count, state.unscored_count) == (8, 2, 6)
    assert state.pending_count == 0
    with pytest.raises(
        StepClosedError, match=r"^Step 1 is closed and its outcomes are final: drop the report\.$"
    ):
        world.judge(0, 1, 1.0, 1.0, step=1)


def test_a_step_without_groups_closes(world: World) -> None:
    world.advance(60)
    (closed,) = closings(world)
    assert (closed.entries, closed.outcome) == ((), StepOutcome.DEGRADED)


def test_verification_begins_before_publishing_ends(world: World) -> None:
    world.publish("a", 0)
    assert isinstance(world.judge(0, 0, 1.0, 1.0), r.VerdictsRecorded)


def test_a_report_is_for_a_group_that_waits_for_it(world: World) -> None:
    world.publish("a", 0)
    with pytest.raises(
        GroupNotFoundError,
        match=r"^Step 1 has no group at prompt 1, member 0: report the groups of your lease\.$",
    ):
        world.judge(1, 0, 1.0, 1.0)
    world.judge(0, 0, 1.0, 1.0)
    with pytest.raises(
        AlreadyVerifiedError,
        match=r"^The group at prompt 0, member 0 of step 1 has its verdicts: drop the report\.$",
    ):
        world.judge(0, 0, 0.0, 0.0)
    with pytest.raises(StepNotFoundError):
        world.judge(0, 0, 0.0, 0.0, step=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"verdicts": (Scored(1.0),)},
            "The report holds 1 verdicts for 2 rollouts: send one per rollout.",
        ),
        (
            {"details": ("x",)},
            "The report holds 1 details for 2 rollouts: send one per rollout, or none.",
        ),
        (
            {"verdicts": (Scored(1.0), Scored(math.nan))},
            "A score or component of rollout 1 is not finite: report it as a verifier error.",
        ),
        (
            {"verdicts": (Scored(1.0, {"style": math.inf}), Scored(1.0))},
            "A score or component of rollout 0 is not finite: report it as a verifier error.",
        ),
        (
            {"verifier": VerifierIdentity("other", "1", b"")},
            "The verdicts are of verifier other, but pool sums asks for exact_match.",
        ),
        (
            {"generation": 2},
            "The report is for generation 2, but the group is verified for the first time: "
            "report generation 1.",
        ),
    ],
)
def test_a_malformed_report_is_refused(world: World, change: dict[str, object], message: str) -> None:
    world.publish("a", 0)
    command = r.RecordVerdicts(
        1, 0, 0, 1, VerifierIdentity("exact_match", "1", b""), "w", (Scored(1.0), Scored(0.0))
    )
    refused(
        world,
        replace(command, **change),  # type: ignore[arg-type]  # named and typed by the table
        InvalidVerdictError,
        message,
    )
    assert isinstance(world.send(command), r.VerdictsRecorded)


def test_success_is_the_threshold_of_the_pool(make_world: MakeWorld, make_spec: MakeSpec) -> None:
    spec = make_spec()
    world = make_world(replace(spec, plan=replace(spec.plan, success_threshold=0.5)))
    world.join("a")
    world.join("b")
    world.publish("a", 0)
    body = world.judge(0, 0, 0.5, 0.49)
    assert isinstance(body, r.VerdictsRecorded)
    assert (body.success_count, body.scored_count) == (1, 2)


def test_closing_counts_every_member_and_keeps_its_window(world: World) -> None:
    for scores in [(1.0, 0.0), (None, 1.0), (None, None), (1.0, 1.0)]:
        world.publish("a")
        world.publish("b")
        world.judge_all(*scores)
    listed = closings(world)[2].roster[0]
    assert listed.counts == (StepCounts(1, 2, 4, 4), StepCounts(2, 2, 2, 4), StepCounts(3, 0, 0, 4))
    assert [entry.withheld for closed in closings(world) for entry in closed.roster[:1]] == [
        False,
        True,
        True,
        False,
    ]
    assert world.state.members["a"].counts == (
        StepCounts(1, 2, 4, 4),
        StepCounts(2, 2, 2, 4),
        StepCounts(4, 4, 4, 4),
    )


# --- retention ---


def test_retained_steps_stay_and_unacked_ones_twice_as_long(
    make_world: MakeWorld, make_spec: MakeSpec
) -> None:
    world = make_world(make_spec(retained_steps=2))
    world.join("a")
    world.join("b")

    def close_one() -> int:
        world.publish("a")
        world.publish("b")
        world.judge_all()
        return world.state.retired_through

    assert [close_one() for _ in range(6)] == [0, 0, 0, 0, 1, 2]
    world.send(r.Ack("a", 1, 6))
    world.settle()
    assert world.state.retired_through == 2
    world.send(r.Ack("b", 1, 3))
    world.settle()
    assert world.state.retired_through == 3
    world.send(r.Leave("b", 1))
    world.settle()
    assert world.state.retired_through == 4
    refused(world, r.RetireSteps(5), InvalidRequestError, "It is not time to retire step 5: ask timers.due.")
    assert world.send(r.RetireSteps(4)) is None


# --- the fold ---


def test_a_record_that_cannot_be_there_is_a_corrupt_log(world: World) -> None:
    time_us = world.state.last_time_us
    impossible: list[r.RecordBody] = [
        r.PoolCreated("sums", world.state.spec, 6),
        r.MemberReturned("a"),
        r.MemberLeft("nobody"),
        r.VerdictsRecorded(1, 0, 0, 1, None, "", (), (), 0, 0),
        r.StepClosed(1, StepOutcome.COMPLETE, True, (), (), ()),
        r.PublishingEnded(9, ()),
    ]
    for body in impossible:
        with pytest.raises(CorruptLogError):
            evolve(world.state, r.Record(time_us, body))
    with pytest.raises(CorruptLogError, match=r"its time is before that of the record before it"):
        evolve(world.state, r.Record(time_us - 1, r.MemberLeft("a")))
    with pytest.raises(CorruptLogError, match=r"the log of a pool begins with PoolCreated"):
        evolve(None, r.Record(1, r.MemberLeft("a")))
