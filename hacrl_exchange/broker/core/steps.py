"""Decisions about steps: open, end publishing, close, retire. Reads only; timers.py says when."""

from __future__ import annotations

from hacrl_exchange.broker.core.records import (
    CloseStep,
    EndPublishing,
    ExpiredGroup,
    ManifestEntry,
    OpenStep,
    PublishingEnded,
    RetireSteps,
    StepClosed,
    StepOpened,
    StepsRetired,
)
from hacrl_exchange.broker.core.state import OpenStep as OpenStepState
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.core.timers import (
    may_close,
    may_end_publishing,
    may_open,
    next_opening,
    retirable_through,
)
from hacrl_exchange.broker.core.window import extended_window, is_withheld, step_counts
from hacrl_exchange.errors import InvalidRequestError, PoolEndedError, StepNotFoundError
from hacrl_exchange.types import RosterEntry, RosterState, StepOutcome, StepState, UnscoredKind

FIRST_GENERATION = 1


def decide_open(state: PoolState, command: OpenStep) -> StepOpened | None:
    """Opens the next step for the members that are ACTIVE now. None: that step was opened before.

    Raises:
        PoolEndedError: the pool has no further step.
        InvalidRequestError: not due, or not the prompts that the schedule asks for.
    """
    if command.step <= state.last_step:
        return None
    if state.has_ended:
        raise PoolEndedError(
            f"Pool {state.pool} ended with step {state.last_step}: no further step opens.",
            pool=state.pool,
            last_step=state.last_step,
        )
    if not may_open(state):
        raise _not_due("open", command.step)
    opening = next_opening(state)
    expected = state.spec.lockstep.prompts_per_step
    if (command.step, command.epoch) != (opening.step, opening.epoch):
        raise InvalidRequestError(
            f"The next step is {opening.step} in epoch {opening.epoch}, "
            f"not {command.step} in {command.epoch}.",
            field="step",
            step=command.step,
            epoch=command.epoch,
        )
    if len(command.prompt_ids) != expected or len(set(command.prompt_ids)) != expected:
        raise InvalidRequestError(
            f"Step {command.step} needs {expected} different prompts, not {len(command.prompt_ids)}.",
            field="prompt_ids",
            step=command.step,
            expected=expected,
        )
    return StepOpened(command.step, command.epoch, command.prompt_ids, state.active_agents())


def decide_end_publishing(state: PoolState, command: EndPublishing, *, now_us: int) -> PublishingEnded | None:
    """Judges the members of a step. None: they were judged before.

    Raises:
        StepNotFoundError: the step was not opened.
        InvalidRequestError: not due.
    """
    step = _open_step(state, command.step)
    if step is None or step.state is StepState.VERIFYING:
        return None
    if not may_end_publishing(state, step, now_us=now_us):
        raise _not_due("end publishing of", command.step)
    return PublishingEnded(command.step, step.judged_roster())


def decide_close(state: PoolState, command: CloseStep, *, now_us: int) -> StepClosed | None:
    """Makes the step its manifest. None: it was closed before.

    Raises:
        StepNotFoundError: the step was not opened.
        InvalidRequestError: not due.
    """
    step = _open_step(state, command.step)
    if step is None:
        return None
    if not may_close(state, step, now_us=now_us):
        raise _not_due("close", command.step)
    complete = sum(member is RosterState.COMPLETE for member in step.roster_states)
    quorum_met = complete >= state.spec.lockstep.min_members
    if complete == len(step.roster):
        outcome = StepOutcome.COMPLETE
    else:
        outcome = StepOutcome.QUORUM if quorum_met else StepOutcome.DEGRADED
    kind = UnscoredKind.TIMEOUT if command.verifier_alive else UnscoredKind.UNSUPPORTED
    slots = sorted(step.groups)
    return StepClosed(
        step=step.step,
        outcome=outcome,
        quorum_met=quorum_met,
        roster=_roster_entries(state, step),
        entries=tuple(
            ManifestEntry(
                prompt_index=prompt_index,
                roster_index=roster_index,
                digest=step.groups[prompt_index, roster_index].digest,
                generation=step.groups[prompt_index, roster_index].generation or FIRST_GENERATION,
            )
            for prompt_index, roster_index in slots
        ),
        expired=tuple(
            ExpiredGroup(prompt_index, roster_index, kind)
            for prompt_index, roster_index in slots
            if not step.groups[prompt_index, roster_index].generation
        ),
    )


def decide_retire(state: PoolState, command: RetireSteps) -> StepsRetired | None:
    """Lets go of bodies. None: they are gone.

    Raises:
        InvalidRequestError: the pool keeps those steps.
    """
    if command.through_step <= state.retired_through:
        return None
    if command.through_step > retirable_through(state):
        raise _not_due("retire", command.through_step)
    return StepsRetired(command.through_step)


def _roster_entries(state: PoolState, step: OpenStepState) -> tuple[RosterEntry, ...]:
    entries = []
    for agent, judged, counts in zip(step.roster, step.judged_roster(), step_counts(step), strict=True):
        member = state.members[agent]
        entries.append(
            RosterEntry(
                agent=agent,
                principal=member.principal,
                state=judged,
                counts=extended_window(member.counts, counts, window=state.spec.capability_window),
                withheld=is_withheld(counts, max_unscored_share=state.spec.plan.max_unscored_share),
            )
        )
    return tuple(entries)


def _open_step(state: PoolState, number: int) -> OpenStepState | None:
    """The step, or None if it is closed."""
    if not 1 <= number <= state.last_step:
        raise StepNotFoundError(
            f"Step {number} of pool {state.pool} was not opened: the newest is {state.last_step}.",
            step=number,
            pool=state.pool,
            last_step=state.last_step,
        )
    return state.open_steps.get(number)


def _not_due(what: str, step: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"It is not time to {what} step {step}: ask timers.due.", field="step", step=step
    )
