"""Small messages as dataclasses and back: pools, prompts, members, verdicts, receipts, durations.

On the way in, an unset field becomes the dataclass's default. A verdict that this version cannot read is
unscored, never a number; any other enum value that it cannot read is refused.
"""

from __future__ import annotations

import enum
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from hacrl_exchange._pb import pool_pb2, prompt_pb2, rollout_pb2, step_pb2, verdict_pb2
from hacrl_exchange.codec.names import (
    group_name,
    parse_group_name,
    parse_prompt_set_name,
    prompt_set_name,
)
from hacrl_exchange.errors import InvalidPoolError, InvalidRequestError, UnsupportedEncodingError
from hacrl_exchange.types import (
    Lockstep,
    Message,
    ModelSpec,
    PoolSpec,
    Prompt,
    PromptEntry,
    Receipt,
    RevealRule,
    RosterEntry,
    RosterState,
    Scored,
    StepCounts,
    Unscored,
    UnscoredKind,
    Verdict,
    VerdictReason,
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

_Enum = TypeVar("_Enum", bound=enum.Enum)
_NANOS = 1_000_000_000
_MAX_DURATION_SECONDS = 315_576_000_000


def enum_from_proto(kind: type[_Enum], value: int) -> _Enum:
    """The member of `kind` with this wire value.

    Raises:
        UnsupportedEncodingError: there is none: unset, or from a newer peer.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise UnsupportedEncodingError(
            f"{kind.__name__} {value} is unknown to this version; upgrade hacrl-exchange.",
            enum=kind.__name__,
            value=value,
        ) from error


def duration_to_proto(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond. Clamped to what a Duration can say (10,000 years)."""
    clamped = min(max(seconds, -float(_MAX_DURATION_SECONDS)), float(_MAX_DURATION_SECONDS))
    whole = int(clamped)
    nanos = round((clamped - whole) * _NANOS)
    if abs(nanos) == _NANOS:
        whole, nanos = whole + nanos // _NANOS, 0
    return Duration(seconds=whole, nanos=nanos)


def timestamp_to_proto(time_us: int) -> Timestamp:
    """Microseconds since the epoch as a Timestamp."""
    seconds, micros = divmod(time_us, 1_000_000)
    return Timestamp(seconds=seconds, nanos=micros * 1000)


def duration_from_proto(duration: Duration) -> float:
    """A Duration in seconds."""
    # one division, rounded once: 1.473 s come back as 1.473 s
    return (duration.seconds * _NANOS + duration.nanos) / _NANOS


def prompt_to_proto(prompt: Prompt) -> prompt_pb2.Prompt:
    """The public part of a prompt."""
    return prompt_pb2.Prompt(
        prompt_id=prompt.prompt_id,
        messages=[prompt_pb2.Message(role=turn.role, content=turn.content) for turn in prompt.messages],
        source=prompt.source,
    )


def prompt_from_proto(prompt: prompt_pb2.Prompt) -> Prompt:
    """The public part of a prompt."""
    return Prompt(
        prompt_id=prompt.prompt_id,
        messages=tuple(Message(turn.role, turn.content) for turn in prompt.messages),
        source=prompt.source,
    )


def prompt_entry_to_proto(entry: PromptEntry) -> prompt_pb2.PromptEntry:
    """A prompt with its reference."""
    return prompt_pb2.PromptEntry(prompt=prompt_to_proto(entry.prompt), reference_json=entry.reference_json)


def prompt_entry_from_proto(entry: prompt_pb2.PromptEntry) -> PromptEntry:
    """A prompt with its reference; an unset reference is JSON null."""
    return PromptEntry(prompt=prompt_from_proto(entry.prompt), reference_json=entry.reference_json or "null")


def model_spec_to_proto(model: ModelSpec) -> pool_pb2.ModelSpec:
    """What a member says of its model."""
    return pool_pb2.ModelSpec(
        model=model.model,
        architecture=model.architecture,
        parameters=model.parameters,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
    )


def model_spec_from_proto(model: pool_pb2.ModelSpec) -> ModelSpec:
    """What a member says of its model."""
    return ModelSpec(
        model=model.model,
        architecture=model.architecture,
        parameters=model.parameters,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
    )


def pool_spec_to_proto(spec: PoolSpec) -> pool_pb2.PoolSpec:
    """A pool's spec, every field set."""
    plan, lockstep = spec.plan, spec.lockstep
    return pool_pb2.PoolSpec(
        prompt_set=prompt_set_name(spec.prompt_set),
        group_size=spec.group_size,
        plan=pool_pb2.VerificationPlan(
            verifiers=[
                pool_pb2.VerifierUse(verifier=use.verifier, config_json=use.config_json)
                for use in plan.verifiers
            ],
            success_threshold=plan.success_threshold,
            item_timeout=duration_to_proto(plan.item_timeout_seconds),
            max_attempts=plan.max_attempts,
            max_unscored_share=plan.max_unscored_share,
        ),
        lockstep=pool_pb2.Lockstep(
            prompts_per_step=lockstep.prompts_per_step,
            min_members=lockstep.min_members,
            publish_timeout=duration_to_proto(lockstep.publish_timeout_seconds),
            verify_timeout=duration_to_proto(lockstep.verify_timeout_seconds),
            max_open_steps=lockstep.max_open_steps,
            max_steps=lockstep.max_steps,
        ),
        seed=spec.seed,
        max_tokens=spec.max_tokens,
        reveal=pool_pb2.RevealRule.ValueType(spec.reveal.value),
        retained_steps=spec.retained_steps,
        capability_window=spec.capability_window,
    )


def pool_spec_from_proto(spec: pool_pb2.PoolSpec) -> PoolSpec:
    """A pool's spec with defaults for what is unset. Form only: the core checks the values.

    Raises:
        InvalidPoolError: no prompt set is named, or there is no schedule that this version knows.
        UnsupportedEncodingError: the reveal rule is newer than this version.
    """
    if spec.WhichOneof("schedule") != "lockstep":
        raise InvalidPoolError("The pool states no schedule that this version knows; set lockstep.")
    try:
        prompt_set = parse_prompt_set_name(spec.prompt_set)
    except InvalidRequestError as error:
        raise InvalidPoolError(f"The pool names no prompt set: {error.message}") from error
    reveal = RevealRule.GIVE_TO_GET if spec.reveal == 0 else enum_from_proto(RevealRule, spec.reveal)
    return PoolSpec(
        prompt_set=prompt_set,
        group_size=spec.group_size,
        plan=_plan_from_proto(spec.plan),
        lockstep=_lockstep_from_proto(spec.lockstep),
        seed=spec.seed,
        max_tokens=spec.max_tokens,
        reveal=reveal,
        retained_steps=spec.retained_steps,
        capability_window=spec.capability_window or _DEFAULT_WINDOW,
    )


_DEFAULT_PLAN = VerificationPlan(verifiers=())
_DEFAULT_LOCKSTEP = Lockstep(prompts_per_step=1)
_DEFAULT_WINDOW = PoolSpec("x", 1, _DEFAULT_PLAN, _DEFAULT_LOCKSTEP).capability_window


def _plan_from_proto(plan: pool_pb2.VerificationPlan) -> VerificationPlan:
    default = _DEFAULT_PLAN
    return VerificationPlan(
        verifiers=tuple(
            VerifierUse(verifier=use.verifier, config_json=use.config_json or "{}") for use in plan.verifiers
        ),
        success_threshold=(
            plan.success_threshold if plan.HasField("success_threshold") else default.success_threshold
        ),
        item_timeout_seconds=(
            duration_from_proto(plan.item_timeout)
            if plan.HasField("item_timeout")
            else default.item_timeout_seconds
        ),
        max_attempts=plan.max_attempts or default.max_attempts,
        max_unscored_share=(
            plan.max_unscored_share if plan.HasField("max_unscored_share") else default.max_unscored_share
        ),
    )


def _lockstep_from_proto(lockstep: pool_pb2.Lockstep) -> Lockstep:
    default = _DEFAULT_LOCKSTEP
    return Lockstep(
        prompts_per_step=lockstep.prompts_per_step,
        min_members=lockstep.min_members or default.min_members,
        publish_timeout_seconds=(
            duration_from_proto(lockstep.publish_timeout)
            if lockstep.HasField("publish_timeout")
            else default.publish_timeout_seconds
        ),
        verify_timeout_seconds=(
            duration_from_proto(lockstep.verify_timeout)
            if lockstep.HasField("verify_timeout")
            else default.verify_timeout_seconds
        ),
        max_open_steps=lockstep.max_open_steps or default.max_open_steps,
        max_steps=lockstep.max_steps,
    )


def step_counts_to_proto(counts: StepCounts) -> step_pb2.StepCounts:
    """Counts of one agent in one step."""
    return step_pb2.StepCounts(
        step=counts.step,
        success_count=counts.success_count,
        scored_count=counts.scored_count,
        total_count=counts.total_count,
    )


def step_counts_from_proto(counts: step_pb2.StepCounts) -> StepCounts:
    """Counts of one agent in one step."""
    return StepCounts(counts.step, counts.success_count, counts.scored_count, counts.total_count)


def roster_entry_to_proto(entry: RosterEntry) -> step_pb2.RosterEntry:
    """A member of a closed step's roster."""
    return step_pb2.RosterEntry(
        agent=entry.agent,
        principal=entry.principal,
        state=step_pb2.RosterState.ValueType(entry.state.value),
        counts=[step_counts_to_proto(counts) for counts in entry.counts],
        withheld=entry.withheld,
    )


def roster_entry_from_proto(entry: step_pb2.RosterEntry) -> RosterEntry:
    """A member of a closed step's roster.

    Raises:
        UnsupportedEncodingError: its state is unknown to this version.
    """
    return RosterEntry(
        agent=entry.agent,
        principal=entry.principal,
        state=enum_from_proto(RosterState, entry.state),
        counts=tuple(step_counts_from_proto(counts) for counts in entry.counts),
        withheld=entry.withheld,
    )


def verifier_identity_to_proto(identity: VerifierIdentity) -> verdict_pb2.VerifierIdentity:
    """Which code and configuration gave a verdict."""
    return verdict_pb2.VerifierIdentity(
        verifier=identity.verifier, version=identity.version, config_digest=identity.config_digest
    )


def verifier_identity_from_proto(identity: verdict_pb2.VerifierIdentity) -> VerifierIdentity:
    """Which code and configuration gave a verdict."""
    return VerifierIdentity(identity.verifier, identity.version, identity.config_digest)


def verdict_to_proto(verdict: Verdict) -> verdict_pb2.Verdict:
    """An outcome; a score exists only in the scored branch."""
    if isinstance(verdict, Scored):
        if not verdict.components:
            return verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=verdict.score))
        scored = verdict_pb2.Scored(score=verdict.score, components=dict(verdict.components))
        return verdict_pb2.Verdict(scored=scored)
    reason = verdict_pb2.VerdictReason.ValueType(verdict.reason.value)
    match verdict.kind:
        case UnscoredKind.NOT_APPLICABLE:
            return verdict_pb2.Verdict(not_applicable=verdict_pb2.NotApplicable(), reason=reason)
        case UnscoredKind.VERIFIER_ERROR:
            return verdict_pb2.Verdict(verifier_error=verdict_pb2.VerifierError(), reason=reason)
        case UnscoredKind.TIMEOUT:
            return verdict_pb2.Verdict(timed_out=verdict_pb2.TimedOut(), reason=reason)
        case UnscoredKind.UNSUPPORTED:
            return verdict_pb2.Verdict(unsupported=verdict_pb2.Unsupported(), reason=reason)


_UNSCORED_KINDS = {
    "not_applicable": UnscoredKind.NOT_APPLICABLE,
    "verifier_error": UnscoredKind.VERIFIER_ERROR,
    "timed_out": UnscoredKind.TIMEOUT,
    "unsupported": UnscoredKind.UNSUPPORTED,
}
_REASONS = {reason.value: reason for reason in VerdictReason}


def verdict_from_proto(verdict: verdict_pb2.Verdict) -> Verdict:
    """An outcome; one that is unset or newer than this version is UNSUPPORTED, hence unscored."""
    outcome = verdict.WhichOneof("outcome")
    if outcome == "scored":
        scored = verdict.scored
        # Copying a map costs three times what asking whether it is empty does, and nearly all are.
        components = dict(scored.components) if scored.components else {}
        return Scored(score=scored.score, components=components)
    if outcome is None:
        return Unscored(UnscoredKind.UNSUPPORTED)
    return Unscored(_UNSCORED_KINDS[outcome], _REASONS.get(verdict.reason, VerdictReason.UNSPECIFIED))


def receipt_to_proto(receipt: Receipt) -> rollout_pb2.Receipt:
    """A receipt under its group's name."""
    return rollout_pb2.Receipt(
        group=group_name(receipt.pool, receipt.slot),
        digest=receipt.digest,
        session=receipt.session,
        rollout_count=receipt.rollout_count,
    )


def receipt_from_proto(receipt: rollout_pb2.Receipt) -> Receipt:
    """A receipt with its slot.

    Raises:
        InvalidRequestError: the group's name is malformed.
    """
    pool, slot = parse_group_name(receipt.group)
    return Receipt(pool, slot, receipt.digest, receipt.session, receipt.rollout_count)
