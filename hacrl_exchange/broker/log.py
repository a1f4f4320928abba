"""The log a broker stands on: streams of small records, each with the bodies it names.

An engine keeps bodies where it likes; a record never says where. Calls block; the broker makes them off
the event loop, except `append`, which returns at once. Bodies are durable before the record that names
them is, and a record is durable when its future is done. The prompt sets live in the stream CATALOG,
every pool in a stream of its own, named by the pool's id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

CATALOG = "_catalog"


@dataclass(frozen=True, slots=True)
class Entry:
    """What is appended: an opaque payload, the key it is found by ("" for none), and its bodies."""

    payload: bytes
    key: str = ""
    bodies: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """What is read back. Positions count from 1 within a stream, without gaps."""

    position: int
    payload: bytes
    key: str
    body_sizes: tuple[int, ...]


class Log(Protocol):
    """An engine. One process has it open for writing at a time (DatabaseInUseError otherwise)."""

    def streams(self) -> list[str]:
        """Names of all streams that hold a record, sorted."""

    def last_position(self, stream: str) -> int:
        """The last durable position of a stream; 0 if it is empty."""

    def append(self, stream: str, entry: Entry, *, expected_position: int) -> Future[None]:
        """Queues an entry to become the one after `expected_position`.

        The future is done once the entry and its bodies are durable; entries of one stream become durable
        in order. It fails with LogFailedError if this entry or one before it in the stream could not be
        written; from then on every append to the stream fails until `recover`.
        """

    def recover(self, stream: str) -> int:
        """Forgets what was queued and failed; the last durable position, from which appends may go on."""

    def read(self, stream: str, *, after: int = 0) -> Iterator[StoredEntry]:
        """Entries after a position, in order, without their bodies."""

    def find(self, stream: str, prefix: str) -> list[StoredEntry]:
        """Entries whose key starts with a prefix, ordered by key, then position."""

    def read_bodies(
        self, stream: str, wanted: Sequence[tuple[int, Sequence[int]]]
    ) -> list[tuple[bytes, ...]]:
        """For each (position, indices of bodies): those bodies.

        Raises:
            StepRetiredError: the bodies were dropped.
            CorruptLogError: the file is shorter than the record says.
        """

    def save_snapshot(self, stream: str, position: int, payload: bytes) -> None:
        """Keeps a fold of the stream up to a position; replaces the one before."""

    def load_snapshot(self, stream: str) -> tuple[int, bytes] | None:
        """The newest snapshot and its position."""

    def drop_bodies(self, stream: str, *, through_position: int) -> int:
        """Deletes what whole segments hold of entries up to a position; the bytes given back."""

    def close(self) -> None:
        """Makes everything queued durable and lets go of the files."""
