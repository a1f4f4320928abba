"""When the disk fails, nothing is half there, everybody hears of it, and after `recover` it goes on."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hacrl_exchange.broker.log import Entry
from hacrl_exchange.broker.segments import OsFiles
from hacrl_exchange.broker.sqlite_log import SqliteLog, open_sqlite_log
from hacrl_exchange.errors import LogFailedError

FULL = OSError(errno.ENOSPC, "No space left on device")


class FailingFiles(OsFiles):
    """A disk on which the calls named in `failing` fail. With `half`, a write first does half of its work."""

    def __init__(self) -> None:
        self.failing: set[str] = set()
        self.half = False

    def write(self, descriptor: int, buffers: Sequence[bytes], offset: int) -> int:
        if "write" not in self.failing:
            if not self.half:
                return super().write(descriptor, buffers, offset)
            whole = b"".join(buffers)
            return super().write(descriptor, [whole[: len(whole) // 2 or 1]], offset)
        super().write(descriptor, [buffers[0][:1]], offset)
        raise FULL

    def sync(self, descriptor: int) -> None:
        if "sync" in self.failing:
            raise OSError(errno.EIO, "Input/output error")
        super().sync(descriptor)

    def truncate(self, path: Path, size: int) -> None:
        if "truncate" in self.failing:
            raise FULL
        super().truncate(path, size)

    def unlink(self, path: Path) -> None:
        if "unlink" in self.failing:
            raise FULL
        super().unlink(path)


@pytest.fixture
def files() -> FailingFiles:
    return FailingFiles()


@pytest.fixture
def log(tmp_path: Path, files: FailingFiles) -> Iterator[SqliteLog]:
    opened = open_sqlite_log(tmp_path, files=files, busy_seconds=0.01)
    yield opened
    opened.close()


def put(log: SqliteLog, stream: str, position: int) -> None:
    body = b"%d" % position * 50
    log.append(stream, Entry(b"p%d" % position, bodies=(body,)), expected_position=position - 1).result()


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted((folder / "segments/math").iterdir())}


@pytest.mark.parametrize(
    ("failing", "why"), [("write", "No space left on device"), ("sync", "Input/output error")]
)
def test_a_batch_that_cannot_be_written_leaves_nothing(
    log: SqliteLog, files: FailingFiles, tmp_path: Path, failing: str, why: str
) -> None:
    put(log, "math", 1)
    files.failing = {failing}
    futures = [log.append("math", Entry(b"", bodies=(b"b" * 9,)), expected_position=i) for i in (1, 2)]
    for future in futures:
        with pytest.raises(
            LogFailedError, match=rf"^The log of math could not be written \(.*{why}.*\); nothing"
        ):
            future.result()
    files.failing = set()

    assert log.last_position("math") == 1
    with pytest.raises(LogFailedError, match=why):  # until recover, even though the disk is well again
        put(log, "math", 2)
    assert log.recover("math") == 1
    assert sizes(tmp_path) == {"00000001.seg": 50}
    put(log, "math", 2)
    assert sizes(tmp_path) == {"00000001.seg": 50, "00000002.seg": 50}
    assert log.read_bodies("math", [(1, (0,)), (2, (0,))]) == [(b"1" * 50,), (b"2" * 50,)]


def test_the_first_batch_of_a_stream_can_fail(log: SqliteLog, files: FailingFiles, tmp_path: Path) -> None:
    files.failing = {"sync"}
    with pytest.raises(LogFailedError):
        put(log, "math", 1)
    assert log.streams() == []
    files.failing = set()
    assert log.recover("math") == 0
    put(log, "code", 1)
    put(log, "math", 1)
    assert log.read_bodies("math", [(1, (0,))]) == [(b"1" * 50,)]
    assert log.read_bodies("code", [(1, (0,))]) == [(b"1" * 50,)]


def test_a_database_that_cannot_commit_fails_the_batch(log: SqliteLog, tmp_path: Path) -> None:
    put(log, "math", 1)
    other = sqlite3.connect(tmp_path / "records.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LogFailedError, match="database is locked"):
        put(log, "math", 2)
    with pytest.raises(LogFailedError, match="database is locked"):
        log.recover("math")
    with pytest.raises(LogFailedError, match="database is locked"):
        put(log, "math", 2)
    other.execute("ROLLBACK")
    other.close()

    assert log.recover("math") == 1
    put(log, "math", 2)
    assert [stored.payload for stored in log.read("math")] == [b"p1", b"p2"]


def test_a_failure_of_one_stream_leaves_the_others_alone(log: SqliteLog, files: FailingFiles) -> None:
    put(log, "math", 1)
    put(log, "code", 1)
    files.failing = {"sync"}
    with pytest.raises(LogFailedError):
        put(log, "math", 2)
    files.failing = set()

    put(log, "code", 2)
    with pytest.raises(LogFailedError):
        put(log, "math", 2)
    assert log.recover("code") == 2


def test_a_wrong_position_fails_the_stream(log: SqliteLog) -> None:
    put(log, "math", 1)
    with pytest.raises(LogFailedError, match=r"position 5 was expected, it is at 1"):
        log.append("math", Entry(b""), expected_position=5).result()
    with pytest.raises(LogFailedError):
        put(log, "math", 2)
    assert log.recover("math") == 1
    put(log, "math", 2)


def test_a_snapshot_of_a_failed_stream_is_refused(log: SqliteLog, files: FailingFiles) -> None:
    put(log, "math", 1)
    files.failing = {"sync"}
    with pytest.raises(LogFailedError):
        put(log, "math", 2)
    with pytest.raises(LogFailedError):
        log.save_snapshot("math", 1, b"fold")
    files.failing = set()
    log.recover("math")
    log.save_snapshot("math", 1, b"fold")
    assert log.load_snapshot("math") == (1, b"fold")


def test_a_recovery_that_fails_can_be_tried_again(
    log: SqliteLog, files: FailingFiles, tmp_path: Path
) -> None:
    put(log, "math", 1)
    files.failing = {"write", "truncate"}
    with pytest.raises(LogFailedError):
        put(log, "math", 2)
    assert sizes(tmp_path) == {"00000001.seg": 51}
    with pytest.raises(LogFailedError):
        log.recover("math")
    with pytest.raises(LogFailedError):
        put(log, "math", 2)
    files.failing = set()
    assert log.recover("math") == 1
    assert sizes(tmp_path) == {"00000001.seg": 50}
    put(log, "math", 2)


def test_a_write_that_stops_half_way_is_continued(log: SqliteLog, files: FailingFiles) -> None:
    files.half = True
    bodies = (b"abc", b"", b"defgh", b"i")
    log.append("math", Entry(b"", bodies=bodies), expected_position=0).result()
    log.append("math", Entry(b"", bodies=bodies), expected_position=1).result()
    assert log.read_bodies("math", [(1, range(4)), (2, range(4))]) == [bodies, bodies]


def test_a_retired_segment_that_cannot_be_deleted_is_retired_all_the_same(
    files: FailingFiles, tmp_path: Path
) -> None:
    log = open_sqlite_log(tmp_path, files=files, segment_bytes=50)
    put(log, "math", 1)
    put(log, "math", 2)
    files.failing = {"unlink"}
    assert log.drop_bodies("math", through_position=1) == 50
    log.close()
    assert sizes(tmp_path) == {"00000001.seg": 50, "00000002.seg": 50}
    open_sqlite_log(tmp_path).close()
    assert sizes(tmp_path) == {"00000002.seg": 50}


def test_recovering_what_never_failed_changes_nothing(log: SqliteLog, tmp_path: Path) -> None:
    put(log, "math", 1)
    assert log.recover("math") == 1
    assert log.recover("code") == 0
    put(log, "math", 2)
    assert sizes(tmp_path) == {"00000001.seg": 100}
