"""Imports the verifiers once and forks a child per slot: `python -m hacrl_verifiers._zygote FD`.

It has one thread and no gRPC, so forking is safe and takes milliseconds. FD is a SOCK_SEQPACKET socket to the
supervisor. First message: ["load", specs, limits]; answer: ["loaded", verifiers, failures]. Then, per slot,
["fork", slot] with two descriptors (the child's connection, its progress memory); answer ["forked", pid].
Forking into a used slot kills what was in it. When the supervisor ends, everything here ends.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
from typing import Any, NoReturn

import msgpack

from hacrl_verifiers import _child, _linux, registry
from hacrl_verifiers._progress import Progress
from hacrl_verifiers.api import Verifier

MAX_MESSAGE_BYTES = 1 << 16
_MAX_FAILURE_CHARACTERS = 500


class _Zygote:
    """The slots' children, by slot."""

    def __init__(self, control: socket.socket, verifiers: dict[str, Verifier], limits: _linux.Limits) -> None:
        self._control = control
        self._verifiers = verifiers
        self._limits = limits
        self._pids: dict[int, int] = {}
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)

    def run(self) -> None:
        """Serves until the supervisor closes the control socket."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([self._control, self._woken], [], [])
            if self._woken in ready:
                self._woken.recv(4096)
                self._reap()
            if self._control in ready and not self._serve_one():
                break
        for slot in list(self._pids):
            self._kill(slot)
        _linux.kill_orphans(())

    def _serve_one(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 2)
        if not data:
            return False
        _, slot = msgpack.unpackb(data)
        self._kill(slot)
        pid = self._fork(*fds)
        for fd in fds:
            os.close(fd)
        self._pids[slot] = pid
        self._control.send(msgpack.packb(["forked", pid]))
        return True

    def _fork(self, connection_fd: int, progress_fd: int) -> int:
        zygote = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become_child(zygote, connection_fd, progress_fd)
        return pid

    def _become_child(self, zygote: int, connection_fd: int, progress_fd: int) -> NoReturn:
        try:
            os.setsid()
            _linux.die_with_parent(zygote)
            _linux.gain_no_privileges()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._control, self._woken, self._wake):
                end.close()
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(nothing, fd)
            connection = socket.socket(fileno=connection_fd)
            progress = Progress(progress_fd)
            os.close(progress_fd)
            self._limits.apply()
        except BaseException:
            os._exit(2)
        _child.serve(connection, progress, self._verifiers)

    def _reap(self) -> None:
        """Ends what dead children left behind."""
        for slot, pid in list(self._pids.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self._kill(slot)
        _linux.kill_orphans(self._pids.values())

    def _kill(self, slot: int) -> None:
        pid = self._pids.pop(slot, None)
        if pid is None:
            return
        _linux.kill_group(pid)
        os.waitpid(pid, 0)
        _linux.kill_orphans(self._pids.values())


def _describe(verifier: Verifier) -> list[Any]:
    return [verifier.name, verifier.version, verifier.full_score, verifier.needs_tokens]


def main() -> None:
    """Loads what the supervisor asks for, answers, and forks on demand."""
    parent = os.getppid()
    control = socket.socket(fileno=int(sys.argv[1]))
    control.set_inheritable(False)
    _linux.die_with_parent(parent)  # an import may hang
    data = control.recv(MAX_MESSAGE_BYTES)
    if not data:
        return
    _, specs, limits = msgpack.unpackb(data)
    loaded = registry.load_all(specs)
    failures = [[spec, text[:_MAX_FAILURE_CHARACTERS]] for spec, text in loaded.failures]
    _linux.adopt_orphans()
    _linux.outlive_parent()
    gc.collect()
    gc.freeze()  # children then share the pages of what was imported
    control.send(msgpack.packb(["loaded", [_describe(v) for v in loaded.verifiers], failures]))
    verifiers = {verifier.name: verifier for verifier in loaded.verifiers}
    _Zygote(control, verifiers, _linux.Limits(*limits)).run()


if __name__ == "__main__":
    main()
