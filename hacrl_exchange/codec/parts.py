"""Parts of a body: compressed alone, described by a PartInfo, decoded never past what it states.

What a part holds is the business of groups.py and of the broker's gate.
"""

from __future__ import annotations

import hashlib
import threading

import zstandard

from hacrl_exchange._pb import rollout_pb2 as pb
from hacrl_exchange.errors import (
    DigestMismatchError,
    PartTooLargeError,
    PartUndecodableError,
    SizeMismatchError,
    UnsupportedEncodingError,
)

MAX_DECODED_SIZE = 1 << 30
"""What a client decodes at most of one part, in bytes. The broker uses its own, smaller limit."""

# An encoder may leave the size out of the frame header; both spellings that zstd has for that.
_SIZE_UNSTATED = (-1, 2**64 - 1)


class _Engines(threading.local):
    """A compressor and a decompressor per thread: making one costs more than compressing a group."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()

    def compressor(self, level: int) -> zstandard.ZstdCompressor:
        found = self.compressors.get(level)
        if found is None:
            found = zstandard.ZstdCompressor(level=level, write_checksum=False)
            self.compressors[level] = found
        return found


_engines = _Engines()


def encode_part(
    kind: pb.PartKind.ValueType,
    data: bytes,
    *,
    element_type: pb.ElementType.ValueType = pb.ELEMENT_TYPE_UNSPECIFIED,
    level: int = 1,
) -> tuple[pb.PartInfo, bytes]:
    """Compresses a part, or keeps it as it is when zstd does not shrink it; returns description and bytes."""
    compression: pb.Compression.ValueType = pb.COMPRESSION_ZSTD
    stored = _engines.compressor(level).compress(data)
    if len(stored) >= len(data):
        compression, stored = pb.COMPRESSION_NONE, data
    info = pb.PartInfo(
        kind=kind,
        compression=compression,
        element_type=element_type,
        stored_size=len(stored),
        decoded_size=len(data),
        sha256=hashlib.sha256(stored).digest(),
    )
    return info, stored


def decode_part(info: pb.PartInfo, stored: bytes, *, max_decoded: int = MAX_DECODED_SIZE) -> bytes:
    """Returns the decoded bytes of a part, exactly `info.decoded_size` of them. Trusts nothing.

    Sizes are compared before anything is allocated: a frame that promises, or turns out to hold, more than
    the stated size never gets the memory for it.

    Raises:
        SizeMismatchError: the stored or decoded size is not what `info` states.
        PartTooLargeError: the stated decoded size is above `max_decoded`.
        DigestMismatchError: the stored bytes have another sha256.
        UnsupportedEncodingError: the compression is neither NONE nor ZSTD.
        PartUndecodableError: the bytes are not one whole zstd frame.
    """
    if info.stored_size != len(stored):
        raise SizeMismatchError(
            f"{part_title(info)} has {len(stored)} stored bytes; its description states {info.stored_size}.",
            kind=info.kind,
            stated=info.stored_size,
            actual=len(stored),
        )
    if info.decoded_size > max_decoded:
        raise PartTooLargeError(
            f"{part_title(info)} takes {info.decoded_size} bytes decoded; at most {max_decoded} are allowed.",
            kind=info.kind,
            size=info.decoded_size,
            limit=max_decoded,
        )
    if hashlib.sha256(stored).digest() != info.sha256:
        raise DigestMismatchError(
            f"The bytes of {part_title(info, start=False)} do not have the sha256 that its description "
            "states.",
            kind=info.kind,
        )
    if info.compression == pb.COMPRESSION_ZSTD:
        return _decompress(info, stored)
    if info.compression != pb.COMPRESSION_NONE:
        raise UnsupportedEncodingError(
            f"{part_title(info)} has compression {info.compression}, which is unknown here; "
            "use NONE or ZSTD.",
            kind=info.kind,
            compression=info.compression,
        )
    if len(stored) != info.decoded_size:
        raise _wrong_decoded_size(info, len(stored))
    return stored


def _decompress(info: pb.PartInfo, stored: bytes) -> bytes:
    size = info.decoded_size
    try:
        # A size in the header decides how much is allocated, so it is compared first. Without one,
        # max_output_size bounds the allocation and a larger content is an error.
        promised = zstandard.frame_content_size(stored)
        if promised not in _SIZE_UNSTATED and promised != size:
            raise _wrong_decoded_size(info, promised)
        decoded = _engines.decompressor.decompress(
            stored, max_output_size=max(size, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise PartUndecodableError(
            f"{part_title(info)} is not one whole zstd frame of at most {size} bytes: {error}.",
            kind=info.kind,
        ) from error
    if len(decoded) != size:
        raise _wrong_decoded_size(info, len(decoded))
    return decoded


def part_title(info: pb.PartInfo, *, start: bool = True) -> str:
    known = info.kind in pb.PartKind.values()
    name = pb.PartKind.Name(info.kind).removeprefix("PART_KIND_").lower() if known else str(info.kind)
    return f"{'The' if start else 'the'} {name} part"


def _wrong_decoded_size(info: pb.PartInfo, actual: int) -> SizeMismatchError:
    return SizeMismatchError(
        f"{part_title(info)} decodes to {actual} bytes; its description states {info.decoded_size}.",
        kind=info.kind,
        stated=info.decoded_size,
        actual=actual,
    )
