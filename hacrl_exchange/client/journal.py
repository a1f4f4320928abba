"""The agent's own record of its receipts: JSON lines, on disk before `publish` returns.

`hacrl audit` compares journals with the broker's log: what a client was promised must be there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from hacrl_exchange.types import Receipt


class Journal:
    """An append-only file of receipts. A line torn by a crash is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file.

        Raises:
            OSError: it cannot be written.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, _whole_lines(self._descriptor))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the name of a new file must survive too
        finally:
            os.close(folder)

    def append(self, receipts: Sequence[Receipt]) -> None:
        """Writes receipts, durable when it returns.

        Raises:
            OSError: the disk is full or failing.
        """
        if not receipts:
            return
        data = "".join(_line(receipt) for receipt in receipts).encode()
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def _line(receipt: Receipt) -> str:
    fields = {
        "pool": receipt.pool,
        "step": receipt.slot.step,
        "prompt_id": receipt.slot.prompt_id,
        "agent": receipt.slot.agent,
        "session": receipt.session,
        "digest": receipt.digest.hex(),
        "rollouts": receipt.rollout_count,
    }
    return json.dumps(fields) + "\n"


def _whole_lines(descriptor: int) -> int:
    """The size of the file up to and including its last line end."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(end - 4096, 0)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
