"""The one thread that writes the embedded engine: it commits whatever is queued, together.

A batch is: bodies into the segments, one sync per segment, one transaction with the records, and only then
are the futures done. If any of it fails, the batch is undone and each of its streams refuses appends until
it is recovered. Callers only queue. Reading is the business of sqlite_log.py.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeAlias

from hacrl_exchange.broker.log import Entry
from hacrl_exchange.broker.segments import Files, SegmentWriter, segment_path
from hacrl_exchange.broker.sqlite_schema import SEGMENTS_NAME, commit_something, connect_for_writing
from hacrl_exchange.errors import LogFailedError

_log = logging.getLogger(__name__)

_BATCH_BYTES = 32 * 1024 * 1024
_BATCH_ITEMS = 4096

# Rows of one INSERT: each step of SQLite gives up the interpreter lock, and getting it back from a busy
# event loop takes up to a switch interval, so that row by row a batch could wait for seconds.
_ROW = "(?, ?, ?, ?, ?, ?, ?)"
_INSERTS = tuple(
    (count, f"INSERT INTO records VALUES {', '.join([_ROW] * count)}") for count in (256, 64, 16, 4, 1)
)


@dataclass(frozen=True, slots=True)
class Append:
    """An entry to become the one after `expected_position`."""

    stream: str
    entry: Entry
    expected_position: int
    future: Future[None]


@dataclass(frozen=True, slots=True)
class SaveSnapshot:
    """A fold of the stream up to a position."""

    stream: str
    position: int
    payload: bytes
    future: Future[None]


@dataclass(frozen=True, slots=True)
class Recover:
    """Lets a failed stream go on; the result is its last durable position."""

    stream: str
    future: Future[int]


@dataclass(frozen=True, slots=True)
class Drop:
    """Deletes segments that hold nothing after a position; the result is the bytes given back."""

    stream: str
    through_position: int
    future: Future[int]


Item: TypeAlias = Append | SaveSnapshot | Recover | Drop


@dataclass(slots=True)
class _Stream:
    """What the writer knows of a stream, what is being committed included. `failure` says why it refuses
    appends. `ends`: of segments the batch touches, the new end and last position."""

    name: str
    id: int
    stored: bool
    position: int
    segments: SegmentWriter
    failure: str = ""
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)


class BatchWriter:
    """Owns the writing connection, the segments and the thread."""

    def __init__(
        self,
        folder: Path,
        connection: sqlite3.Connection,
        *,
        files: Files,
        segment_bytes: int,
        busy_seconds: float,
    ) -> None:
        self._folder = folder
        self._connection = connection
        self._files = files
        self._segment_bytes = segment_bytes
        self._busy_seconds = busy_seconds
        self._streams: dict[str, _Stream] = {}
        self._queue: SimpleQueue[Item | None] = SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log writer")
        self._thread.daemon = True  # a broker that dies with an error must not wait for its log
        self._thread.start()

    def put(self, item: Item) -> None:
        """Queues; the item's future tells the rest. Its future fails at once if the log is closed."""
        item.future.set_running_or_notify_cancel()
        with self._closing:
            if not self._closed:
                self._queue.put(item)
                return
        item.future.set_exception(_failed(item.stream, "the log is closed"))

    def stop(self) -> None:
        """Writes everything queued; nothing is taken any more."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def close(self) -> None:
        """Lets go of the files, after `stop`."""
        for stream in self._streams.values():
            stream.segments.close()
        self._connection.close()

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        batch: list[Append | SaveSnapshot] = []
        while True:
            following, more = self._take(batch)
            if batch:
                self._write(batch)
                batch = []
            if following is not None:
                self._answer(following)
            if not more:
                return

    def _take(self, batch: list[Append | SaveSnapshot]) -> tuple[Recover | Drop | None, bool]:
        """Fills a batch with what is queued, up to a limit or an item that must come after it (returned).
        Waits for the first item. False: nothing comes after this."""
        size = 0
        item = self._queue.get()
        while True:
            match item:
                case None:
                    return None, False
                case Recover() | Drop():
                    return item, True
                case Append():
                    size += len(item.entry.payload) + sum(map(len, item.entry.bodies))
                case SaveSnapshot():
                    size += len(item.payload)
            batch.append(item)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_ITEMS:
                return None, True
            try:
                item = self._queue.get_nowait()
            except Empty:
                return None, True

    def _write(self, batch: list[Append | SaveSnapshot]) -> None:
        """Makes a batch durable, or none of it."""
        accepted: list[Append | SaveSnapshot] = []
        touched: dict[str, _Stream] = {}
        try:
            rows: list[object] = []
            snapshots: list[tuple[str, int, bytes]] = []
            for item in batch:
                stream = self._stream(item.stream)
                if self._refuse(stream, item):
                    continue
                accepted.append(item)
                touched[stream.name] = stream
                if isinstance(item, Append):
                    rows += _place(stream, item.entry)
                else:
                    snapshots.append((stream.name, item.position, item.payload))
            if accepted:
                for stream in touched.values():
                    stream.segments.flush()
                self._commit(rows, snapshots, touched)
        except Exception as error:  # the thread's boundary: whatever failed, callers must hear of it
            self._give_up(batch, error)
            return
        for stream in touched.values():
            stream.segments.confirm()
            stream.ends.clear()
            stream.stored = True
        for item in accepted:
            item.future.set_result(None)

    def _refuse(self, stream: _Stream, item: Append | SaveSnapshot) -> bool:
        """Fails an item whose stream failed, or that does not fit onto its stream."""
        if not stream.failure and isinstance(item, Append) and item.expected_position != stream.position:
            stream.failure = f"position {item.expected_position} was expected, it is at {stream.position}"
        why = stream.failure
        if not why and isinstance(item, SaveSnapshot) and not 0 < item.position <= stream.position:
            why = f"a snapshot of position {item.position} does not belong to position {stream.position}"
        if why:
            item.future.set_exception(_failed(stream.name, why))
        return bool(why)

    def _commit(
        self, rows: list[object], snapshots: list[tuple[str, int, bytes]], touched: dict[str, _Stream]
    ) -> None:
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        start = 0
        left = len(rows) // 7
        for count, statement in _INSERTS:
            while left >= count:
                run(statement, rows[start : start + 7 * count])
                start += 7 * count
                left -= count
        for stream in touched.values():
            if not stream.stored:
                run("INSERT INTO streams VALUES (?, ?)", (stream.id, stream.name))
            for number, (end, position) in stream.ends.items():
                run("INSERT OR REPLACE INTO segments VALUES (?, ?, ?, ?)", (stream.id, number, end, position))
        for name, position, payload in snapshots:
            run("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)", (touched[name].id, position, payload))
        run("COMMIT")

    def _give_up(self, batch: list[Append | SaveSnapshot], error: Exception) -> None:
        _log.error("the log could not be written; its pools go back to what is durable", exc_info=error)
        self._undo()
        for item in batch:
            stream = self._streams.get(item.stream)
            if stream is not None and not stream.failure:
                stream.failure = str(error) or type(error).__name__
            if not item.future.done():
                item.future.set_exception(_failed(item.stream, str(error)))

    def _undo(self) -> None:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            _log.warning("the failed transaction could not be rolled back: %s", error)

    # --- streams -------------------------------------------------------------------------------

    def _stream(self, name: str) -> _Stream:
        stream = self._streams.get(name)
        if stream is None:
            stream = self._streams[name] = self._load(name)
        return stream

    def _load(self, name: str) -> _Stream:
        """A stream as it is on disk. A new one gets an id, stored with its first record."""
        run = self._connection.execute
        row = run("SELECT id FROM streams WHERE name = ?", (name,)).fetchone()
        folder = self._folder / SEGMENTS_NAME / name
        number, end, position = 0, 0, 0
        if row is not None:
            (position,) = run("SELECT MAX(position) FROM records WHERE stream = ?", row).fetchone()
            newest = "SELECT number, end FROM segments WHERE stream = ? ORDER BY number DESC LIMIT 1"
            number, end = run(newest, row).fetchone() or (0, 0)
            path = segment_path(folder, number)
            if end > 0 and (not path.exists() or path.stat().st_size < end):
                number, end = number + 1, 0  # damaged: leave it to the audit, never write behind a hole
            stream_id = int(row[0])
        else:
            (highest,) = run("SELECT COALESCE(MAX(id), 0) FROM streams").fetchone()
            stream_id = 1 + max(highest, *(stream.id for stream in self._streams.values()), 0)
        segments = SegmentWriter(
            folder, number=number, end=end, files=self._files, limit_bytes=self._segment_bytes
        )
        return _Stream(name, stream_id, row is not None, position, segments)

    def _answer(self, item: Recover | Drop) -> None:
        """Does what must not share a batch, and tells its future."""
        try:
            result = self._recover(item.stream) if isinstance(item, Recover) else self._drop(item)
        except Exception as error:  # the thread's boundary, as in _write
            _log.error("the log of %s could not be put in order", item.stream, exc_info=error)
            self._undo()
            item.future.set_exception(_failed(item.stream, str(error)))
        else:
            item.future.set_result(result)

    def _recover(self, name: str) -> int:
        failed = self._streams.get(name)
        if failed is None or not failed.failure:
            return self._stream(name).position
        # A commit that failed may still lie in the WAL, whole. Overwrite it before its bodies are cut off.
        try:
            commit_something(self._connection)
        except sqlite3.Error:
            self._undo()
            self._connection.close()
            self._connection = connect_for_writing(self._folder, busy_seconds=self._busy_seconds)
        failed.segments.close()
        fresh = self._load(name)
        fresh.segments.roll_back()
        self._streams[name] = fresh
        return fresh.position

    def _drop(self, item: Drop) -> int:
        stream = self._stream(item.stream)
        if not stream.stored:
            return 0
        run = self._connection.execute
        found = run(
            "SELECT number, end, last_position FROM segments WHERE stream = ?", (stream.id,)
        ).fetchall()
        gone = {number: end for number, end, last in found if 0 < last <= item.through_position}
        if not gone:
            return 0
        newest = max(number for number, _, _ in found)
        run("BEGIN IMMEDIATE")
        if newest in gone:  # numbers are never used twice: its successor is listed before it goes
            newest = max(newest + 1, stream.segments.planned.segment)
            run("INSERT INTO segments VALUES (?, ?, 0, 0)", (stream.id, newest))
        for number in gone:
            run("DELETE FROM segments WHERE stream = ? AND number = ?", (stream.id, number))
        run("COMMIT")
        if stream.segments.planned.segment < newest:
            stream.segments.start_segment(newest)
        self._unlink(self._folder / SEGMENTS_NAME / item.stream, gone)
        return sum(gone.values())

    def _unlink(self, folder: Path, numbers: Iterable[int]) -> None:
        try:
            for number in numbers:
                path = segment_path(folder, number)
                if path.exists():
                    self._files.unlink(path)
            self._files.sync_folder(folder)
        except OSError as error:  # retired all the same: the next opening collects what is left
            _log.warning("retired segments of %s could not be deleted: %s", folder.name, error)


def _place(stream: _Stream, entry: Entry) -> tuple[object, ...]:
    """Gives an entry its position and its bodies their place; the row."""
    stream.position += 1
    if not entry.bodies:
        return (stream.id, stream.position, entry.key, entry.payload, 0, 0, "[]")
    at = stream.segments.place(entry.bodies)
    stream.ends[at.segment] = (stream.segments.planned.offset, stream.position)
    sizes = f"[{','.join([str(len(body)) for body in entry.bodies])}]"
    return (stream.id, stream.position, entry.key, entry.payload, at.segment, at.offset, sizes)


def _failed(stream: str, why: str) -> LogFailedError:
    return LogFailedError(
        f"The log of {stream} could not be written ({why}); nothing of it was accepted. Retry soon; if it "
        f"goes on, the operator must check the disk.",
        retry_seconds=1.0,
        stream=stream,
    )
