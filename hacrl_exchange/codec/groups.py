"""Groups as envelope and parts, and back. What a part holds is in bodies.py, how it is stored in parts.py."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from itertools import accumulate

from hacrl_exchange._pb import exchange_service_pb2, verdict_pb2
from hacrl_exchange._pb import rollout_pb2 as pb
from hacrl_exchange.codec.bodies import (
    LOGPROB_ELEMENT_TYPES,
    LogprobDtype,
    logprob_bytes,
    max_decoded_size,
    metadata_bytes,
    metadata_of,
    numbers_of,
    text_body,
    texts_of,
    token_bytes,
)
from hacrl_exchange.codec.messages import enum_from_proto, verdict_from_proto, verifier_identity_from_proto
from hacrl_exchange.codec.names import parse_group_name
from hacrl_exchange.codec.parts import MAX_DECODED_SIZE, decode_part, encode_part, part_title
from hacrl_exchange.errors import (
    CountMismatchError,
    InvalidEnvelopeError,
    PartTooLargeError,
)
from hacrl_exchange.types import (
    FinishReason,
    Group,
    LogprobOrigin,
    PolicyVersion,
    Rollout,
    SamplingParameters,
    Slot,
    VerifiedGroup,
)

_KNOWN_KINDS = (pb.PART_KIND_TEXT, pb.PART_KIND_TOKENS, pb.PART_KIND_LOGPROBS, pb.PART_KIND_META)
_PART_DIGEST = struct.Struct("<I32s")
_ROLLOUT_DIGEST = struct.Struct("<IdBB")


def group_digest(envelope: pb.Envelope) -> bytes:
    """The digest of a receipt: sha256 over the parts' digests and what the envelope states of the rollouts.

    The input is little endian and of fixed width: u32 number of parts; per part u32 kind and the 32 bytes
    sha256; u32 number of rollouts; per rollout u32 token count, f64 log-prob sum, u8 finish reason and u8
    terminal-only. Policy versions and sampling parameters are left out: they are claims about how the same
    rollouts came about.

    Raises:
        InvalidEnvelopeError: a count is negative or a part's sha256 is not 32 bytes long.
    """
    pieces = [struct.pack("<I", len(envelope.parts))]
    try:
        for info in envelope.parts:
            if len(info.sha256) != 32:
                raise InvalidEnvelopeError(
                    f"A part states a sha256 of {len(info.sha256)} bytes; it has 32.", kind=info.kind
                )
            pieces.append(_PART_DIGEST.pack(info.kind, info.sha256))
        pieces.append(struct.pack("<I", len(envelope.rollouts)))
        pack = _ROLLOUT_DIGEST.pack
        for stated in envelope.rollouts:
            pieces.append(
                pack(stated.token_count, stated.logprob_sum, stated.finish_reason, stated.terminal_only)
            )
    except struct.error as error:
        raise InvalidEnvelopeError(f"The envelope states an impossible value: {error}.") from error
    return hashlib.sha256(b"".join(pieces)).digest()


def encode_group(group: Group, *, name: str, logprob_dtype: LogprobDtype = "f16", level: int = 1) -> pb.Group:
    """Encodes a group under its name. Tokens, log-probs and metadata are sent if the rollouts have them.

    Token ids and log-probs may be arrays (fast) or any sequences. The envelope's sums are float64 sums of the
    log-probs as given, before rounding to `logprob_dtype`; `logprob_sum` counts only where there are none.

    Raises:
        InvalidEnvelopeError: there is no rollout, or only some have token ids or log-probs.
        CountMismatchError: a number of token ids or log-probs is not the rollout's token_count.
        InvalidLogprobError: a log-prob is NaN, infinite, positive or beyond what f16 can hold.
        SumMismatchError: a stated logprob_sum contradicts the rollout's own log-probs.
        PartUndecodableError: a text is not valid Unicode, a token id no u32, or metadata not msgpack.
    """
    rollouts = group.rollouts
    if not rollouts:
        raise InvalidEnvelopeError("The group holds no rollouts; publish the pool's group size.")
    counts = [rollout.token_count for rollout in rollouts]
    if min(counts) < 1:
        raise InvalidEnvelopeError(
            f"Rollout {counts.index(min(counts))} states {min(counts)} tokens; "
            "the least is 1, an end token alone."
        )
    encoded = [encode_part(pb.PART_KIND_TEXT, text_body(rollouts), level=level)]
    if _all_have("token_ids", [rollout.token_ids for rollout in rollouts]):
        tokens = token_bytes([rollout.token_ids for rollout in rollouts], counts)
        encoded.append(
            encode_part(pb.PART_KIND_TOKENS, tokens, element_type=pb.ELEMENT_TYPE_U32_SPLIT, level=level)
        )
    sums = [rollout.logprob_sum for rollout in rollouts]
    if _all_have("logprobs", [rollout.logprobs for rollout in rollouts]):
        logprobs, sums = logprob_bytes(rollouts, counts, dtype=logprob_dtype)
        encoded.append(
            encode_part(
                pb.PART_KIND_LOGPROBS,
                logprobs,
                element_type=LOGPROB_ELEMENT_TYPES[logprob_dtype],
                level=level,
            )
        )
    if any(rollout.metadata is not None for rollout in rollouts):
        encoded.append(encode_part(pb.PART_KIND_META, metadata_bytes(rollouts), level=level))
    return pb.Group(
        name=name,
        envelope=_envelope(group, sums, [info for info, _ in encoded]),
        parts=[stored for _, stored in encoded],
    )


def decode_group(group: pb.Group, *, max_decoded: int = MAX_DECODED_SIZE) -> Group:
    """Decodes a group with the parts that came; digests and counts are checked again.

    Token ids (uint32) and log-probs (float16 or float32) are read-only numpy views, one per rollout, or None
    where the part did not come; without the text part every text is "".

    Raises:
        ExchangeError: as `decode_part`; or a part does not hold what the envelope states, the name is
            malformed, or an enum is newer than this version.
    """
    return _decode(group, parse_group_name(group.name)[1], max_decoded)


def _decode(group: pb.Group, slot: Slot, max_decoded: int) -> Group:
    envelope = group.envelope
    counts = [stated.token_count for stated in envelope.rollouts]
    bodies = _decoded_parts(group, counts, max_decoded)
    texts = texts_of(bodies.get(pb.PART_KIND_TEXT), len(counts))
    ends = list(accumulate(counts))
    tokens = numbers_of(bodies.get(pb.PART_KIND_TOKENS), ends)
    logprobs = numbers_of(bodies.get(pb.PART_KIND_LOGPROBS), ends)
    metadata = metadata_of(bodies.get(pb.PART_KIND_META), len(counts))
    rollouts = []
    for index, stated in enumerate(envelope.rollouts):
        part = slice(ends[index] - counts[index], ends[index])
        rollouts.append(
            Rollout(
                text=texts[index],
                token_count=counts[index],
                logprob_sum=stated.logprob_sum,
                finish_reason=enum_from_proto(FinishReason, stated.finish_reason),
                terminal_only=stated.terminal_only,
                token_ids=None if tokens is None else tokens[part],  # type: ignore[arg-type]  # an array
                logprobs=None if logprobs is None else logprobs[part],  # type: ignore[arg-type]  # an array
                metadata=metadata[index],
            )
        )
    sampling = envelope.sampling
    return Group(
        prompt_id=slot.prompt_id,
        rollouts=tuple(rollouts),
        tokenizer_fingerprint=envelope.tokenizer_fingerprint,
        policy_start=PolicyVersion(envelope.policy_start.session, envelope.policy_start.updates),
        policy_end=PolicyVersion(envelope.policy_end.session, envelope.policy_end.updates),
        sampling=SamplingParameters(sampling.temperature, sampling.top_p, sampling.max_tokens),
        logprob_origin=enum_from_proto(LogprobOrigin, envelope.logprob_origin),
    )


def decode_verified_group(
    delivered: exchange_service_pb2.DeliveredGroup, *, max_decoded: int = MAX_DECODED_SIZE
) -> VerifiedGroup:
    """Decodes a delivered group with its verdicts; the digest is computed here, not believed.

    Raises:
        ExchangeError: as `decode_group`; CountMismatchError if there is not one verdict per rollout.
    """
    slot = parse_group_name(delivered.group.name)[1]
    group = _decode(delivered.group, slot, max_decoded)
    verdict: verdict_pb2.GroupVerdict = delivered.verdict
    if len(verdict.verdicts) != len(group.rollouts):
        raise CountMismatchError(
            f"{delivered.group.name} came with {len(verdict.verdicts)} verdicts for "
            f"{len(group.rollouts)} rollouts.",
            group=delivered.group.name,
        )
    return VerifiedGroup(
        agent=slot.agent,
        group=group,
        digest=group_digest(delivered.group.envelope),
        generation=verdict.generation,
        verifier=verifier_identity_from_proto(verdict.verifier) if verdict.HasField("verifier") else None,
        verdicts=tuple(verdict_from_proto(one) for one in verdict.verdicts),
    )


def wire_size(group: pb.Group) -> int:
    """Bytes of a group within a message, exactly. `ByteSize` would serialize the whole group to know."""
    kinds = len(group.part_kinds)
    sizes = [len(group.name.encode()), group.envelope.ByteSize(), *map(len, group.parts)]
    size = sum(1 + _varint_size(one) + one for one in sizes) + (
        1 + _varint_size(kinds) + kinds if kinds else 0
    )
    return 1 + _varint_size(size) + size


def _varint_size(value: int) -> int:
    return max(1, (value.bit_length() + 6) // 7)


# --- encoding --------------------------------------------------------------------------------------


def _envelope(group: Group, sums: Sequence[float], parts: Sequence[pb.PartInfo]) -> pb.Envelope:
    start, end, sampling = group.policy_start, group.policy_end, group.sampling
    try:
        return pb.Envelope(
            policy_start=pb.PolicyVersion(session=start.session, updates=start.updates),
            policy_end=pb.PolicyVersion(session=end.session, updates=end.updates),
            sampling=pb.SamplingParameters(
                temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens
            ),
            tokenizer_fingerprint=group.tokenizer_fingerprint,
            logprob_origin=pb.LogprobOrigin.ValueType(group.logprob_origin.value),
            rollouts=[
                pb.RolloutInfo(
                    token_count=rollout.token_count,
                    logprob_sum=total,
                    finish_reason=pb.FinishReason.ValueType(rollout.finish_reason.value),
                    terminal_only=rollout.terminal_only,
                )
                for rollout, total in zip(group.rollouts, sums, strict=True)
            ],
            parts=parts,
        )
    except (ValueError, TypeError) as error:
        raise InvalidEnvelopeError(f"The group states a value that no envelope can hold: {error}.") from error


def _all_have(field: str, values: Sequence[object]) -> bool:
    having = sum(value is not None for value in values)
    if 0 < having < len(values):
        raise InvalidEnvelopeError(
            f"{having} of {len(values)} rollouts have {field}; give them for every rollout or for none."
        )
    return having > 0


# --- decoding --------------------------------------------------------------------------------------


def _decoded_parts(
    group: pb.Group, counts: Sequence[int], max_decoded: int
) -> dict[int, tuple[pb.PartInfo, bytes]]:
    infos = {info.kind: info for info in group.envelope.parts}
    # Without part_kinds, as on publishing, every part is there; a delivery may also be of none at all.
    all_kinds = [info.kind for info in group.envelope.parts]
    kinds = list(group.part_kinds) if group.part_kinds or not group.parts else all_kinds
    if len(kinds) != len(group.parts) or not all(kind in infos for kind in kinds):
        raise CountMismatchError(
            f"{group.name} came with {len(group.parts)} parts; its envelope and part_kinds describe others.",
            group=group.name,
        )
    bodies = {}
    for kind, stored in zip(kinds, group.parts, strict=True):
        if kind in _KNOWN_KINDS:  # a newer kind is skipped
            check_stated_size(infos[kind], counts)
            bodies[int(kind)] = (infos[kind], decode_part(infos[kind], stored, max_decoded=max_decoded))
    return bodies


def check_stated_size(info: pb.PartInfo, counts: Sequence[int]) -> None:
    """Refuses a part that states more than its rollouts' token counts allow, before it takes the memory.

    Raises:
        CountMismatchError: token ids or log-probs for more tokens than stated.
        PartTooLargeError: text or metadata beyond what so many tokens can be.
    """
    limit = max_decoded_size(info, counts)
    if info.decoded_size <= limit:
        return
    numeric = info.kind in (pb.PART_KIND_TOKENS, pb.PART_KIND_LOGPROBS)
    refusal = CountMismatchError if numeric else PartTooLargeError
    raise refusal(
        f"{part_title(info)} takes {info.decoded_size} bytes decoded; by the envelope's counts it is at most "
        f"{limit}.",
        kind=info.kind,
        size=info.decoded_size,
        limit=limit,
    )
