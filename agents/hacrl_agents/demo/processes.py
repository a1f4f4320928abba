"""The demo's operating-system processes: started, restarted when somebody kills them, and ended."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hacrl_agents.errors import AgentError

_RESTARTS = 5
_STOP_SECONDS = 15.0
_DEFAULT_PORT = 7447


class DemoError(AgentError):
    """A process of the demo failed for good. The message names its log."""


class Kept:
    """One process. Killed by a signal, it is started again, at most five times; its output goes to a log."""

    def __init__(self, name: str, command: Sequence[str], *, log: Path) -> None:
        self.name = name
        self.restarts = 0
        self._command = [sys.executable, *command]
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Of the newest life."""
        return self._process.pid

    def is_running(self) -> bool:
        """False once it ended well; restarts it if a signal ended it.

        Raises:
            DemoError: it failed by itself, or too often.
        """
        code = self._process.poll()
        if code is None:
            return True
        if code == 0:
            return False
        if code > 0 or self.restarts >= _RESTARTS:
            raise DemoError(
                f"{self.name} ended with code {code}: {self._last_words()} (its log: {self._log})"
            )
        self.restarts += 1
        self._process = self._start()
        return True

    def stop(self) -> None:
        """Asks it to end, then makes it."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def choose_port() -> int:
    """The default port if it is free, so that others find the broker; else any."""
    for port in (_DEFAULT_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            chosen: int = probe.getsockname()[1]
            return chosen
    raise DemoError("No TCP port of the loopback interface is free: close a program and try again.")


def exchange_command(*arguments: str) -> list[str]:
    """`hacrl ...` by this interpreter."""
    return ["-m", "hacrl_exchange.cli", *arguments]
