"""The embedded engine of the log: records in SQLite, bodies in segment files, one folder.

This module is its face and its readers; sqlite_writer.py writes, sqlite_schema.py opens. Readers have
connections of their own and never wait for the writer. What they see is durable.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from hacrl_exchange.broker.log import Entry, StoredEntry
from hacrl_exchange.broker.segments import SEGMENT_BYTES, Files, Location, OsFiles, Range, read_ranges
from hacrl_exchange.broker.sqlite_schema import (
    DATABASE_NAME,
    SEGMENTS_NAME,
    check_version,
    collect_orphans,
    connect_for_reading,
    connect_for_writing,
    lock_folder,
)
from hacrl_exchange.broker.sqlite_writer import Append, BatchWriter, Drop, Recover, SaveSnapshot
from hacrl_exchange.errors import CorruptLogError, LogFailedError, StepRetiredError

_READ_ROWS = 512
_STREAM_NAME = re.compile(r"^[a-z0-9_][a-z0-9_-]{0,127}$")  # also the name of a folder
_ID = "(SELECT id FROM streams WHERE name = ?)"


def open_for_reading(folder: Path) -> SqliteReader:
    """Reads the data folder of a broker, running or not.

    Raises:
        LogFailedError: there is none, or it cannot be read.
        DatabaseTooNewError: a newer version wrote it.
    """
    path = folder / DATABASE_NAME
    if not path.is_file():
        raise LogFailedError(
            f"{folder} is no data folder of a broker: there is no {path.name}.", folder=folder
        )
    try:
        with contextlib.closing(connect_for_reading(folder)) as connection:
            check_version(connection, path)
    except sqlite3.Error as error:
        raise LogFailedError(f"{path} cannot be read ({error}).", folder=folder) from error
    return SqliteReader(folder)


def open_sqlite_log(
    folder: Path,
    *,
    files: Files | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    busy_seconds: float = 10.0,
) -> SqliteLog:
    """Opens the data folder for writing, making it if need be, and deletes what was never committed.

    `busy_seconds` is how long the writer waits for a lock that somebody else holds on the database.

    Raises:
        DatabaseInUseError: another process has it open.
        DatabaseTooNewError: a newer version wrote it.
        CorruptLogError: its database is not ours.
        LogFailedError: the disk does not let us.
    """
    files = files or OsFiles()
    lock = -1
    try:
        folder = folder.absolute()
        (folder / SEGMENTS_NAME).mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        connection = connect_for_writing(folder, busy_seconds=busy_seconds)
        try:
            collect_orphans(connection, folder, files=files)
            files.sync_folder(folder)
            files.sync_folder(folder.parent)
        except BaseException:
            connection.close()
            raise
    except BaseException as error:
        if lock >= 0:
            os.close(lock)
        if isinstance(error, (OSError, sqlite3.Error)):
            raise LogFailedError(
                f"The data folder {folder} cannot be opened ({error}). Check the disk and its permissions.",
                folder=folder,
            ) from error
        raise
    writer = BatchWriter(
        folder, connection, files=files, segment_bytes=segment_bytes, busy_seconds=busy_seconds
    )
    return SqliteLog(folder, writer, lock=lock)


class SqliteReader:
    """Reads a data folder, also one that another process writes. Safe for use by many threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._idle: deque[sqlite3.Connection] = deque()
        self._closed = False

    def streams(self) -> list[str]:
        """Names of all streams that hold a record, sorted."""
        with self._connection() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM streams ORDER BY name")]

    def last_position(self, stream: str) -> int:
        """The last durable position of a stream; 0 if it is empty."""
        with self._connection() as connection:
            query = f"SELECT COALESCE(MAX(position), 0) FROM records WHERE stream = {_ID}"
            (position,) = connection.execute(query, (stream,)).fetchone()
            return int(position)

    def read(self, stream: str, *, after: int = 0) -> Iterator[StoredEntry]:
        """Entries after a position, in order, without their bodies. Holds no transaction between rows, so
        that a slow reader does not keep the WAL from being reset."""
        query = (
            f"SELECT position, payload, key, sizes FROM records WHERE stream = {_ID} AND position > ?"
            f" ORDER BY position LIMIT {_READ_ROWS}"
        )
        while True:
            with self._connection() as connection:
                rows = connection.execute(query, (stream, after)).fetchall()
            for row in rows:
                yield _stored(row)
            if len(rows) < _READ_ROWS:
                return
            after = rows[-1][0]

    def find(self, stream: str, prefix: str) -> list[StoredEntry]:
        """Entries whose key starts with a prefix, ordered by key, then position."""
        query = (
            f"SELECT position, payload, key, sizes FROM records WHERE stream = {_ID} AND key <> ''"
            " AND key >= ? AND key < ? ORDER BY key, position"
        )
        with self._connection() as connection:
            rows = connection.execute(query, (stream, prefix, f"{prefix}\U0010ffff")).fetchall()
        return [_stored(row) for row in rows]

    def read_bodies(
        self, stream: str, wanted: Sequence[tuple[int, Sequence[int]]]
    ) -> list[tuple[bytes, ...]]:
        """For each (position, indices of bodies): those bodies.

        Raises:
            StepRetiredError: the bodies were dropped.
            CorruptLogError: a file is missing or shorter than the record says, or there is no such body.
        """
        placed, listed = self._places(stream, [position for position, _ in wanted])
        ranges = []
        for number, (position, indices) in enumerate(wanted):
            segment, offset, sizes = placed.get(position, (0, 0, []))
            if any(not 0 <= index < len(sizes) for index in indices):
                raise CorruptLogError(
                    f"Record {position} of {stream} has {len(sizes)} bodies, not those that were asked for. "
                    f"Restore the data folder from a copy.",
                    stream=stream,
                    position=position,
                )
            if indices and segment not in listed:
                raise _retired(stream, position)
            starts = [offset]
            for size in sizes:
                starts.append(starts[-1] + size)
            ranges += [Range(segment, starts[i], sizes[i], (number, i)) for i in indices]
        try:
            found = read_ranges(self._folder / SEGMENTS_NAME / stream, ranges)
        except FileNotFoundError as error:
            _, listed = self._places(stream, [])
            for position, indices in wanted:
                if indices and placed[position][0] not in listed:  # dropped a moment ago
                    raise _retired(stream, position) from error
            raise CorruptLogError(
                f"A segment of {stream} is gone ({error.filename}). Restore the data folder from a copy.",
                stream=stream,
            ) from error
        return [tuple(found[number, i] for i in indices) for number, (_, indices) in enumerate(wanted)]

    def load_snapshot(self, stream: str) -> tuple[int, bytes] | None:
        """The newest snapshot and its position."""
        with self._connection() as connection:
            query = f"SELECT position, payload FROM snapshots WHERE stream = {_ID}"
            row = connection.execute(query, (stream,)).fetchone()
        return (int(row[0]), bytes(row[1])) if row else None

    def extent(self, stream: str) -> tuple[int, dict[int, int]]:
        """The last position, and the committed end of each segment that is not retired, as of one moment."""
        query = (
            f"SELECT (SELECT COALESCE(MAX(position), 0) FROM records WHERE stream = {_ID}),"
            f" (SELECT json_group_array(json_array(number, end)) FROM segments WHERE stream = {_ID})"
        )
        with self._connection() as connection:
            position, ends = connection.execute(query, (stream, stream)).fetchone()
        return position, {number: end for number, end in json.loads(ends)}

    def places(self, stream: str, positions: Sequence[int]) -> dict[int, Location]:
        """Where the bodies of records lie; not for those that have none."""
        placed, _ = self._places(stream, positions)
        return {
            position: Location(segment, offset)
            for position, (segment, offset, _) in placed.items()
            if segment
        }

    def close(self) -> None:
        """Lets go of the database; a call under way in another thread ends first by itself."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _places(
        self, stream: str, positions: Sequence[int]
    ) -> tuple[dict[int, tuple[int, int, list[int]]], set[int]]:
        """Segment, offset and sizes by position, and the segments that exist, as of one moment.

        One row of JSON, because each row that SQLite steps to costs a hand-over of the interpreter lock.
        """
        rows = (
            "SELECT json_group_array(json_array(position, segment, offset, json(sizes))) FROM records"
            f" WHERE stream = {_ID} AND position IN (SELECT value FROM json_each(?))"
        )
        listed = f"SELECT json_group_array(number) FROM segments WHERE stream = {_ID}"
        with self._connection() as connection:
            found = connection.execute(
                f"SELECT ({rows}), ({listed})", (stream, json.dumps(list(positions)), stream)
            ).fetchone()
        places = {
            position: (segment, offset, sizes) for position, segment, offset, sizes in json.loads(found[0])
        }
        return places, set(json.loads(found[1]))

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for the while; as many exist as were ever used at once."""
        if self._closed:
            raise LogFailedError(
                "The log is closed: the broker is shutting down. Retry soon.", retry_seconds=1.0
            )
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = connect_for_reading(self._folder)
        try:
            yield connection
        except sqlite3.DatabaseError as error:
            connection.close()
            if isinstance(error, sqlite3.OperationalError):
                raise LogFailedError(
                    f"The log could not be read ({error}). Retry soon; if it goes on, check the disk.",
                    retry_seconds=1.0,
                ) from error
            raise CorruptLogError(
                f"The database is damaged ({error}). Restore the data folder from a copy."
            ) from error
        except BaseException:
            connection.close()
            raise
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)


class SqliteLog(SqliteReader):
    """The embedded engine, open for reading and writing: what broker/log.py calls a Log."""

    def __init__(self, folder: Path, writer: BatchWriter, *, lock: int) -> None:
        super().__init__(folder)
        self._writer = writer
        self._lock = lock

    def append(self, stream: str, entry: Entry, *, expected_position: int) -> Future[None]:
        """Queues an entry; see Log.append.

        Raises:
            ValueError: the stream's name cannot be a folder's.
        """
        future: Future[None] = Future()
        self._writer.put(Append(_checked(stream), entry, expected_position, future))
        return future

    def recover(self, stream: str) -> int:
        """Forgets what was queued and failed; the last durable position.

        Raises:
            LogFailedError: the disk still does not let us.
        """
        future: Future[int] = Future()
        self._writer.put(Recover(_checked(stream), future))
        return future.result()

    def save_snapshot(self, stream: str, position: int, payload: bytes) -> None:
        """Keeps a fold of the stream up to a position; replaces the one before.

        Raises:
            LogFailedError: it is not kept.
        """
        future: Future[None] = Future()
        self._writer.put(SaveSnapshot(_checked(stream), position, payload, future))
        future.result()

    def drop_bodies(self, stream: str, *, through_position: int) -> int:
        """Deletes segments that hold nothing after a position; the bytes given back.

        Raises:
            LogFailedError: nothing was deleted.
        """
        future: Future[int] = Future()
        self._writer.put(Drop(_checked(stream), through_position, future))
        return future.result()

    def close(self) -> None:
        """Makes everything queued durable and lets go of the files."""
        self._writer.stop()
        super().close()
        self._writer.close()  # last: only a connection that may write moves the WAL into the database
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _stored(row: tuple[int, bytes, str, str]) -> StoredEntry:
    position, payload, key, sizes = row
    return StoredEntry(position, payload, key, tuple(json.loads(sizes)) if sizes != "[]" else ())


def _checked(stream: str) -> str:
    if not _STREAM_NAME.match(stream):
        raise ValueError(f"{stream!r} cannot name a stream: use a-z, 0-9, '-' and '_'")
    return stream


def _retired(stream: str, position: int) -> StepRetiredError:
    return StepRetiredError(
        f"The bodies of record {position} of {stream} were deleted by the pool's retention.",
        stream=stream,
        position=position,
    )
