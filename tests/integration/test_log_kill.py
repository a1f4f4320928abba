"""A log whose process is killed -9 while it writes has everything that was acknowledged, and goes on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from hacrl_exchange.broker.log import Entry
from hacrl_exchange.broker.sqlite_log import open_sqlite_log
from hacrl_exchange.errors import DatabaseInUseError


def entry(position: int) -> Entry:
    seed = hashlib.sha256(str(position).encode()).digest()
    return Entry(seed, f"k/{position:09d}", (seed * 50, seed * 400))


def write_for_ever(folder: Path) -> None:
    """Appends in batches; each acknowledged position goes to the standard output."""
    log = open_sqlite_log(folder, segment_bytes=200_000)
    position = log.last_position("math")
    while True:
        futures = [
            log.append("math", entry(position + i + 1), expected_position=position + i) for i in range(20)
        ]
        for future in futures:
            future.result()
            position += 1
            print(position, flush=True)


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    acknowledged = 0
    for until in (30, 90, 200):
        command = [sys.executable, __file__, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                acknowledged = int(line)
                if acknowledged == until:
                    with pytest.raises(DatabaseInUseError):
                        open_sqlite_log(tmp_path)
                    process.kill()
        assert process.returncode == -9

        log = open_sqlite_log(tmp_path, segment_bytes=200_000)
        last = log.last_position("math")
        assert last >= acknowledged >= until
        assert [(stored.position, stored.payload) for stored in log.read("math")] == [
            (position, entry(position).payload) for position in range(1, last + 1)
        ]
        bodies = log.read_bodies("math", [(position, (0, 1)) for position in range(1, last + 1)])
        assert bodies == [entry(position).bodies for position in range(1, last + 1)]
        on_disk = sum(path.stat().st_size for path in (tmp_path / "segments/math").iterdir())
        assert on_disk == last * 450 * 32
        log.close()


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]))
