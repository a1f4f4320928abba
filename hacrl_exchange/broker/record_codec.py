"""Records as bytes, and by re-export snapshots: where the core's dataclasses meet the log's protos.

Written out by hand, field by field: a broker encodes thousands of GroupAccepted and VerdictsRecorded a
second. The same value always gives the same bytes, in every process. What cannot be read was damaged, or
written by a newer version: that is CorruptLogError, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, assert_never

from hacrl_exchange._pb import records_pb2 as pb
from hacrl_exchange._pb import step_pb2, verdict_pb2
from hacrl_exchange.broker.core.records import (
    ExpiredGroup,
    GroupAccepted,
    ManifestEntry,
    MemberJoined,
    MemberLeft,
    MemberReturned,
    PoolCreated,
    PublishingEnded,
    Record,
    RecordBody,
    StepAcked,
    StepClosed,
    StepOpened,
    StepsRetired,
    VerdictsRecorded,
)
from hacrl_exchange.broker.log_wire import known, parsed, roster_state_to_proto, unreadable
from hacrl_exchange.broker.snapshot_codec import snapshot_from_bytes, snapshot_to_bytes
from hacrl_exchange.codec import (
    model_spec_from_proto,
    model_spec_to_proto,
    pool_spec_from_proto,
    pool_spec_to_proto,
    roster_entry_from_proto,
    roster_entry_to_proto,
    verdict_from_proto,
    verifier_identity_from_proto,
)
from hacrl_exchange.errors import CorruptLogError, ExchangeError
from hacrl_exchange.types import (
    RosterState,
    Scored,
    StepOutcome,
    UnscoredKind,
    Verdict,
)

__all__ = ["decode_record", "encode_record", "snapshot_from_bytes", "snapshot_to_bytes"]

_EXPIRED_TO_PROTO: Final = {
    UnscoredKind.TIMEOUT: pb.EXPIRED_KIND_TIMEOUT,
    UnscoredKind.UNSUPPORTED: pb.EXPIRED_KIND_UNSUPPORTED,
}
_EXPIRED_FROM_PROTO: Final = {wire: kind for kind, wire in _EXPIRED_TO_PROTO.items()}
_OUTCOME_FIELDS: Final = {
    UnscoredKind.NOT_APPLICABLE: "not_applicable",
    UnscoredKind.VERIFIER_ERROR: "verifier_error",
    UnscoredKind.TIMEOUT: "timed_out",
    UnscoredKind.UNSUPPORTED: "unsupported",
}


def encode_record(record: Record) -> bytes:
    """A record's bytes: a hacrl.log.v1.Record."""
    wire = pb.Record(time_us=record.time_us)
    _fill_record(wire, record.body)
    return wire.SerializeToString(deterministic=True)


def decode_record(payload: bytes) -> Record:
    """The record in these bytes.

    Raises:
        CorruptLogError: they hold none that this version knows.
    """
    wire = parsed(pb.Record, payload)
    which = wire.WhichOneof("body")
    decode = _DECODERS.get(which or "")
    if decode is None:
        raise unreadable(f"its kind is {which or 'unset, or newer than this version'}")
    try:
        return Record(wire.time_us, decode(getattr(wire, which or "")))
    except CorruptLogError:
        raise
    except ExchangeError as error:
        raise unreadable(str(error)) from error


# --- records: out ----------------------------------------------------------------------------------


def _fill_record(wire: pb.Record, body: RecordBody) -> None:
    match body:
        case GroupAccepted():
            _fill_group(wire.group_accepted, body)
        case VerdictsRecorded():
            _fill_verdicts(wire.verdicts_recorded, body)
        case StepOpened():
            wire.step_opened.CopyFrom(
                pb.StepOpened(
                    step=body.step, epoch=body.epoch, prompt_ids=body.prompt_ids, roster=body.roster
                )
            )
        case StepClosed():
            _fill_closed(wire.step_closed, body)
        case PublishingEnded():
            wire.publishing_ended.step = body.step
            wire.publishing_ended.roster_states.extend(
                roster_state_to_proto(state) for state in body.roster_states
            )
        case StepAcked():
            wire.step_acked.CopyFrom(pb.StepAcked(agent=body.agent, step=body.step))
        case MemberJoined():
            wire.member_joined.CopyFrom(
                pb.MemberJoined(
                    agent=body.agent,
                    principal=body.principal,
                    session=body.session,
                    instance=body.instance,
                    model=model_spec_to_proto(body.model),
                )
            )
        case MemberReturned():
            wire.member_returned.CopyFrom(pb.MemberReturned(agent=body.agent))
        case MemberLeft():
            wire.member_left.CopyFrom(pb.MemberLeft(agent=body.agent))
        case PoolCreated():
            wire.pool_created.CopyFrom(
                pb.PoolCreated(
                    pool=body.pool, spec=pool_spec_to_proto(body.spec), prompt_count=body.prompt_count
                )
            )
        case StepsRetired():
            wire.steps_retired.CopyFrom(pb.StepsRetired(through_step=body.through_step))
        case _:
            assert_never(body)


def _fill_group(wire: pb.GroupAccepted, body: GroupAccepted) -> None:
    wire.SetInParent()
    wire.step = body.step
    wire.prompt_index = body.prompt_index
    wire.roster_index = body.roster_index
    wire.session = body.session
    wire.digest = body.digest
    wire.rollout_count = body.rollout_count
    wire.envelope = body.envelope


def _fill_verdicts(wire: pb.VerdictsRecorded, body: VerdictsRecorded) -> None:
    wire.SetInParent()
    wire.step = body.step
    wire.prompt_index = body.prompt_index
    wire.roster_index = body.roster_index
    wire.generation = body.generation
    if body.verifier is not None:
        identity = wire.verifier
        identity.SetInParent()
        identity.verifier = body.verifier.verifier
        identity.version = body.verifier.version
        identity.config_digest = body.verifier.config_digest
    wire.worker = body.worker
    add = wire.verdicts.add
    for verdict in body.verdicts:
        _fill_verdict(add(), verdict)
    wire.details.extend(body.details)
    wire.success_count = body.success_count
    wire.scored_count = body.scored_count


def _fill_verdict(wire: verdict_pb2.Verdict, verdict: Verdict) -> None:
    if isinstance(verdict, Scored):
        scored = wire.scored
        scored.SetInParent()
        scored.score = verdict.score
        if verdict.components:
            scored.components.update(verdict.components)
        return
    getattr(wire, _OUTCOME_FIELDS[verdict.kind]).SetInParent()
    wire.reason = verdict_pb2.VerdictReason.ValueType(verdict.reason.value)


def _fill_closed(wire: pb.StepClosed, body: StepClosed) -> None:
    wire.step = body.step
    wire.outcome = step_pb2.StepOutcome.ValueType(body.outcome.value)
    wire.quorum_met = body.quorum_met
    wire.roster.extend(roster_entry_to_proto(entry) for entry in body.roster)
    for entry in body.entries:
        wire.entries.add(
            prompt_index=entry.prompt_index,
            roster_index=entry.roster_index,
            digest=entry.digest,
            generation=entry.generation,
        )
    for group in body.expired:
        wire.expired.add(
            prompt_index=group.prompt_index,
            roster_index=group.roster_index,
            kind=_EXPIRED_TO_PROTO[group.kind],
        )


# --- records: in -----------------------------------------------------------------------------------


def _group_accepted(wire: pb.GroupAccepted) -> GroupAccepted:
    return GroupAccepted(
        wire.step,
        wire.prompt_index,
        wire.roster_index,
        wire.session,
        wire.digest,
        wire.rollout_count,
        wire.envelope,
    )


def _verdicts_recorded(wire: pb.VerdictsRecorded) -> VerdictsRecorded:
    verifier = verifier_identity_from_proto(wire.verifier) if wire.HasField("verifier") else None
    return VerdictsRecorded(
        wire.step,
        wire.prompt_index,
        wire.roster_index,
        wire.generation,
        verifier,
        wire.worker,
        tuple([_verdict(verdict) for verdict in wire.verdicts]),
        tuple(wire.details),
        wire.success_count,
        wire.scored_count,
    )


def _verdict(wire: verdict_pb2.Verdict) -> Verdict:
    """As codec.verdict_from_proto, without its cost in the case that nearly all are."""
    if not wire.HasField("scored"):
        return verdict_from_proto(wire)
    scored = wire.scored
    components = scored.components
    return Scored(scored.score, dict(components) if components else {})


def _step_opened(wire: pb.StepOpened) -> StepOpened:
    return StepOpened(wire.step, wire.epoch, tuple(wire.prompt_ids), tuple(wire.roster))


def _publishing_ended(wire: pb.PublishingEnded) -> PublishingEnded:
    return PublishingEnded(wire.step, tuple(known(RosterState, state) for state in wire.roster_states))


def _step_closed(wire: pb.StepClosed) -> StepClosed:
    return StepClosed(
        step=wire.step,
        outcome=known(StepOutcome, wire.outcome),
        quorum_met=wire.quorum_met,
        roster=tuple(roster_entry_from_proto(entry) for entry in wire.roster),
        entries=tuple(
            ManifestEntry(entry.prompt_index, entry.roster_index, entry.digest, entry.generation)
            for entry in wire.entries
        ),
        expired=tuple(_expired_group(group) for group in wire.expired),
    )


def _expired_group(wire: pb.ExpiredGroup) -> ExpiredGroup:
    kind = _EXPIRED_FROM_PROTO.get(wire.kind)
    if kind is None:
        raise unreadable(f"its ExpiredKind is {wire.kind}")
    return ExpiredGroup(wire.prompt_index, wire.roster_index, kind)


def _member_joined(wire: pb.MemberJoined) -> MemberJoined:
    return MemberJoined(
        wire.agent, wire.principal, wire.session, wire.instance, model_spec_from_proto(wire.model)
    )


def _pool_created(wire: pb.PoolCreated) -> PoolCreated:
    return PoolCreated(wire.pool, pool_spec_from_proto(wire.spec), wire.prompt_count)


# A prompt set is no decision of a pool; its record in the catalog is prompts.py's business.
_DECODERS: Final[Mapping[str, Callable[[Any], RecordBody]]] = {
    "pool_created": _pool_created,
    "member_joined": _member_joined,
    "member_returned": lambda wire: MemberReturned(wire.agent),
    "member_left": lambda wire: MemberLeft(wire.agent),
    "step_opened": _step_opened,
    "group_accepted": _group_accepted,
    "publishing_ended": _publishing_ended,
    "verdicts_recorded": _verdicts_recorded,
    "step_closed": _step_closed,
    "step_acked": lambda wire: StepAcked(wire.agent, wire.step),
    "steps_retired": lambda wire: StepsRetired(wire.through_step),
}
