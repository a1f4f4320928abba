"""Real brokers for tests: ours and yours.

`running_broker` serves from a thread of this process and is quick; `BrokerProcess` is a process of its own
that can be killed and started again on the same folder and port.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.server import ServeOptions, running

_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class RunningBroker:
    """A broker that serves: its "host:port" and its data folder."""

    target: str
    folder: Path


@contextlib.contextmanager
def running_broker(
    folder: Path | None = None,
    *,
    workers: int = 0,
    verifiers: Sequence[str] = (),
    limits: Limits | None = None,
) -> Iterator[RunningBroker]:
    """A broker in a thread, on a free port; stopped cleanly on leaving. A temporary folder if none is given.

    Raises:
        ExchangeError, OSError: it could not start.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hacrl-")))
        options = ServeOptions(
            folder=folder,
            listen="127.0.0.1:0",
            workers=workers,
            verifiers=tuple(verifiers),
            limits=limits or Limits(),
        )
        thread = _BrokerThread(options)
        thread.start()
        try:
            yield RunningBroker(thread.wait_until_ready(), folder)
        finally:
            thread.stop()


class _BrokerThread(threading.Thread):
    def __init__(self, options: ServeOptions) -> None:
        super().__init__(name="broker", daemon=True)
        self._options = options
        self._ready = threading.Event()
        self._target = ""
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None

    def run(self) -> None:
        """The thread's body."""
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        async with running(self._options) as target:
            self._target = target
            self._ready.set()
            await self._ended.wait()

    def wait_until_ready(self) -> str:
        """Blocks until the broker serves, or raises why it does not."""
        self._ready.wait(_START_SECONDS)
        if self._error is not None:
            raise self._error
        return self._target

    def stop(self) -> None:
        """Ends the broker and waits for it."""
        if self._loop is not None and self._ended is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._ended.set)
        self.join(_START_SECONDS)


class BrokerProcess:
    """`hacrl broker` as a process of its own. Use as a context manager."""

    def __init__(self, folder: Path, *, workers: int = 1, verifiers: Sequence[str] = ()) -> None:
        self.folder = folder
        self.target = f"127.0.0.1:{free_port()}"
        self._workers = workers
        self._verifiers = tuple(verifiers)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        if self._process is None:
            raise RuntimeError("the broker is not running; call start()")
        return self._process.pid

    def start(self) -> None:
        """Starts the broker and waits until it serves."""
        command = [sys.executable, "-m", "hacrl_exchange.cli", "broker"]
        command += ["--folder", str(self.folder), "--listen", self.target, "--workers", str(self._workers)]
        for verifier in self._verifiers:
            command += ["--verifier", verifier]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ
        )
        with grpc.insecure_channel(self.target) as channel:
            grpc.channel_ready_future(channel).result(timeout=_START_SECONDS)

    def kill(self) -> None:
        """kill -9, and waits until it is gone."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(_START_SECONDS)
        self._process = None
        return code

    def __enter__(self) -> BrokerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
