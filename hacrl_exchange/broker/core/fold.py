"""The fold: applies what was decided. The only code that changes a PoolState; it never decides again.

Nothing here asks the clock, a timeout or a rule that a later version may change. The order of records is
the order of everything.
"""

from __future__ import annotations

from dataclasses import replace

from hacrl_exchange.broker.core.records import (
    GroupAccepted,
    MemberJoined,
    MemberLeft,
    MemberReturned,
    PoolCreated,
    PublishingEnded,
    Record,
    StepAcked,
    StepClosed,
    StepOpened,
    StepsRetired,
    VerdictsRecorded,
)
from hacrl_exchange.broker.core.state import GroupState, Member, OpenStep, PoolState
from hacrl_exchange.broker.core.transitions import GROUP, MEMBER, STEP, moved
from hacrl_exchange.broker.core.window import scored_steps
from hacrl_exchange.errors import CorruptLogError
from hacrl_exchange.types import RosterState


def evolve(state: PoolState | None, record: Record) -> PoolState:
    """The state after a record: a new one for PoolCreated, else the same object, changed.

    Raises:
        CorruptLogError: the record cannot follow the ones before it. The state is unusable then.
    """
    body = record.body
    if state is None:
        if not isinstance(body, PoolCreated):
            raise _corrupt(record, "the log of a pool begins with PoolCreated")
        return PoolState(body.pool, body.spec, body.prompt_count, record.time_us, record.time_us)
    if record.time_us < state.last_time_us:
        raise _corrupt(record, "its time is before that of the record before it")
    try:
        _apply(state, record)
    except (KeyError, IndexError, ValueError) as error:
        raise _corrupt(record, "it names a thing that does not exist") from error
    state.last_time_us = record.time_us
    return state


def _apply(state: PoolState, record: Record) -> None:
    match record.body:
        case GroupAccepted() as body:
            _accept_group(state, body)
        case VerdictsRecorded() as body:
            _record_verdicts(state, body)
        case MemberJoined() as body:
            _join(state, body)
        case MemberReturned() as body:
            member = state.members[body.agent]
            member.state = moved(MEMBER, member.state, body)
        case MemberLeft() as body:
            _leave(state, body)
        case StepOpened() as body:
            moved(STEP, None, body)
            state.open_steps[body.step] = OpenStep(
                body.step, body.epoch, body.prompt_ids, body.roster, record.time_us
            )
            state.last_step = body.step
        case PublishingEnded() as body:
            _end_publishing(state, body, time_us=record.time_us)
        case StepClosed() as body:
            _close(state, body)
        case StepAcked() as body:
            state.members[body.agent].acked_step = body.step
        case StepsRetired() as body:
            state.retired_through = body.through_step
        case PoolCreated():
            raise _corrupt(record, "the pool exists")


def _accept_group(state: PoolState, body: GroupAccepted) -> None:
    step = state.open_steps[body.step]
    slot = (body.prompt_index, body.roster_index)
    taken = step.groups.get(slot)
    moved(GROUP, taken.phase if taken else None, body)
    step.groups[slot] = GroupState(body.session, body.digest, body.rollout_count)
    step.pending_group_count += 1
    step.accepted_by_member[body.roster_index] += 1
    if step.accepted_by_member[body.roster_index] == len(step.prompt_ids):
        _set_roster_state(step, body.roster_index, RosterState.COMPLETE)
    state.accepted_count += body.rollout_count


def _record_verdicts(state: PoolState, body: VerdictsRecorded) -> None:
    step = state.open_steps[body.step]
    slot = (body.prompt_index, body.roster_index)
    group = step.groups[slot]
    moved(GROUP, group.phase, body)
    step.groups[slot] = replace(
        group,
        generation=body.generation,
        success_count=body.success_count,
        scored_count=body.scored_count,
    )
    step.pending_group_count -= 1
    state.scored_count += body.scored_count
    state.unscored_count += group.rollout_count - body.scored_count


def _join(state: PoolState, body: MemberJoined) -> None:
    member = state.members.get(body.agent)
    after = moved(MEMBER, member.state if member else None, body)
    if member is None:
        state.members[body.agent] = Member(
            body.agent, body.principal, body.session, body.instance, body.model, after
        )
        return
    member.session = body.session
    member.instance = body.instance
    member.model = body.model
    member.state = after


def _leave(state: PoolState, body: MemberLeft) -> None:
    """Forfeits what is open in every step that still publishes; a complete member stays complete."""
    member = state.members[body.agent]
    member.state = moved(MEMBER, member.state, body)
    for step in state.open_steps.values():
        roster_index = step.roster_index.get(body.agent)
        if roster_index is not None and step.roster_states[roster_index] is None:
            _set_roster_state(step, roster_index, RosterState.LEFT)


def _end_publishing(state: PoolState, body: PublishingEnded, *, time_us: int) -> None:
    step = state.open_steps[body.step]
    moved(STEP, step.state, body)
    step.roster_states = body.roster_states
    step.publishing_end_time_us = time_us
    for agent, judged in zip(step.roster, body.roster_states, strict=True):
        if judged is RosterState.LATE:
            member = state.members[agent]
            member.state = moved(MEMBER, member.state, body)


def _close(state: PoolState, body: StepClosed) -> None:
    step = state.open_steps[body.step]
    moved(STEP, step.state, body)
    for expired in body.expired:
        group = step.groups[expired.prompt_index, expired.roster_index]
        moved(GROUP, group.phase, body)
        state.unscored_count += group.rollout_count
    for entry in body.roster:
        state.members[entry.agent].counts = scored_steps(entry.counts)
    del state.open_steps[body.step]


def _set_roster_state(step: OpenStep, roster_index: int, judged: RosterState) -> None:
    before, after = step.roster_states[:roster_index], step.roster_states[roster_index + 1 :]
    step.roster_states = (*before, judged, *after)


def _corrupt(record: Record, why: str) -> CorruptLogError:
    name = type(record.body).__name__
    return CorruptLogError(
        f"The log holds a {name} that cannot be there: {why}. Run hacrl audit, and restore the data folder "
        "from a backup.",
        record=name,
        why=why,
    )
