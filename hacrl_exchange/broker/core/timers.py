"""What a pool would do by itself now, and when to ask again.

The service asks `due` after every record and at `wake_us`, turns the answer into a command, and asks again
until nothing is due. So no step stays open for longer than its two timeouts after opening.

Now is the service's: the time of the last record plus what a monotonic clock measured since, never less than
the last record. After a restart a deadline then neither fires early nor waits longer than its duration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hacrl_exchange.broker.core.deadlines import publish_deadline_us, verify_deadline_us
from hacrl_exchange.broker.core.schedule import step_position
from hacrl_exchange.broker.core.state import OpenStep, PoolState
from hacrl_exchange.types import MemberState, StepState


@dataclass(frozen=True, slots=True)
class OpenDue:
    """A step may open, with `prompts_per_step` prompts of the epoch's order from the offset on."""

    step: int
    epoch: int
    offset: int


@dataclass(frozen=True, slots=True)
class EndPublishingDue:
    """Everybody is done with a step, or its publish deadline passed."""

    step: int


@dataclass(frozen=True, slots=True)
class CloseDue:
    """All groups of a step are judged, or its verify deadline passed; steps close in order."""

    step: int


@dataclass(frozen=True, slots=True)
class RetireDue:
    """Bodies of all steps up to this one may go."""

    through_step: int


Due: TypeAlias = OpenDue | EndPublishingDue | CloseDue | RetireDue


def due(state: PoolState, *, now_us: int) -> Due | None:
    """What is due first: close, then end publishing, then open, then retire. None: nothing before wake_us."""
    oldest = min(state.open_steps, default=None)
    if oldest is not None and may_close(state, state.open_steps[oldest], now_us=now_us):
        return CloseDue(oldest)
    for step in state.steps_in_order():
        if may_end_publishing(state, step, now_us=now_us):
            return EndPublishingDue(step.step)
    if may_open(state):
        return next_opening(state)
    through_step = retirable_through(state)
    return RetireDue(through_step) if through_step > state.retired_through else None


def wake_us(state: PoolState) -> int | None:
    """The next moment at which something is due though no record came. None: only a record changes that."""
    lockstep = state.spec.lockstep
    times = [
        publish_deadline_us(step, lockstep)
        for step in state.open_steps.values()
        if step.state is StepState.PUBLISHING
    ]
    oldest = state.open_steps.get(min(state.open_steps, default=0))
    if oldest is not None and oldest.state is StepState.VERIFYING:
        times.append(verify_deadline_us(oldest, lockstep))
    return min(times, default=None)


def may_open(state: PoolState) -> bool:
    """The first step waits for `min_members` ACTIVE members, a later one for any; both for room."""
    lockstep = state.spec.lockstep
    if state.has_ended or len(state.open_steps) >= lockstep.max_open_steps:
        return False
    needed = 1 if state.last_step else lockstep.min_members
    active = sum(member.state is MemberState.ACTIVE for member in state.members.values())
    return active >= needed


def next_opening(state: PoolState) -> OpenDue:
    """The next step and its place in the schedule."""
    step = state.last_step + 1
    epoch, offset = step_position(
        step, prompt_count=state.prompt_count, prompts_per_step=state.spec.lockstep.prompts_per_step
    )
    return OpenDue(step, epoch, offset)


def may_end_publishing(state: PoolState, step: OpenStep, *, now_us: int) -> bool:
    """Everybody is complete or has left, or the deadline passed."""
    if step.state is not StepState.PUBLISHING:
        return False
    return step.is_decided or now_us >= publish_deadline_us(step, state.spec.lockstep)


def may_close(state: PoolState, step: OpenStep, *, now_us: int) -> bool:
    """Publishing ended, older steps are closed, and all is judged or the deadline passed.

    Closing in order keeps capability windows, manifests and retention in order of their numbers. No step
    waits beyond its opening plus both timeouts: the older one opened earlier, and so that holds for it too.
    """
    if step.state is not StepState.VERIFYING or step.step != min(state.open_steps):
        return False
    return step.pending_group_count == 0 or now_us >= verify_deadline_us(step, state.spec.lockstep)


def retirable_through(state: PoolState) -> int:
    """The newest step whose bodies may go; at most what is retired already if nothing new may.

    `retained_steps` closed steps stay. Those before them stay too while an ACTIVE member has not acked them,
    whether or not it was on their rosters, but never more than `retained_steps` of them: a member that does
    not ack cannot fill the disk.
    """
    retained = state.spec.retained_steps
    if not retained:
        return state.retired_through
    unneeded = state.closed_through - retained
    acked = min(
        (member.acked_step for member in state.members.values() if member.state is MemberState.ACTIVE),
        default=unneeded,
    )
    return max(min(unneeded, acked), unneeded - retained, state.retired_through)
