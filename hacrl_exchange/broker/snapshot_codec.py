"""Snapshots as bytes: a pool's fold in its canonical form."""

from __future__ import annotations

from hacrl_exchange._pb import pool_pb2
from hacrl_exchange._pb import records_pb2 as pb
from hacrl_exchange.broker.core.state import GroupState, Member, OpenStep, PoolState
from hacrl_exchange.broker.log_wire import known, parsed, roster_state_to_proto, unreadable
from hacrl_exchange.codec import (
    model_spec_from_proto,
    model_spec_to_proto,
    pool_spec_from_proto,
    pool_spec_to_proto,
    step_counts_from_proto,
    step_counts_to_proto,
)
from hacrl_exchange.errors import CorruptLogError, ExchangeError
from hacrl_exchange.types import MemberState, RosterState


def snapshot_to_bytes(state: PoolState) -> bytes:
    """A fold in canonical bytes: equal states give equal bytes, whatever order they grew in."""
    wire = pb.PoolSnapshot(
        pool=state.pool,
        spec=pool_spec_to_proto(state.spec),
        prompt_count=state.prompt_count,
        create_time_us=state.create_time_us,
        last_time_us=state.last_time_us,
        members=[_member_to_proto(state.members[agent]) for agent in sorted(state.members)],
        open_steps=[_step_to_proto(state.open_steps[step]) for step in sorted(state.open_steps)],
        last_step=state.last_step,
        retired_through=state.retired_through,
        accepted_count=state.accepted_count,
        scored_count=state.scored_count,
        unscored_count=state.unscored_count,
    )
    return wire.SerializeToString(deterministic=True)


def snapshot_from_bytes(payload: bytes) -> PoolState:
    """The fold in these bytes.

    Raises:
        CorruptLogError: they are not a snapshot that this version can read.
    """
    wire = parsed(pb.PoolSnapshot, payload)
    try:
        return PoolState(
            pool=wire.pool,
            spec=pool_spec_from_proto(wire.spec),
            prompt_count=wire.prompt_count,
            create_time_us=wire.create_time_us,
            last_time_us=wire.last_time_us,
            members={member.agent: _member_from_proto(member) for member in wire.members},
            open_steps={step.step: _step_from_proto(step) for step in wire.open_steps},
            last_step=wire.last_step,
            retired_through=wire.retired_through,
            accepted_count=wire.accepted_count,
            scored_count=wire.scored_count,
            unscored_count=wire.unscored_count,
        )
    except CorruptLogError:
        raise
    except ExchangeError as error:
        raise unreadable(str(error)) from error


def _member_to_proto(member: Member) -> pb.MemberSnapshot:
    return pb.MemberSnapshot(
        agent=member.agent,
        principal=member.principal,
        session=member.session,
        instance=member.instance,
        model=model_spec_to_proto(member.model),
        state=pool_pb2.MemberState.ValueType(member.state.value),
        acked_step=member.acked_step,
        counts=[step_counts_to_proto(counts) for counts in member.counts],
    )


def _member_from_proto(wire: pb.MemberSnapshot) -> Member:
    return Member(
        agent=wire.agent,
        principal=wire.principal,
        session=wire.session,
        instance=wire.instance,
        model=model_spec_from_proto(wire.model),
        state=known(MemberState, wire.state),
        acked_step=wire.acked_step,
        counts=tuple(step_counts_from_proto(counts) for counts in wire.counts),
    )


def _step_to_proto(step: OpenStep) -> pb.StepSnapshot:
    return pb.StepSnapshot(
        step=step.step,
        epoch=step.epoch,
        prompt_ids=step.prompt_ids,
        roster=step.roster,
        open_time_us=step.open_time_us,
        publishing_end_time_us=step.publishing_end_time_us,
        roster_states=[roster_state_to_proto(state) for state in step.roster_states],
        groups=[_group_to_proto(slot, step.groups[slot]) for slot in sorted(step.groups)],
    )


def _step_from_proto(wire: pb.StepSnapshot) -> OpenStep:
    return OpenStep(
        step=wire.step,
        epoch=wire.epoch,
        prompt_ids=tuple(wire.prompt_ids),
        roster=tuple(wire.roster),
        open_time_us=wire.open_time_us,
        publishing_end_time_us=wire.publishing_end_time_us,
        roster_states=tuple(known(RosterState, state) if state else None for state in wire.roster_states),
        groups={(group.prompt_index, group.roster_index): _group_from_proto(group) for group in wire.groups},
    )


def _group_to_proto(slot: tuple[int, int], group: GroupState) -> pb.GroupSnapshot:
    return pb.GroupSnapshot(
        prompt_index=slot[0],
        roster_index=slot[1],
        session=group.session,
        digest=group.digest,
        rollout_count=group.rollout_count,
        generation=group.generation,
        success_count=group.success_count,
        scored_count=group.scored_count,
    )


def _group_from_proto(wire: pb.GroupSnapshot) -> GroupState:
    return GroupState(
        wire.session,
        wire.digest,
        wire.rollout_count,
        wire.generation,
        wire.success_count,
        wire.scored_count,
    )
