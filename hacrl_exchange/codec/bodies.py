"""What the parts of a group hold, before compression.

Text is a TextBody; tokens are u32, split by byte, and log-probs f16 or f32, little endian, the rollouts one
after the other; metadata is a msgpack list with one map or nil per rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final, Literal, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError, EncodeError

from hacrl_exchange._pb import rollout_pb2 as pb
from hacrl_exchange.errors import (
    CountMismatchError,
    InvalidLogprobError,
    PartUndecodableError,
    SumMismatchError,
    UnsupportedEncodingError,
)
from hacrl_exchange.types import Rollout

LogprobDtype: TypeAlias = Literal["f16", "f32"]
_Array: TypeAlias = npt.NDArray[Any]

LOGPROB_ELEMENT_TYPES: Final[dict[str, pb.ElementType.ValueType]] = {
    "f16": pb.ELEMENT_TYPE_F16,
    "f32": pb.ELEMENT_TYPE_F32,
}
_U32: Final = np.dtype("<u4")
_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    pb.ELEMENT_TYPE_U32: _U32,
    pb.ELEMENT_TYPE_U32_SPLIT: _U32,
    pb.ELEMENT_TYPE_F16: np.dtype("<f2"),
    pb.ELEMENT_TYPE_F32: np.dtype("<f4"),
}
MAX_META_SIZE: Final = 64 << 10
"""Decoded bytes of a metadata part at most."""
# Some vocabularies have tokens of 128 blanks.
_TEXT_BYTES_PER_TOKEN: Final = 256
_TEXT_BYTES_FREE: Final = 1024
# Two tags of a byte and two lengths of at most five bytes.
_TEXT_FRAMING: Final = 12
_ENTRY_TAG: Final = (pb.TextBody.ROLLOUTS_FIELD_NUMBER << 3) | 2
# Half a unit in the last place, relative and, below the normal range, absolute.
_ROUNDING: Final[dict[int, tuple[float, float]]] = {
    pb.ELEMENT_TYPE_F16: (2.0**-11, 2.0**-25),
    pb.ELEMENT_TYPE_F32: (2.0**-24, 2.0**-150),
}
# The least magnitude that rounds to infinity.
_OVERFLOW: Final[dict[str, float]] = {"f16": 65520.0, "f32": 2.0**128 - 2.0**103}
# A caller may add up in float32, over thousands of values: only a gross contradiction is its mistake.
_STATED_SUM_SLACK = 1e-3


def logprob_sum_tolerance(abs_sum: float, count: int, *, element_type: int) -> float:
    """How far the sum of `count` decoded log-probs may be from the float64 sum of the values encoded.

    `abs_sum` is the sum's magnitude; log-probs have one sign, so per-value relative errors add up to it. The
    last term is for float64 addition in another order.

    Raises:
        UnsupportedEncodingError: log-probs have no such element type.
    """
    rounding = _ROUNDING.get(element_type)
    if rounding is None:
        raise UnsupportedEncodingError(
            f"Log-probs of element type {element_type} are unknown here; use F16 or F32.",
            element_type=element_type,
        )
    relative, absolute = rounding
    # Relative to what was encoded or to what was decoded: the factor covers both.
    return abs_sum * relative * 1.001 + count * absolute + abs_sum * (count + 2) * 2.0**-52


def max_decoded_size(info: pb.PartInfo, counts: Sequence[int]) -> int:
    """The largest size in bytes that a part can legally decode to, by the token counts of its rollouts.

    A few stored kilobytes can claim to be gigabytes; nothing needs to be decoded to know that they lie. A
    part of unknown kind gets 0: it is skipped, not decoded.
    """
    kind = info.kind
    if kind == pb.PART_KIND_TEXT:
        return _TEXT_BYTES_PER_TOKEN * sum(counts) + (_TEXT_BYTES_FREE + _TEXT_FRAMING) * len(counts)
    if kind in (pb.PART_KIND_TOKENS, pb.PART_KIND_LOGPROBS):
        return sum(counts) * _DTYPES.get(info.element_type, _U32).itemsize
    return MAX_META_SIZE if kind == pb.PART_KIND_META else 0


# --- encoding --------------------------------------------------------------------------------------


def text_body(rollouts: Sequence[Rollout]) -> bytes:
    """A serialized TextBody."""
    try:
        body = pb.TextBody(rollouts=[pb.RolloutText(text=rollout.text) for rollout in rollouts])
        return body.SerializeToString()
    except (ValueError, EncodeError) as error:  # a lone surrogate has no UTF-8
        raise PartUndecodableError(
            f"A text is not valid Unicode: {error}.", kind=pb.PART_KIND_TEXT
        ) from error


def _joined(field: str, values: Sequence[Any], counts: Sequence[int]) -> _Array:
    try:
        arrays = [np.asarray(value) for value in values]
    except (ValueError, TypeError, OverflowError) as error:
        raise PartUndecodableError(f"{field} of a rollout are not numbers: {error}.") from error
    for index, (array, count) in enumerate(zip(arrays, counts, strict=True)):
        if array.shape != (count,):
            raise CountMismatchError(
                f"{field} of rollout {index} have the shape {array.shape}; its token_count is {count}.",
                rollout=index,
            )
    return np.concatenate(arrays)


def token_bytes(values: Sequence[Any], counts: Sequence[int]) -> bytes:
    joined = _joined("token_ids", values, counts)
    if joined.dtype.kind not in "iu" or joined.min() < 0 or joined.max() >= 2**32:
        raise PartUndecodableError(
            "token_ids must be integers from 0 to 4294967295.", kind=pb.PART_KIND_TOKENS
        )
    return split_bytes(joined.astype(_U32, copy=False))


def logprob_bytes(
    rollouts: Sequence[Rollout], counts: Sequence[int], *, dtype: LogprobDtype
) -> tuple[bytes, list[float]]:
    joined = _joined("logprobs", [rollout.logprobs for rollout in rollouts], counts)
    if joined.dtype.kind not in "fiu":
        raise InvalidLogprobError("Log-probs must be real numbers.")
    values = joined.astype(np.float64, copy=False)
    # Comparisons with NaN are false, so this refuses NaN too.
    if not (values.max() <= 0 and values.min() > -np.inf):
        index = _rollout_of(int(np.argmin((values <= 0) & np.isfinite(values))), counts)
        raise InvalidLogprobError(
            f"A log-prob of rollout {index} is NaN, infinite or positive; check how it was computed.",
            rollout=index,
        )
    if values.min() <= -_OVERFLOW[dtype]:
        index = _rollout_of(int(np.argmin(values)), counts)
        raise InvalidLogprobError(
            f"A log-prob of rollout {index} is {values.min():g}, which {dtype} cannot hold; "
            f"check it, or encode as f32.",
            rollout=index,
        )
    ends = list(accumulate(counts))
    sums: list[float] = np.add.reduceat(values, [0, *ends[:-1]]).tolist()
    for index, (rollout, total) in enumerate(zip(rollouts, sums, strict=True)):
        # NaN means unstated.
        if abs(rollout.logprob_sum - total) > _STATED_SUM_SLACK * (1 + abs(total)):
            raise SumMismatchError(
                f"Rollout {index} states a log-prob sum of {rollout.logprob_sum:.6g}; "
                f"its log-probs add up to {total:.6g}.",
                rollout=index,
            )
    return values.astype(_DTYPES[LOGPROB_ELEMENT_TYPES[dtype]]).tobytes(), sums


def _rollout_of(position: int, counts: Sequence[int]) -> int:
    return next(index for index, end in enumerate(accumulate(counts)) if position < end)


def metadata_bytes(rollouts: Sequence[Rollout]) -> bytes:
    try:
        packed: bytes = msgpack.packb(
            [None if rollout.metadata is None else dict(rollout.metadata) for rollout in rollouts]
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise PartUndecodableError(
            f"Metadata must be maps of numbers, texts, bytes, lists and maps: {error}.",
            kind=pb.PART_KIND_META,
        ) from error
    return packed


def split_bytes(ids: _Array) -> bytes:
    """u32 values (N,) as four runs of N bytes, the lowest bytes first: what U32_SPLIT holds."""
    return ids.view(np.uint8).reshape(-1, 4).T.tobytes()


def joined_bytes(data: bytes) -> _Array:
    """The u32 values (N,) of four runs of N bytes; read-only."""
    runs = np.frombuffer(data, dtype=np.uint8).reshape(4, -1)
    values = np.empty((runs.shape[1], 4), dtype=np.uint8)
    for place in range(4):  # four times faster than copying the transposed array
        values[:, place] = runs[place]
    values.flags.writeable = False
    return values.view(_U32).reshape(-1)


# --- decoding --------------------------------------------------------------------------------------


def texts_of(part: tuple[pb.PartInfo, bytes] | None, count: int) -> list[str]:
    if part is None:
        return [""] * count
    found = _text_entries(part[1], limit=count)
    if found is not None and found > count:
        raise CountMismatchError(f"The text part holds more than {count} texts for {count} rollouts.")
    try:
        if found is None:
            raise DecodeError
        texts = [rollout.text for rollout in pb.TextBody.FromString(part[1]).rollouts]
    except DecodeError as error:
        raise PartUndecodableError(
            "The text part is not a TextBody of valid UTF-8.", kind=pb.PART_KIND_TEXT
        ) from error
    if len(texts) != count:
        raise CountMismatchError(f"The text part holds {len(texts)} texts for {count} rollouts.")
    return texts


def _text_entries(data: bytes, *, limit: int) -> int | None:
    """Entries of a TextBody, counted up to one more than `limit`; None if the bytes are something else.

    An empty entry takes two bytes here and a hundred when parsed, so they are counted first.
    """
    position = found = 0
    while position < len(data) and found <= limit:
        if data[position] != _ENTRY_TAG:
            return None
        size = shift = 0
        for byte in data[position + 1 : position + 6]:
            position += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        position += 1 + size
        found += 1
    return found if found > limit or position == len(data) else None


def numbers_of(part: tuple[pb.PartInfo, bytes] | None, ends: Sequence[int]) -> _Array | None:
    if part is None:
        return None
    info, data = part
    dtype = _DTYPES.get(info.element_type)
    if dtype is None or (dtype.kind == "u") != (info.kind == pb.PART_KIND_TOKENS):
        raise UnsupportedEncodingError(
            f"A part of kind {info.kind} with element type {info.element_type} is unknown here.",
            kind=info.kind,
            element_type=info.element_type,
        )
    total = ends[-1] if ends else 0
    if len(data) != total * dtype.itemsize:
        raise CountMismatchError(
            f"A part of kind {info.kind} holds {len(data)} bytes; "
            f"{total} tokens take {total * dtype.itemsize}.",
            kind=info.kind,
        )
    if info.element_type == pb.ELEMENT_TYPE_U32_SPLIT:
        return joined_bytes(data)
    return np.frombuffer(data, dtype=dtype)


def metadata_of(part: tuple[pb.PartInfo, bytes] | None, count: int) -> list[dict[str, Any] | None]:
    if part is None:
        return [None] * count
    try:
        unpacked = msgpack.unpackb(part[1])
    except (
        Exception
    ) as error:  # msgpack documents no closed set of exceptions; any of them is the bytes' fault
        raise PartUndecodableError("The metadata part is not msgpack.", kind=pb.PART_KIND_META) from error
    if not isinstance(unpacked, list) or len(unpacked) != count:
        raise CountMismatchError(f"The metadata part is not a list of {count} entries, one per rollout.")
    return [entry if isinstance(entry, dict) else None for entry in unpacked]
