"""Segment files: where the embedded engine keeps the bodies of a stream, and nothing else.

A stream has a folder of append-only files `<number>.seg`, numbered from 1. The end of each file that counts
is known to the database alone: bytes after it were never committed. Here is every call that writes, syncs or
deletes such a file; which bytes belong to which record is the business of sqlite_log.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hacrl_exchange.errors import CorruptLogError

SEGMENT_BYTES = 64 * 1024 * 1024

_MAX_BUFFERS = 1024  # IOV_MAX of Linux: buffers of one call
_MAX_GAP_BYTES = 32 * 1024  # reading this much too much is cheaper than another call
_MAX_READ_BYTES = 8 * 1024 * 1024
_NAME = re.compile(r"^(\d{8,})\.seg$")


class Files(Protocol):
    """The calls that change disks. A test passes one that fails when it should."""

    def create(self, path: Path) -> int:
        """Makes an empty file, or empties the one that is there; a descriptor for writing."""

    def write(self, descriptor: int, buffers: Sequence[bytes], offset: int) -> int:
        """Writes from an offset on; how many bytes went out, maybe fewer than given."""

    def sync(self, descriptor: int) -> None:
        """Makes a file's bytes and size durable."""

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable."""

    def truncate(self, path: Path, size: int) -> None:
        """Cuts a file."""

    def unlink(self, path: Path) -> None:
        """Deletes a file."""


class OsFiles:
    """The operating system's."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)

    def write(self, descriptor: int, buffers: Sequence[bytes], offset: int) -> int:
        return os.pwritev(descriptor, buffers, offset)

    def sync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def sync_folder(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(path, size)

    def unlink(self, path: Path) -> None:
        path.unlink()


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bodies of an entry lie, one after the other."""

    segment: int
    offset: int


def segment_path(folder: Path, number: int) -> Path:
    """The file of a segment in its stream's folder."""
    return folder / f"{number:08d}.seg"


def segment_numbers(folder: Path) -> dict[int, Path]:
    """The segment files of a stream's folder by number; other files are none of our business."""
    if not folder.is_dir():
        return {}
    found = ((_NAME.match(path.name), path) for path in sorted(folder.iterdir()))
    return {int(match.group(1)): path for match, path in found if match}


class SegmentWriter:
    """Appends bodies to the newest segment of one stream. Used by one thread.

    `place` decides where bodies go and keeps them; `flush` makes all that was placed durable; then either
    `confirm` or `roll_back`. A segment whose write or sync failed is never appended to again: after a failed
    fdatasync nobody knows what the kernel kept.
    """

    def __init__(self, folder: Path, *, number: int, end: int, files: Files, limit_bytes: int) -> None:
        self._folder = folder
        self._files = files
        self._limit_bytes = limit_bytes
        self._durable = Location(number, end)
        self._planned = self._durable
        self._staged: dict[int, list[bytes]] = {}
        self._starts: dict[int, int] = {}
        self._descriptor = -1
        self._descriptor_number = 0

    @property
    def planned(self) -> Location:
        """Where the next body would go, rotation aside."""
        return self._planned

    def place(self, bodies: Sequence[bytes]) -> Location:
        """Takes the bodies of one entry; they stay together in one segment."""
        size = sum(map(len, bodies))
        at = self._planned
        if at.segment == 0 or (at.offset > 0 and at.offset + size > self._limit_bytes):
            at = Location(at.segment + 1, 0)
        self._staged.setdefault(at.segment, []).extend(bodies)
        self._starts.setdefault(at.segment, at.offset)
        self._planned = Location(at.segment, at.offset + size)
        return at

    def flush(self) -> None:
        """Writes and syncs what was placed.

        Raises:
            OSError: it is not durable; call roll_back.
        """
        for number, buffers in self._staged.items():
            if not any(buffers):
                continue
            self._open(number)
            offset = self._starts[number]
            for chunk in _chunks(buffers):
                offset = self._write(chunk, offset)
            self._files.sync(self._descriptor)

    def confirm(self) -> None:
        """What was placed is committed."""
        self._durable = self._planned
        self._staged.clear()
        self._starts.clear()

    def roll_back(self) -> None:
        """Forgets what was placed and cuts it off; the next body begins a new segment."""
        self._close_descriptor()
        self._staged.clear()
        self._starts.clear()
        for number, path in segment_numbers(self._folder).items():
            if number > self._durable.segment:
                self._files.unlink(path)
            elif number == self._durable.segment and path.stat().st_size > self._durable.offset:
                self._files.truncate(path, self._durable.offset)
        self.start_segment(self._durable.segment + 1)

    def start_segment(self, number: int) -> None:
        """The next body begins this segment; nothing may be staged."""
        self._close_descriptor()
        self._durable = self._planned = Location(number, 0)

    def close(self) -> None:
        """Lets go of the file."""
        self._close_descriptor()

    def _open(self, number: int) -> None:
        if self._descriptor_number == number:
            return
        self._close_descriptor()
        path = segment_path(self._folder, number)
        if self._starts[number] > 0:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        else:
            self._folder.mkdir(exist_ok=True)
            self._descriptor = self._files.create(path)
            self._files.sync_folder(self._folder)
            self._files.sync_folder(self._folder.parent)
        self._descriptor_number = number

    def _write(self, buffers: list[bytes], offset: int) -> int:
        """Writes all of the buffers, however often the kernel stops half-way; the offset after them."""
        end = offset + sum(map(len, buffers))
        written = self._files.write(self._descriptor, buffers, offset)
        while offset + written < end:
            if written == 0:
                raise OSError("the disk took no more bytes of a segment")
            rest = b"".join(buffers)[written:]
            buffers, offset = [rest], offset + written
            written = self._files.write(self._descriptor, buffers, offset)
        return end

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._descriptor_number = -1, 0


def _chunks(buffers: list[bytes]) -> Iterator[list[bytes]]:
    filled = [buffer for buffer in buffers if buffer]
    for start in range(0, len(filled), _MAX_BUFFERS):
        yield filled[start : start + _MAX_BUFFERS]


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a segment that somebody wants, and which of their wishes it is."""

    segment: int
    offset: int
    size: int
    tag: tuple[int, int]


def read_ranges(folder: Path, ranges: Sequence[Range]) -> dict[tuple[int, int], bytes]:
    """The bytes of each range by its tag. Neighbours are read in one call.

    Raises:
        FileNotFoundError: a segment is not there.
        CorruptLogError: a segment ends before a range does.
    """
    found: dict[tuple[int, int], bytes] = {wanted.tag: b"" for wanted in ranges if wanted.size == 0}
    ordered = sorted((r for r in ranges if r.size), key=lambda r: (r.segment, r.offset))
    descriptor, number = -1, 0
    try:
        for run in _runs(ordered):
            if run[0].segment != number:
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                number = run[0].segment
                descriptor = os.open(segment_path(folder, number), os.O_RDONLY | os.O_CLOEXEC)
            start = run[0].offset
            end = max(r.offset + r.size for r in run)
            data = memoryview(_read_fully(descriptor, start, end - start))
            if len(data) < end - start:
                raise CorruptLogError(
                    f"Segment {number} of {folder.name} ends at byte {start + len(data)}, but a record "
                    f"has bodies up to byte {end}. Restore the data folder from a copy.",
                    stream=folder.name,
                    segment=number,
                )
            for r in run:
                found[r.tag] = bytes(data[r.offset - start : r.offset - start + r.size])
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    return found


def _runs(ordered: Sequence[Range]) -> Iterator[list[Range]]:
    """Cuts sorted ranges into runs that are worth one read each."""
    run: list[Range] = []
    for wanted in ordered:
        if run:
            end = run[-1].offset + run[-1].size
            together = (
                wanted.segment == run[0].segment
                and wanted.offset - end <= _MAX_GAP_BYTES
                and wanted.offset + wanted.size - run[0].offset <= _MAX_READ_BYTES
            )
            if not together:
                yield run
                run = []
        run.append(wanted)
    if run:
        yield run


def _read_fully(descriptor: int, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    pieces = [data]  # a read may stop early, at 2 GiB or by a signal
    done = len(data)
    while done < size and (data := os.pread(descriptor, size - done, offset + done)):
        pieces.append(data)
        done += len(data)
    return b"".join(pieces)
