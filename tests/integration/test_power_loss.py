"""Power loss at every write: whatever the log said is durable is there, whole, and nothing half is.

A process (the second part of this file, run as a script) uses a log under power_loss_recorder.c, which
records each write, sync and name that it asks of the disk; it is killed twice on the way. The test replays
that up to every operation, drops what was not synced in several ways, and opens what is left.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import pytest

from hacrl_exchange.broker.log import Entry
from hacrl_exchange.broker.sqlite_log import SqliteLog, open_sqlite_log
from hacrl_exchange.errors import StepRetiredError

# --- a disk that loses power ------------------------------------------------------------------------

_HEAD = struct.Struct("<cIqI")

Image = dict[str, bytes | None]
"""Files by path; None is a folder."""


@dataclass(frozen=True, slots=True)
class Operation:
    kind: str
    path: str
    offset: int
    data: bytes


def operations(recorded: Path, root: Path) -> Iterator[Operation]:
    """What a recorder wrote, paths relative to the root."""
    log = recorded.read_bytes()
    at = 0
    while at < len(log):
        kind, path_size, offset, size = _HEAD.unpack_from(log, at)
        at += _HEAD.size
        path = log[at : at + path_size].decode()
        at += path_size
        yield Operation(
            kind.decode(), str(PurePosixPath(path).relative_to(root)), offset, log[at : at + size]
        )
        at += size


@dataclass(slots=True)
class _File:
    durable: bytes = b""
    pending: list[Operation] = field(default_factory=list)


@dataclass(slots=True)
class Disk:
    """Only a sync of a file makes its bytes and size durable, only a sync of a folder the names in it. What
    was not synced may be there after a power loss, partly or not at all."""

    names: dict[str, _File | None] = field(default_factory=dict)
    current: dict[str, _File | None] = field(default_factory=dict)
    pending: list[tuple[str, _File | None, bool]] = field(default_factory=list)

    def apply(self, done: Operation) -> None:
        match done.kind:
            case "C" | "D":
                node = _File() if done.kind == "C" else None
                self.current[done.path] = node
                self.pending.append((done.path, node, True))
            case "U":
                self.pending.append((done.path, self.current.pop(done.path), False))
            case "S" if self.current.get(done.path) is None:
                self._sync_folder(done.path)
            case "S":
                node = self.current[done.path]
                assert node is not None
                node.durable = _content(node, node.pending)
                node.pending = []
            case _:
                node = self.current[done.path]
                assert node is not None
                node.pending.append(done)

    def _sync_folder(self, folder: str) -> None:
        kept = []
        for path, node, linked in self.pending:
            if str(PurePosixPath(path).parent) != folder:
                kept.append((path, node, linked))
            elif linked:
                self.names[path] = node
            else:
                self.names.pop(path, None)
        self.pending = kept

    # --- what may be left ----------------------------------------------------------------------

    def synced(self) -> Image:
        """Nothing that was not synced."""
        return self._image(lambda pending: [], [])

    def everything(self) -> Image:
        """All of it: no power was lost, a process was killed."""
        return self._image(lambda pending: pending, self.pending)

    def torn(self) -> Image:
        """All of it, but of the last write to each file one half."""

        def half(pending: list[Operation]) -> list[Operation]:
            if not pending or pending[-1].kind != "W":
                return pending
            last = pending[-1]
            return [*pending[:-1], Operation("W", last.path, last.offset, last.data[: len(last.data) // 2])]

        return self._image(half, self.pending)

    def some(self, seed: int) -> Image:
        """Any part of it, in order."""
        draw = random.Random(seed)

        def part(pending: list[Operation]) -> list[Operation]:
            return [one for one in pending if draw.random() < 0.5]

        return self._image(part, [name for name in self.pending if draw.random() < 0.5])

    def _image(
        self,
        choose: Callable[[list[Operation]], list[Operation]],
        renamed: list[tuple[str, _File | None, bool]],
    ) -> Image:
        names = dict(self.names)
        for path, node, linked in renamed:
            if linked:
                names[path] = node
            else:
                names.pop(path, None)
        image: Image = {}
        for path in sorted(names):
            parent = str(PurePosixPath(path).parent)
            if parent != "." and parent not in image:
                continue  # its folder was lost
            node = names[path]
            image[path] = None if node is None else _content(node, choose(node.pending))
        return image


def _content(node: _File, kept: list[Operation]) -> bytes:
    content = bytearray(node.durable)
    for one in kept:
        if one.kind == "T":
            del content[one.offset :]
            content.extend(bytes(one.offset - len(content)))
        else:
            content.extend(bytes(max(0, one.offset - len(content))))
            content[one.offset : one.offset + len(one.data)] = one.data
    return bytes(content)


# --- the process whose power is cut ----------------------------------------------------------------

SEGMENT_BYTES = 6000


def entry(stream: str, position: int) -> Entry:
    """The entry that this position of the stream must hold."""
    seed = hashlib.sha256(f"{stream}/{position}".encode()).digest()
    bodies = tuple(seed * (1 + seed[i] % 40) for i in range(position % 4))
    return Entry(payload=seed * (1 + seed[9] % 12), key=f"k/{position:05d}", bodies=bodies)


def snapshot(stream: str, position: int) -> bytes:
    """The snapshot of a stream at a position."""
    return hashlib.sha256(f"snapshot {stream}/{position}".encode()).digest() * 3


class _Held(tuple[bytes, ...]):
    """Bodies that keep the writer waiting when it looks at them, until the rest of their batch is queued."""

    _until: threading.Event

    def __new__(cls, bodies: tuple[bytes, ...], *, until: threading.Event) -> _Held:
        held = super().__new__(cls, bodies)
        held._until = until
        return held

    def __iter__(self) -> Iterator[bytes]:
        self._until.wait()
        return super().__iter__()


class Workload:
    """One life of the process."""

    def __init__(self, folder: Path) -> None:
        self._log: SqliteLog = open_sqlite_log(folder / "data", segment_bytes=SEGMENT_BYTES)
        self._folder = folder
        self._acks = os.open(folder / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._positions: dict[str, int] = {}
        for stream in self._log.streams():  # whoever folds what is there, acts on it
            self._positions[stream] = self._log.last_position(stream)
            self.ack(f"entry {stream} {self._positions[stream]}")

    def ack(self, what: str) -> None:
        os.write(self._acks, f"{what}\n".encode())

    def together(self, counts: dict[str, int]) -> None:
        """Appends this many entries to each stream, all in one batch."""
        queued = threading.Event()
        futures: list[tuple[str, int, Future[None]]] = []
        for stream, count in counts.items():
            for _ in range(count):
                position = self._positions.get(stream, 0)
                new = entry(stream, position + 1)
                if not futures:
                    new = replace(new, bodies=_Held(new.bodies, until=queued))
                future = self._log.append(stream, new, expected_position=position)
                self._positions[stream] = position + 1
                futures.append((stream, position + 1, future))
        queued.set()
        for stream, position, future in futures:
            future.result()
            self.ack(f"entry {stream} {position}")

    def snapshot(self, stream: str) -> None:
        position = self._positions[stream]
        self._log.save_snapshot(stream, position, snapshot(stream, position))
        self.ack(f"snapshot {stream} {position}")

    def retire(self, stream: str, through: int) -> None:
        self.ack(f"retire {stream} {through}")
        self._log.drop_bodies(stream, through_position=through)

    def checkpoint(self) -> None:
        connection = sqlite3.connect(self._folder / "data" / "records.db")
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        connection.close()

    def close(self) -> None:
        self._log.close()


def main() -> None:
    folder, run = Path(sys.argv[1]), sys.argv[2]
    work = Workload(folder)
    work.together({"math": 5})
    work.together({"math": 3, "code": 4, "_catalog": 2})
    if run == "first":
        work.snapshot("math")
        work.checkpoint()
        work.together({"math": 4})
        work.together({"code": 2})
        work.retire("math", 7)
        work.together({"math": 2})
        work.close()
    else:
        work.together({"math": 1})
        work.snapshot("code")
        work.retire("math", 15)
        work.together({"math": 3, "code": 1})
        os.kill(os.getpid(), 9)  # never closed


# --- the test --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Promises:
    """What the process told others before the power went."""

    entries: dict[str, int] = field(default_factory=dict)
    snapshots: dict[str, int] = field(default_factory=dict)
    retired: dict[str, int] = field(default_factory=dict)

    def add(self, line: str) -> None:
        what, stream, position = line.split()
        kept = {"entry": self.entries, "snapshot": self.snapshots, "retire": self.retired}[what]
        kept[stream] = max(kept.get(stream, 0), int(position))


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("recorder") / "recorder.so"
    source = Path(__file__).with_name("power_loss_recorder.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    return library


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if there is one: the syncs of thousands of openings cost nothing there."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def record(recorder: Path, scratch: Path) -> list[Operation]:
    """Three lives of the process on one folder; the second and third end by SIGKILL."""
    root, log = scratch / "root", scratch / "recorded"
    root.mkdir()
    for run, kill_at_sync, expected in (("first", "0", 0), ("second", "6", -9), ("third", "0", -9)):
        environment = os.environ | {
            "LD_PRELOAD": str(recorder),
            "RECORDER_ROOT": str(root),
            "RECORDER_LOG": str(log),
            "RECORDER_KILL": kill_at_sync,
        }
        ended = subprocess.run(
            [sys.executable, __file__, str(root), run], env=environment, timeout=60, check=False
        )
        assert ended.returncode == expected
    recorded = list(operations(log, root))
    shutil.rmtree(root)
    return recorded


def check(image: Image, promised: Promises, folder: Path) -> None:
    """Opens what was left and compares it with what was promised."""
    for path, content in image.items():
        if content is None:
            (folder / path).mkdir(parents=True)
        else:
            (folder / path).write_bytes(content)
    folder.mkdir(exist_ok=True)
    log = open_sqlite_log(folder / "data", segment_bytes=SEGMENT_BYTES)
    try:
        assert promised.entries.keys() <= set(log.streams())
        for stream in log.streams():
            last = check_stream(log, stream, promised)
            assert last >= promised.entries.get(stream, 0)
            log.append(stream, entry(stream, last + 1), expected_position=last).result()
            assert log.last_position(stream) == last + 1
            on_disk = {
                int(p.stem): p.stat().st_size for p in (folder / "data/segments" / stream).glob("*.seg")
            }
            ends = {number: end for number, end in log.extent(stream)[1].items() if end}
            assert on_disk == ends
    finally:
        log.close()


def check_stream(log: SqliteLog, stream: str, promised: Promises) -> int:
    last = 0
    for stored in log.read(stream):
        last += 1
        wanted = entry(stream, last)
        assert (stored.position, stored.payload, stored.key) == (last, wanted.payload, wanted.key)
        assert stored.body_sizes == tuple(map(len, wanted.bodies))
        try:
            (bodies,) = log.read_bodies(stream, [(last, range(len(wanted.bodies)))])
        except StepRetiredError:
            assert last <= promised.retired.get(stream, 0)
        else:
            assert bodies == wanted.bodies
    found = log.load_snapshot(stream)
    position = found[0] if found else 0
    assert promised.snapshots.get(stream, 0) <= position <= last
    assert found is None or found[1] == snapshot(stream, position)
    return last


@pytest.mark.slow
def test_what_was_said_to_be_durable_survives_a_power_loss_at_every_write(
    recorder: Path, scratch: Path
) -> None:
    disk, promised = Disk(), Promises()
    seen: set[str] = set()
    points = 0
    for number, operation in enumerate(record(recorder, scratch)):
        if operation.path == "acks":
            if operation.kind == "W":
                promised.add(operation.data.decode())
            continue
        disk.apply(operation)
        points += 1
        for image in (disk.synced(), disk.everything(), disk.torn(), disk.some(number), disk.some(-number)):
            state = hashlib.sha256(repr((sorted(image.items()), promised)).encode()).hexdigest()
            if state in seen:
                continue
            seen.add(state)
            folder = scratch / "left"
            try:
                check(image, promised, folder)
            except BaseException as error:
                error.add_note(f"power was lost after operation {number}: {operation.kind} {operation.path}")
                raise
            shutil.rmtree(folder)
    assert points > 200
    assert len(seen) > 400
    assert promised.entries == {"math": 35, "code": 15, "_catalog": 6}


if __name__ == "__main__":
    main()
