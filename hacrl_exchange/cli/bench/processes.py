"""The benchmark's processes, as the one that conducts it sees them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

_MODULE = "hacrl_exchange.cli.bench.roles"
_STOP_SECONDS = 5.0


class BenchFailedError(Exception):
    """A part of the benchmark failed. The text says which and why."""


class RoleProcess:
    """One role in a process of its own. `ask` starts a piece of work; its future is done when the work is."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the conductor; it ends the roles.
            start_new_session=True,
        )

    def __enter__(self) -> RoleProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_STOP_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(
        self, verb: str, *, progress: Callable[[int], None], **arguments: object
    ) -> Future[dict[str, Any]]:
        """Starts a piece of work. One at a time."""
        stdin = self._process.stdin
        assert stdin is not None, "the process is made with a pipe"
        stdin.write(json.dumps({"role": self._role, "do": verb, **arguments}) + "\n")
        stdin.flush()
        future: Future[dict[str, Any]] = Future()
        threading.Thread(target=self._listen, args=(verb, future, progress), daemon=True).start()
        return future

    def _listen(self, verb: str, future: Future[dict[str, Any]], progress: Callable[[int], None]) -> None:
        stdout = self._process.stdout
        assert stdout is not None, "the process is made with a pipe"
        for line in stdout:
            said = json.loads(line)
            if "progress" in said:
                progress(said["progress"])
                continue
            if "done" in said:
                future.set_result(said["done"])
            else:
                future.set_exception(BenchFailedError(f"The {self._role} could not {verb}: {said['failed']}"))
            return
        future.set_exception(BenchFailedError(f"The {self._role} died while it should {verb}; see above."))
