"""The supervisor's handle on the zygote: starts it, has children forked, starts it again when it dies."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import msgpack

from hacrl_verifiers import _progress
from hacrl_verifiers._linux import Limits

_MAX_MESSAGE_BYTES = 1 << 16
_LOAD_SECONDS = 120.0
_FORK_SECONDS = 30.0
_CLOSE_SECONDS = 5.0

# A thread pool in the zygote would not survive the fork.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class IsolationError(Exception):
    """Children cannot be started. The text says why."""


@dataclass(frozen=True, slots=True)
class Offered:
    """A verifier that the zygote has loaded."""

    name: str
    version: str
    full_score: float
    needs_tokens: bool


@dataclass(frozen=True, slots=True)
class Child:
    """A forked child: its process id, the connection to it, its progress, the zygote it came from."""

    pid: int
    connection: socket.socket
    progress: _progress.Progress
    generation: int

    def close(self) -> None:
        """Lets go of the child. It ends by itself when idle; only forking into its slot kills it."""
        self.connection.close()
        self.progress.close()


class Zygote:
    """The zygote process. Safe to use from several threads."""

    def __init__(self, specs: Sequence[str], limits: Limits) -> None:
        self._specs = tuple(specs)
        self._limits = limits
        self._lock = threading.Lock()
        self._closed = False
        self.generation = 0
        self.offered: tuple[Offered, ...] = ()
        self.failures: tuple[tuple[str, str], ...] = ()
        self._start()

    @property
    def pid(self) -> int:
        """Process id of the present zygote."""
        return self._process.pid

    def fork(self, slot: int) -> Child:
        """Kills what is in the slot and returns a fresh child.

        Raises:
            IsolationError: the zygote is gone and does not come back, or the pool is closed.
        """
        with self._lock:
            try:
                return self._fork(slot)
            except OSError:
                self._restart()
            try:
                return self._fork(slot)
            except OSError as error:
                raise IsolationError(f"No child can be forked: {error}.") from error

    def lives(self, generation: int) -> bool:
        """Whether the zygote of that generation runs.

        Asks the socket, not the process: a dying zygote closes it before its children die with it.
        """
        with self._lock:
            if self._closed or generation != self.generation:
                return False
            poller = select.poll()
            poller.register(self._control, select.POLLHUP)
            return not poller.poll(0)

    def close(self) -> None:
        """Ends the zygote and every child."""
        with self._lock:
            self._closed = True
            self._end()

    def _fork(self, slot: int) -> Child:
        if self._closed:
            raise IsolationError("The pool is closed.")
        ours, theirs = socket.socketpair()
        memory = _progress.shared_memory()
        try:
            progress = _progress.Progress(memory)
            progress.mark(_progress.WAITING, 0)
            socket.send_fds(self._control, [msgpack.packb(["fork", slot])], [theirs.fileno(), memory])
            answer = self._control.recv(_MAX_MESSAGE_BYTES)
            if not answer:
                raise ConnectionResetError("the zygote is gone")
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        _, pid = msgpack.unpackb(answer)
        return Child(pid, ours, progress, self.generation)

    def _restart(self) -> None:
        self._end()
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "hacrl_verifiers._zygote", str(theirs.fileno())]
        with theirs:
            # Its own session: Ctrl-C is for the supervisor, which then decides.
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=_clean_environment(),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._control = ours
        self.generation += 1
        try:
            self._load()
        except BaseException:
            self._process.kill()  # it may be deep in an import
            self._end()
            raise

    def _load(self) -> None:
        self._control.settimeout(_LOAD_SECONDS)
        try:
            self._control.send(msgpack.packb(["load", self._specs, astuple(self._limits)]))
            answer = self._control.recv(_MAX_MESSAGE_BYTES)
        except OSError as error:
            raise IsolationError(f"The verifiers could not be loaded: {error}.") from error
        if not answer:
            raise IsolationError("The process that loads the verifiers died. Its last words are above.")
        _, offered, failures = msgpack.unpackb(answer)
        self.offered = tuple(Offered(*values) for values in offered)
        self.failures = tuple((spec, text) for spec, text in failures)
        self._control.settimeout(_FORK_SECONDS)

    def _end(self) -> None:
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        self._process.kill()
        self._process.wait()


def _clean_environment() -> dict[str, str]:
    """This process's environment without our secrets."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HACRL_")}
    return {**kept, **dict.fromkeys(_ONE_THREAD, "1")}
