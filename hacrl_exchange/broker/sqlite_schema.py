"""The data folder of the embedded engine: its lock, its tables, and putting it in order at opening.

    records.db     SQLite in WAL mode: streams, records, ends of segments, snapshots
    segments/      bodies, a folder per stream
    lock           held with flock by the process that writes

Nothing here reads records or bodies: opening costs the same however long the history is.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from hacrl_exchange.broker.segments import Files, segment_numbers
from hacrl_exchange.errors import CorruptLogError, DatabaseInUseError, DatabaseTooNewError

SCHEMA_VERSION = 1
DATABASE_NAME = "records.db"
SEGMENTS_NAME = "segments"

# Sizes are a JSON array: one step of SQLite then gives many of them, and an operator can read them.
# `segments.end` is what counts of a file; `last_position` the last record with bodies there (0: none yet).
# A segment that is not listed any more was retired. `commits.count` is raised where a commit is wanted.
_TABLES = (
    "CREATE TABLE streams (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE TABLE records (stream INTEGER NOT NULL, position INTEGER NOT NULL, key TEXT NOT NULL,"
    " payload BLOB NOT NULL, segment INTEGER NOT NULL, offset INTEGER NOT NULL, sizes TEXT NOT NULL)",
    "CREATE UNIQUE INDEX records_by_position ON records (stream, position)",
    "CREATE INDEX records_by_key ON records (stream, key, position) WHERE key <> ''",
    "CREATE TABLE segments (stream INTEGER NOT NULL, number INTEGER NOT NULL, end INTEGER NOT NULL,"
    " last_position INTEGER NOT NULL, PRIMARY KEY (stream, number)) WITHOUT ROWID",
    "CREATE TABLE snapshots (stream INTEGER PRIMARY KEY, position INTEGER NOT NULL, payload BLOB NOT NULL)",
    "CREATE TABLE commits (count INTEGER NOT NULL)",
    "INSERT INTO commits VALUES (0)",
)


def lock_folder(folder: Path) -> int:
    """Makes this process the folder's writer; the descriptor that holds the lock.

    Raises:
        DatabaseInUseError: another process is.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise DatabaseInUseError(
            f"The data folder {folder} is in use by process {owner}. Stop it, or use another folder.",
            folder=folder,
            process=owner,
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
    return descriptor


def connect_for_writing(folder: Path, *, busy_seconds: float) -> sqlite3.Connection:
    """The connection of the one writer, with our tables in it.

    Raises:
        DatabaseTooNewError: a newer version wrote the database; nothing was touched.
        CorruptLogError: the file is not our database.
    """
    path = folder / DATABASE_NAME
    connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None, check_same_thread=False)
    try:
        check_version(connection, path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if not _has_tables(connection):
            connection.execute("BEGIN IMMEDIATE")
            for statement in _TABLES:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            connection.execute("COMMIT")
        # After a kill the WAL may hold commits that were written but not synced. Readers must not see
        # them before they are durable, and this commit syncs all of it.
        commit_something(connection)
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise CorruptLogError(
            f"{path} is not a database of the exchange ({error}). Restore the data folder from a copy.",
            path=path,
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def connect_for_reading(folder: Path) -> sqlite3.Connection:
    """A connection that cannot write; for any one thread at a time."""
    uri = f"{(folder / DATABASE_NAME).absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=10.0, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA query_only = ON")
    return connection


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Refuses a database that a newer version wrote.

    Raises:
        DatabaseTooNewError: it did.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise DatabaseTooNewError(
            f"{path} has schema version {version}, this broker knows up to {SCHEMA_VERSION}. "
            f"Upgrade hacrl-exchange, or use another data folder.",
            version=version,
            supported=SCHEMA_VERSION,
        )


def commit_something(connection: sqlite3.Connection) -> None:
    """Makes an empty decision durable, and with it whatever is in the WAL before it; what a failed
    commit may have left there is overwritten and can never come back."""
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("UPDATE commits SET count = count + 1")
    connection.execute("COMMIT")


def collect_orphans(connection: sqlite3.Connection, folder: Path, *, files: Files) -> int:
    """Deletes body bytes that no committed record names; how many there were."""
    freed = 0
    ids = dict(connection.execute("SELECT name, id FROM streams").fetchall())
    for stream_folder in sorted(path for path in (folder / SEGMENTS_NAME).iterdir() if path.is_dir()):
        ends: dict[int, int] = dict(
            connection.execute(
                "SELECT number, end FROM segments WHERE stream = ?", (ids.get(stream_folder.name, -1),)
            ).fetchall()
        )
        for number, path in segment_numbers(stream_folder).items():
            surplus = path.stat().st_size - ends.get(number, 0)
            if number not in ends:
                files.unlink(path)
            elif surplus > 0:
                files.truncate(path, ends[number])
            freed += max(surplus, 0)
    return freed


def _has_tables(connection: sqlite3.Connection) -> bool:
    (count,) = connection.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'commits'").fetchone()
    return bool(count)
