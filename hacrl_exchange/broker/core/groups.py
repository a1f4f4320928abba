"""Decisions about groups: publish into a slot, make verdicts final. Reads only; constant time per group."""

from __future__ import annotations

import math
from typing import NoReturn

from hacrl_exchange.broker.core.deadlines import publish_deadline_us
from hacrl_exchange.broker.core.members import checked_member
from hacrl_exchange.broker.core.records import (
    GroupAccepted,
    PublishGroup,
    RecordVerdicts,
    VerdictsRecorded,
)
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.errors import (
    AlreadyVerifiedError,
    GroupNotFoundError,
    InvalidVerdictError,
    NotOnRosterError,
    SlotTakenError,
    StepClosedError,
    StepNotFoundError,
    StepRetiredError,
    UnknownPromptError,
    WrongGroupSizeError,
)
from hacrl_exchange.types import RosterState, Scored, StepState, Verdict


def decide_publish(state: PoolState, command: PublishGroup, *, now_us: int) -> GroupAccepted | None:
    """Puts a group into its slot. The same group again changes nothing, in a closed step too.

    An accepted group keeps its slot whatever happens later; so a repeat is answered before the questions
    whether the step still takes groups.

    Raises:
        NotJoinedError, SessionSupersededError: as `checked_member`.
        StepNotFoundError, StepRetiredError, StepClosedError: the step takes no groups (any more).
        NotOnRosterError, UnknownPromptError, WrongGroupSizeError: the group does not belong there.
        SlotTakenError: another group is in the slot.
    """
    checked_member(state, command.agent, session=command.session)
    step = state.open_steps.get(command.step)
    if step is None:
        _check_stored(state, command)
        return None
    roster_index = step.roster_index.get(command.agent)
    if roster_index is None:
        raise NotOnRosterError(
            f"Agent {command.agent} is not on the roster of step {step.step}: "
            "it takes part from the next step.",
            agent=command.agent,
            step=step.step,
        )
    prompt_index = step.prompt_index.get(command.prompt_id)
    if prompt_index is None:
        raise UnknownPromptError(
            f"Prompt {command.prompt_id} does not belong to step {step.step}: answer the step's prompts.",
            prompt_id=command.prompt_id,
            step=step.step,
        )
    if command.rollout_count != state.spec.group_size:
        raise WrongGroupSizeError(
            f"The group holds {command.rollout_count} rollouts, but groups of pool {state.pool} hold "
            f"{state.spec.group_size}.",
            rollout_count=command.rollout_count,
            group_size=state.spec.group_size,
            pool=state.pool,
        )
    taken = step.groups.get((prompt_index, roster_index))
    if taken is not None:
        return None if taken.digest == command.digest else _refuse_taken(command)
    publishing = step.state is StepState.PUBLISHING and step.roster_states[roster_index] is None
    if not publishing or now_us >= publish_deadline_us(step, state.spec.lockstep):
        _refuse_closed(command, step.roster_states[roster_index])
    return GroupAccepted(
        step=step.step,
        prompt_index=prompt_index,
        roster_index=roster_index,
        session=command.session,
        digest=command.digest,
        rollout_count=command.rollout_count,
        envelope=command.envelope,
    )


def decide_verdicts(state: PoolState, command: RecordVerdicts) -> VerdictsRecorded:
    """Makes verdicts final, once per group. A rollout succeeds at the pool's threshold.

    Raises:
        StepNotFoundError, StepClosedError: the step is not open; at closing its groups became final.
        GroupNotFoundError: the slot is empty.
        InvalidVerdictError: not one verdict per rollout, a number that is not finite, another verifier.
        AlreadyVerifiedError: the group has verdicts.
    """
    slot = {
        "step": command.step,
        "prompt_index": command.prompt_index,
        "roster_index": command.roster_index,
    }
    step = state.open_steps.get(command.step)
    if step is None:
        _check_exists(state, command.step)
        raise StepClosedError(
            f"Step {command.step} is closed and its outcomes are final: drop the report.", **slot
        )
    group = step.groups.get((command.prompt_index, command.roster_index))
    if group is None:
        raise GroupNotFoundError(
            f"Step {command.step} has no group at prompt {command.prompt_index}, "
            f"member {command.roster_index}: report the groups of your lease.",
            **slot,
        )
    _check_verdicts(state, command, rollout_count=group.rollout_count)
    if group.generation:
        raise AlreadyVerifiedError(
            f"The group at prompt {command.prompt_index}, member {command.roster_index} of "
            f"step {command.step} has its verdicts: drop the report.",
            **slot,
        )
    scores = [verdict.score for verdict in command.verdicts if isinstance(verdict, Scored)]
    threshold = state.spec.plan.success_threshold
    return VerdictsRecorded(
        step=command.step,
        prompt_index=command.prompt_index,
        roster_index=command.roster_index,
        generation=command.generation,
        verifier=command.verifier,
        worker=command.worker,
        verdicts=command.verdicts,
        details=command.details,
        success_count=sum(score >= threshold for score in scores),
        scored_count=len(scores),
    )


def _check_stored(state: PoolState, command: PublishGroup) -> None:
    """A publish into a step that is not open: right only if the slot already holds the same group."""
    _check_exists(state, command.step)
    if command.stored is not None and command.stored.digest == command.digest:
        return
    if command.stored is not None:
        _refuse_taken(command)
    if command.step <= state.retired_through:
        raise StepRetiredError(
            f"Step {command.step} was retired: go on with the next step.", step=command.step
        )
    _refuse_closed(command, None)


def _check_exists(state: PoolState, step: int) -> None:
    if not 1 <= step <= state.last_step:
        raise StepNotFoundError(
            f"Step {step} of pool {state.pool} was not opened: the newest is {state.last_step}.",
            step=step,
            pool=state.pool,
            last_step=state.last_step,
        )


def _check_verdicts(state: PoolState, command: RecordVerdicts, *, rollout_count: int) -> None:
    found = len(command.verdicts)
    if found != rollout_count:
        raise InvalidVerdictError(
            f"The report holds {found} verdicts for {rollout_count} rollouts: send one per rollout.",
            verdict_count=found,
            rollout_count=rollout_count,
        )
    if len(command.details) not in (0, rollout_count):
        raise InvalidVerdictError(
            f"The report holds {len(command.details)} details for {rollout_count} rollouts: "
            "send one per rollout, or none.",
            detail_count=len(command.details),
            rollout_count=rollout_count,
        )
    for rollout, verdict in enumerate(command.verdicts):
        if not _is_finite(verdict):
            raise InvalidVerdictError(
                f"A score or component of rollout {rollout} is not finite: report it as a verifier error.",
                rollout=rollout,
            )
    planned = state.spec.plan.verifiers[0].verifier
    if command.verifier is not None and command.verifier.verifier != planned:
        raise InvalidVerdictError(
            f"The verdicts are of verifier {command.verifier.verifier}, "
            f"but pool {state.pool} asks for {planned}.",
            verifier=command.verifier.verifier,
            planned=planned,
            pool=state.pool,
        )
    if command.generation != 1:
        raise InvalidVerdictError(
            f"The report is for generation {command.generation}, "
            "but the group is verified for the first time: report generation 1.",
            generation=command.generation,
        )


def _is_finite(verdict: Verdict) -> bool:
    if not isinstance(verdict, Scored):
        return True
    return math.isfinite(verdict.score) and all(math.isfinite(part) for part in verdict.components.values())


def _refuse_taken(command: PublishGroup) -> NoReturn:
    raise SlotTakenError(
        f"Agent {command.agent} already published another group for prompt {command.prompt_id} of step "
        f"{command.step}: fetch the stored group and go on with it.",
        agent=command.agent,
        prompt_id=command.prompt_id,
        step=command.step,
    )


def _refuse_closed(command: PublishGroup, roster_state: RosterState | None) -> NoReturn:
    left = roster_state is RosterState.LEFT
    why = f"Agent {command.agent} left and forfeited" if left else "Publishing has ended for"
    raise StepClosedError(
        f"{why} step {command.step}: go on with the next step.", agent=command.agent, step=command.step
    )
