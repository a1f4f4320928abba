"""What a group must prove before it may enter the log. Pure CPU work, run off the event loop.

The gate checks what the envelope states against the bytes: sizes before anything is allocated, digests,
counts, UTF-8, log-probs finite, not positive and adding up. It never re-encodes and never judges content.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from hacrl_exchange._pb import rollout_pb2
from hacrl_exchange._pb.rollout_pb2 import (
    ELEMENT_TYPE_U32,
    ELEMENT_TYPE_U32_SPLIT,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    LOGPROB_ORIGIN_SAMPLER,
    LOGPROB_ORIGIN_TRAINER,
    PART_KIND_LOGPROBS,
    PART_KIND_META,
    PART_KIND_TEXT,
    PART_KIND_TOKENS,
)
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.codec import check_stated_size, decode_part, group_digest
from hacrl_exchange.codec.bodies import logprob_sum_tolerance, metadata_of, numbers_of, texts_of
from hacrl_exchange.errors import (
    CountMismatchError,
    InvalidEnvelopeError,
    InvalidLogprobError,
    PartTooLargeError,
    SumMismatchError,
    TooManyTokensError,
    UnsupportedEncodingError,
    WrongGroupSizeError,
)

_ENVELOPE_BYTES = 1024
_ROLLOUT_BYTES = 64
_LEAST_LOGPROB = -1e6
"""Per token; no engine's log-softmax goes there."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_TOKEN_TYPES = (ELEMENT_TYPE_U32, ELEMENT_TYPE_U32_SPLIT)
_TOKEN_BYTES = 4
_KINDS = (PART_KIND_TEXT, PART_KIND_TOKENS, PART_KIND_LOGPROBS, PART_KIND_META)


@dataclass(frozen=True, slots=True)
class CheckedGroup:
    """A group that passed: what the core and the log take."""

    digest: bytes
    rollout_count: int
    envelope: bytes
    parts: tuple[bytes, ...]


def check_group(
    group: rollout_pb2.Group, *, group_size: int, max_tokens: int, limits: Limits
) -> CheckedGroup:
    """Checks a group; `max_tokens` is the pool's limit for a response, 0 for the server's.

    Raises:
        WrongGroupSizeError, InvalidEnvelopeError, UnsupportedEncodingError, PartTooLargeError,
        SizeMismatchError, DigestMismatchError, PartUndecodableError, CountMismatchError,
        InvalidLogprobError, SumMismatchError, TooManyTokensError: as their names say.
    """
    envelope = group.envelope
    if len(envelope.rollouts) != group_size:
        raise WrongGroupSizeError(
            f"The group holds {len(envelope.rollouts)} rollouts; the pool's group size is {group_size}.",
            rollouts=len(envelope.rollouts),
            group_size=group_size,
        )
    _check_size(envelope)
    _check_claims(envelope)
    _check_rollouts(envelope, min(max_tokens or limits.max_tokens, limits.max_tokens))
    counts = [rollout.token_count for rollout in envelope.rollouts]
    parts = tuple(group.parts)  # once: every look at a bytes field copies it
    _check_part_headers(envelope, parts, limits)
    for info, stored in zip(envelope.parts, parts, strict=True):
        check_stated_size(info, counts)
        cap = limits.max_meta_size if info.kind == PART_KIND_META else limits.max_part_decoded_size
        decoded = decode_part(info, stored, max_decoded=cap)
        _check_body(envelope, info, decoded)
    return CheckedGroup(
        digest=group_digest(envelope),
        rollout_count=len(envelope.rollouts),
        envelope=envelope.SerializeToString(),
        parts=parts,
    )


def _check_size(envelope: rollout_pb2.Envelope) -> None:
    """The envelope is stored and delivered as it came, fields this server does not know included."""
    size, limit = envelope.ByteSize(), _ENVELOPE_BYTES + _ROLLOUT_BYTES * len(envelope.rollouts)
    if size > limit:
        raise InvalidEnvelopeError(
            f"The envelope takes {size} bytes; with {len(envelope.rollouts)} rollouts at most {limit} do.",
            size=size,
            limit=limit,
        )


def _check_claims(envelope: rollout_pb2.Envelope) -> None:
    sampling = envelope.sampling
    start, end = envelope.policy_start, envelope.policy_end
    problem = ""
    if not (math.isfinite(sampling.temperature) and sampling.temperature > 0):
        problem = f"sampling.temperature must be above 0, not {sampling.temperature}"
    elif not 0 < sampling.top_p <= 1:
        problem = f"sampling.top_p must be in (0, 1], not {sampling.top_p}"
    elif sampling.max_tokens < 0:
        problem = f"sampling.max_tokens must not be negative, as {sampling.max_tokens} is"
    elif start.session < 1 or end.session < start.session or start.updates < 0:
        problem = "policy_start and policy_end need sessions from 1 and updates from 0, end not before start"
    elif start.session == end.session and end.updates < start.updates:
        problem = "policy_end is older than policy_start"
    elif not _FINGERPRINT.fullmatch(envelope.tokenizer_fingerprint):
        problem = "tokenizer_fingerprint must be 64 lowercase hex digits"
    elif envelope.logprob_origin not in (LOGPROB_ORIGIN_TRAINER, LOGPROB_ORIGIN_SAMPLER):
        problem = "logprob_origin must be TRAINER or SAMPLER"
    if problem:
        raise InvalidEnvelopeError(f"The envelope is invalid: {problem}.")


def _check_rollouts(envelope: rollout_pb2.Envelope, max_tokens: int) -> None:
    for index, rollout in enumerate(envelope.rollouts):
        if rollout.finish_reason not in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
            raise InvalidEnvelopeError(f"Rollout {index} states no finish reason.", rollout=index)
        if rollout.token_count < 1:
            raise InvalidEnvelopeError(
                f"Rollout {index} states {rollout.token_count} tokens; the least is 1 (an end token alone).",
                rollout=index,
            )
        if rollout.terminal_only and (
            rollout.token_count != 1 or rollout.finish_reason != FINISH_REASON_STOP
        ):
            raise InvalidEnvelopeError(
                f"Rollout {index} is terminal-only, so it must state 1 token and finish reason STOP.",
                rollout=index,
            )
        if rollout.token_count > max_tokens:
            raise TooManyTokensError(
                f"Rollout {index} has {rollout.token_count} tokens; the limit is {max_tokens}.",
                rollout=index,
                tokens=rollout.token_count,
                limit=max_tokens,
            )
        if not _LEAST_LOGPROB * rollout.token_count <= rollout.logprob_sum <= 0:
            raise InvalidLogprobError(
                f"The log-prob sum of rollout {index} is {rollout.logprob_sum}; it must be from "
                f"{_LEAST_LOGPROB:g} a token to 0.",
                rollout=index,
            )


def _check_part_headers(envelope: rollout_pb2.Envelope, parts: Sequence[bytes], limits: Limits) -> None:
    if len(envelope.parts) != len(parts):
        raise CountMismatchError(
            f"The envelope describes {len(envelope.parts)} parts; {len(parts)} came with it."
        )
    kinds = [info.kind for info in envelope.parts]
    unknown = next((kind for kind in kinds if kind not in _KINDS), None)
    if unknown is not None:
        raise UnsupportedEncodingError(f"This server does not read parts of kind {unknown}.", kind=unknown)
    if kinds != sorted(set(kinds)):
        raise InvalidEnvelopeError("The parts must be in ascending order of kind, each kind at most once.")
    if PART_KIND_TEXT not in kinds:
        raise InvalidEnvelopeError("The text part is missing; every group needs one.")
    stored_size = sum(map(len, parts))
    if stored_size > limits.max_group_stored_size:
        raise PartTooLargeError(
            f"The group's parts take {stored_size} bytes; the limit is {limits.max_group_stored_size}.",
            size=stored_size,
            limit=limits.max_group_stored_size,
        )


def _check_body(envelope: rollout_pb2.Envelope, info: rollout_pb2.PartInfo, decoded: bytes) -> None:
    """Checks a decoded part against what the envelope states of the rollouts."""
    rollouts = envelope.rollouts
    if info.kind == PART_KIND_TEXT:
        for index, (text, rollout) in enumerate(
            zip(texts_of((info, decoded), len(rollouts)), rollouts, strict=True)
        ):
            if rollout.terminal_only and text:
                raise CountMismatchError(f"Rollout {index} is terminal-only and yet has text.", rollout=index)
    elif info.kind == PART_KIND_META:
        metadata_of((info, decoded), len(rollouts))
    elif info.kind == PART_KIND_TOKENS:
        _check_tokens(envelope, info, decoded)
    else:
        ends = list(accumulate(rollout.token_count for rollout in rollouts))
        values = numbers_of((info, decoded), ends)
        if values is not None:
            _check_logprobs(envelope, info, values.astype(np.float64), ends)


def _check_tokens(envelope: rollout_pb2.Envelope, info: rollout_pb2.PartInfo, decoded: bytes) -> None:
    """Any u32 is an id, so their number is all there is to check."""
    if info.element_type not in _TOKEN_TYPES:
        raise UnsupportedEncodingError(
            f"This server does not read token ids of element type {info.element_type}.",
            element_type=info.element_type,
        )
    stated = sum(rollout.token_count for rollout in envelope.rollouts)
    if len(decoded) != stated * _TOKEN_BYTES:
        raise CountMismatchError(
            f"The tokens part holds {len(decoded) / _TOKEN_BYTES:g} ids for {stated} stated tokens.",
            tokens=stated,
        )


def _check_logprobs(
    envelope: rollout_pb2.Envelope,
    info: rollout_pb2.PartInfo,
    values: npt.NDArray[np.float64],
    ends: Sequence[int],
) -> None:
    if not (np.isfinite(values).all() and (values <= 0).all()):
        raise InvalidLogprobError("A log-prob is NaN, infinite or positive; check how it was computed.")
    sums: list[float] = np.add.reduceat(values, [0, *ends[:-1]]).tolist()
    for index, (rollout, total) in enumerate(zip(envelope.rollouts, sums, strict=True)):
        tolerance = logprob_sum_tolerance(
            abs(rollout.logprob_sum), rollout.token_count, element_type=info.element_type
        )
        if abs(total - rollout.logprob_sum) > tolerance:
            raise SumMismatchError(
                f"The log-probs of rollout {index} add up to {total:.6g}; the envelope states "
                f"{rollout.logprob_sum:.6g}.",
                rollout=index,
            )
