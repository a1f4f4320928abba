"""The embedded engine keeps what it promised, in order, and finds it again."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hacrl_exchange.broker.log import Entry, Log, StoredEntry
from hacrl_exchange.broker.segments import OsFiles
from hacrl_exchange.broker.sqlite_log import SqliteLog, open_sqlite_log
from hacrl_exchange.errors import (
    CorruptLogError,
    DatabaseInUseError,
    DatabaseTooNewError,
    LogFailedError,
    StepRetiredError,
)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    opened = open_sqlite_log(tmp_path / "data", segment_bytes=1000)
    yield opened
    opened.close()


def entry(number: int, *, size: int = 100) -> Entry:
    return Entry(
        payload=b"p%d" % number, key=f"k/{number:03d}", bodies=(bytes([number]) * size, b"", b"x%d" % number)
    )


def fill(log: Log, stream: str, count: int, *, size: int = 100) -> None:
    start = log.last_position(stream)
    futures = [
        log.append(stream, entry(start + i + 1, size=size), expected_position=start + i) for i in range(count)
    ]
    for future in futures:
        future.result()


def segments(folder: Path, stream: str) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted((folder / "data/segments" / stream).iterdir())}


def test_it_is_a_log(log: SqliteLog) -> None:
    typed: Log = log
    assert typed.streams() == []


def test_entries_come_back_in_order_with_their_bodies(log: SqliteLog) -> None:
    fill(log, "math", 3)
    log.append("math", Entry(payload=b"bare"), expected_position=3).result()

    assert log.streams() == ["math"]
    assert log.last_position("math") == 4
    assert list(log.read("math", after=2)) == [
        StoredEntry(3, b"p3", "k/003", (100, 0, 2)),
        StoredEntry(4, b"bare", "", ()),
    ]
    assert log.read_bodies("math", [(3, (2, 0)), (1, ()), (2, (1,))]) == [(b"x3", b"\3" * 100), (), (b"",)]


def test_streams_do_not_mix(log: SqliteLog) -> None:
    for number in range(1, 4):
        for stream in ("a", "b"):
            log.append(stream, Entry(b"%s%d" % (stream.encode(), number)), expected_position=number - 1)
    log.append("b", Entry(b"b4"), expected_position=3).result()

    assert [stored.payload for stored in log.read("a")] == [b"a1", b"a2", b"a3"]
    assert log.last_position("b") == 4
    assert log.last_position("c") == 0


def test_reading_goes_on_over_many_pages(log: SqliteLog) -> None:
    futures = [log.append("math", Entry(b""), expected_position=i) for i in range(1300)]
    futures[-1].result()

    assert [stored.position for stored in log.read("math")] == list(range(1, 1301))


def test_a_prefix_finds_by_key_then_position(log: SqliteLog) -> None:
    for position, key in enumerate(["v/2", "g/2", "v/1", "", "v/2"]):
        log.append("math", Entry(b"", key), expected_position=position).result()

    assert [(stored.key, stored.position) for stored in log.find("math", "v/")] == [
        ("v/1", 3),
        ("v/2", 1),
        ("v/2", 5),
    ]
    assert log.find("math", "g/2/") == []
    assert log.find("code", "v/") == []


def test_what_is_queued_together_is_committed_with_one_sync_per_segment(tmp_path: Path) -> None:
    taken, release = threading.Event(), threading.Event()
    calls: list[str] = []

    class Slow(OsFiles):
        def sync(self, descriptor: int) -> None:
            calls.append("sync")
            taken.set()
            release.wait()
            super().sync(descriptor)

        def write(self, descriptor: int, buffers: Sequence[bytes], offset: int) -> int:
            calls.append(f"write {len(buffers)} at {offset}")
            return super().write(descriptor, buffers, offset)

    log = open_sqlite_log(tmp_path, files=Slow())
    futures = [log.append("math", Entry(b"", bodies=(b"abc",)), expected_position=0)]
    taken.wait()
    futures += [
        log.append("math", Entry(b"", bodies=(b"de", b"f")), expected_position=i) for i in range(1, 50)
    ]
    release.set()
    futures[-1].result()

    assert all(future.done() for future in futures)
    assert calls == ["write 1 at 0", "sync", "write 98 at 3", "sync"]
    log.close()


def test_futures_of_a_stream_are_done_in_order(log: SqliteLog) -> None:
    done: list[int] = []
    for number in range(200):
        future = log.append("math", Entry(b""), expected_position=number)
        future.add_done_callback(lambda _, number=number: done.append(number))  # type: ignore[misc]  # a default binds
    log.append("math", Entry(b""), expected_position=200).result()

    assert done == list(range(200))


def test_a_full_segment_is_followed_by_the_next(log: SqliteLog, tmp_path: Path) -> None:
    fill(log, "math", 6, size=398)  # 400 bytes each

    assert segments(tmp_path, "math") == {"00000001.seg": 800, "00000002.seg": 800, "00000003.seg": 800}
    assert log.read_bodies("math", [(i, (0,)) for i in (6, 1, 3)]) == [(bytes([i]) * 398,) for i in (6, 1, 3)]


def test_an_entry_larger_than_a_segment_has_one_of_its_own(log: SqliteLog, tmp_path: Path) -> None:
    fill(log, "math", 1, size=10)
    fill(log, "math", 1, size=5000)
    fill(log, "math", 1, size=10)

    assert segments(tmp_path, "math") == {"00000001.seg": 12, "00000002.seg": 5002, "00000003.seg": 12}


def test_a_snapshot_replaces_the_one_before(log: SqliteLog) -> None:
    fill(log, "math", 5)
    assert log.load_snapshot("math") is None
    log.save_snapshot("math", 3, b"three")
    log.save_snapshot("math", 5, b"five")
    assert log.load_snapshot("math") == (5, b"five")


def test_a_snapshot_of_what_is_not_there_is_refused(log: SqliteLog) -> None:
    fill(log, "math", 1)
    with pytest.raises(LogFailedError, match="a snapshot of position 2 does not belong to position 1"):
        log.save_snapshot("math", 2, b"two")
    fill(log, "math", 1)


def test_dropping_deletes_whole_segments_only(log: SqliteLog, tmp_path: Path) -> None:
    fill(log, "math", 5, size=398)

    assert log.drop_bodies("math", through_position=3) == 800
    assert segments(tmp_path, "math") == {"00000002.seg": 800, "00000003.seg": 400}
    with pytest.raises(StepRetiredError, match=r"^The bodies of record 2 of math were deleted by the pool"):
        log.read_bodies("math", [(3, (0,)), (2, (0,))])
    assert log.read_bodies("math", [(3, (2,))]) == [(b"x3",)]
    assert log.last_position("math") == 5


def test_numbers_of_dropped_segments_never_come_back(tmp_path: Path) -> None:
    log = open_sqlite_log(tmp_path / "data", segment_bytes=1000)
    fill(log, "math", 2, size=398)
    assert log.drop_bodies("math", through_position=2) == 800
    assert log.drop_bodies("math", through_position=2) == 0
    assert log.drop_bodies("code", through_position=2) == 0
    log.close()

    log = open_sqlite_log(tmp_path / "data", segment_bytes=1000)
    fill(log, "math", 1, size=398)
    assert segments(tmp_path, "math") == {"00000002.seg": 400}
    with pytest.raises(StepRetiredError):
        log.read_bodies("math", [(1, (0,))])
    assert log.read_bodies("math", [(3, (2,))]) == [(b"x3",)]
    log.close()


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    log = open_sqlite_log(tmp_path / "data", segment_bytes=1000)
    fill(log, "math", 4)
    log.save_snapshot("math", 4, b"fold")
    log.append("math", Entry(b"queued"), expected_position=4)
    log.close()

    log = open_sqlite_log(tmp_path / "data", segment_bytes=1000)
    assert log.load_snapshot("math") == (4, b"fold")
    assert [stored.payload for stored in log.read("math", after=3)] == [b"p4", b"queued"]
    log.append("math", entry(6), expected_position=5).result()
    assert log.read_bodies("math", [(4, (2,)), (6, (2,))]) == [(b"x4",), (b"x6",)]
    log.close()
    assert not (tmp_path / "data/records.db-wal").exists()


def test_opening_collects_what_no_record_names(tmp_path: Path) -> None:
    log = open_sqlite_log(tmp_path / "data")
    fill(log, "math", 2)
    log.close()
    math = tmp_path / "data/segments/math"
    with (math / "00000001.seg").open("ab") as tail:
        tail.write(b"never committed")
    (math / "00000002.seg").write_bytes(b"never committed")
    (math / "notes.txt").write_text("somebody's")
    (tmp_path / "data/segments/code").mkdir()
    (tmp_path / "data/segments/code/00000001.seg").write_bytes(b"never committed")

    log = open_sqlite_log(tmp_path / "data")
    assert segments(tmp_path, "math") == {"00000001.seg": 204, "notes.txt": 10}
    assert segments(tmp_path, "code") == {}
    fill(log, "code", 1)
    assert log.read_bodies("code", [(1, (2,))]) == [(b"x1",)]
    log.close()


def test_readers_in_many_threads_see_whole_entries_while_others_are_written(log: SqliteLog) -> None:
    def check() -> int:
        last = log.last_position("math")
        wanted = [(position, (0, 2)) for position in range(1, last + 1)]
        for position, bodies in enumerate(log.read_bodies("math", wanted), start=1):
            assert bodies == (bytes([position]) * 100, b"x%d" % position)
        assert len(log.find("math", "k/")) >= last
        return last

    fill(log, "math", 1)
    with ThreadPoolExecutor(4) as pool:
        checks = []
        for _ in range(40):
            checks += [pool.submit(check), pool.submit(check)]
            fill(log, "math", 3)
        seen = [one.result() for one in checks]
    assert seen[0] >= 1
    assert log.last_position("math") == 121


def test_a_damaged_segment_is_a_corrupt_log(log: SqliteLog, tmp_path: Path) -> None:
    fill(log, "math", 2)
    path = tmp_path / "data/segments/math/00000001.seg"
    with path.open("r+b") as segment:
        segment.truncate(150)
    assert log.read_bodies("math", [(1, (0,))]) == [(b"\1" * 100,)]
    with pytest.raises(
        CorruptLogError, match=r"^Segment 1 of math ends at byte 150, but a record has bodies"
    ):
        log.read_bodies("math", [(2, (0,))])
    path.unlink()
    with pytest.raises(CorruptLogError, match=r"^A segment of math is gone"):
        log.read_bodies("math", [(1, (0,))])


def test_nothing_is_written_behind_a_hole(tmp_path: Path) -> None:
    log = open_sqlite_log(tmp_path / "data")
    fill(log, "math", 2)
    log.close()
    with (tmp_path / "data/segments/math/00000001.seg").open("r+b") as segment:
        segment.truncate(50)

    log = open_sqlite_log(tmp_path / "data")
    fill(log, "math", 1)
    assert segments(tmp_path, "math") == {"00000001.seg": 50, "00000002.seg": 102}
    log.close()


@pytest.mark.parametrize("wanted", [(1, (3,)), (1, (-1,)), (9, (0,))])
def test_a_body_that_no_record_has_is_a_corrupt_log(log: SqliteLog, wanted: tuple[int, tuple[int]]) -> None:
    fill(log, "math", 1)
    with pytest.raises(CorruptLogError, match="bodies, not those that were asked for"):
        log.read_bodies("math", [wanted])


def test_a_second_writer_is_refused(log: SqliteLog, tmp_path: Path) -> None:
    with pytest.raises(
        DatabaseInUseError, match=r"is in use by process \d+\. Stop it, or use another folder\.$"
    ):
        open_sqlite_log(tmp_path / "data")


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    open_sqlite_log(tmp_path).close()
    with sqlite3.connect(tmp_path / "records.db") as connection:
        connection.execute("PRAGMA user_version = 9")
    connection.close()
    before = (tmp_path / "records.db").read_bytes()

    with pytest.raises(DatabaseTooNewError, match="has schema version 9, this broker knows up to 1"):
        open_sqlite_log(tmp_path)
    assert (tmp_path / "records.db").read_bytes() == before


def test_a_file_that_is_no_database_is_a_corrupt_log(tmp_path: Path) -> None:
    (tmp_path / "records.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(CorruptLogError, match="is not a database of the exchange"):
        open_sqlite_log(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogFailedError, match=r"cannot be opened .*Check the disk and its permissions\.$"):
        open_sqlite_log(tmp_path / "file")


@pytest.mark.parametrize("stream", ["", "../up", "a/b", "A", "a" * 200])
def test_a_stream_has_a_name_that_a_folder_can_have(log: SqliteLog, stream: str) -> None:
    with pytest.raises(ValueError, match="cannot name a stream"):
        log.append(stream, Entry(b""), expected_position=0)


def test_a_closed_log_refuses(tmp_path: Path) -> None:
    log = open_sqlite_log(tmp_path)
    log.close()
    log.close()
    with pytest.raises(LogFailedError, match="the log is closed"):
        log.append("math", Entry(b""), expected_position=0).result()
    with pytest.raises(LogFailedError, match="The log is closed"):
        log.last_position("math")
