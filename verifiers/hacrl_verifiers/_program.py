"""The worker as a program: signals, standard input, exit codes. cli.py says what its options mean."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import dataclass

from hacrl_exchange.errors import ExchangeError
from hacrl_verifiers.isolation import IsolationError, Limits, Pool

KEY_VARIABLE = "HACRL_WORKER_KEY"

_log = logging.getLogger("hacrl.worker")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What the command line says. No verifiers means every registered one that loads."""

    broker: str
    verifiers: tuple[str, ...]
    slots: int
    identity: str
    memory_bytes: int
    once: bool
    until_stdin_closes: bool


def run_worker(settings: WorkerSettings) -> int:
    """Runs a worker to its end. Returns the exit code; what went wrong is one sentence on standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        # The zygote first: it must have neither gRPC nor our threads.
        with Pool(settings.verifiers, slots=settings.slots, limits=Limits(settings.memory_bytes)) as pool:
            _check_loaded(pool, asked=bool(settings.verifiers))
            return _serve(settings, pool)
    except IsolationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _leave(*_: object) -> None:
    """Ends a program that has nothing in hand yet."""
    raise SystemExit(0)


def _check_loaded(pool: Pool, *, asked: bool) -> None:
    for _, problem in pool.failures:
        if asked:
            raise IsolationError(problem)
        _log.warning("%s", problem)
    if not pool.offered:
        raise IsolationError(
            "No verifier can be loaded, so there is nothing to offer. Install some, or name one."
        )


def _serve(settings: WorkerSettings, pool: Pool) -> int:
    from hacrl_exchange.client.worker import WorkerClient
    from hacrl_verifiers.worker import Worker

    names = ", ".join(f"{offered.name} {offered.version}" for offered in pool.offered)
    _log.info("Offering %s to %s, %d at a time.", names, settings.broker, settings.slots)
    identity = settings.identity or f"{socket.gethostname()}-{os.getpid()}"
    with WorkerClient(settings.broker, key=os.environ.get(KEY_VARIABLE)) as client, _Wakeups() as wakeups:
        worker = Worker(client, pool, identity=identity, once=settings.once)
        failures: list[ExchangeError | IsolationError] = []

        def run() -> None:
            try:
                worker.run()
            except (ExchangeError, IsolationError) as error:
                failures.append(error)
            finally:
                wakeups.wake()

        thread = threading.Thread(target=run, name="worker")
        thread.start()
        wakeups.wait(stdin=settings.until_stdin_closes)
        worker.stop()
        thread.join()
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


class _Wakeups:
    """Waits in the main thread for a signal, the end of standard input, or `wake`.

    Signals arrive as bytes on a socket: a handler that took a lock could block the thread it interrupted.
    """

    def __enter__(self) -> _Wakeups:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._old = {
            number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)
        }
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._read.close()
        self._write.close()

    def wake(self) -> None:
        """Ends `wait`. May be called from any thread."""
        self._write.send(b"\0")

    def wait(self, *, stdin: bool) -> None:
        """Returns at the first of the three."""
        sources: list[int] = [self._read.fileno()]
        if stdin:
            sources.append(sys.stdin.fileno())
        while True:
            ready, _, _ = select.select(sources, [], [])
            if self._read.fileno() in ready or not os.read(sys.stdin.fileno(), 4096):
                return
