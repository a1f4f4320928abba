"""The workers a broker knows: what they offer, and which one falls silent first. Volatile, like the queue."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hacrl_exchange.errors import WorkerNotFoundError


@dataclass(slots=True)
class Worker:
    """A registered worker. `last_seen` in seconds of a monotonic clock; `watched`: it has an entry among the
    silences."""

    identity: str
    principal: str
    verifiers: tuple[str, ...]
    last_seen: float
    needs_tokens: frozenset[str] = frozenset()
    open_waits: int = 0
    watched: bool = False
    leases: dict[str, None] = field(default_factory=dict)


class Workers:
    """Workers by id. Every call costs O(log n) or less, but for `ids`."""

    def __init__(self, *, silent_seconds: float) -> None:
        self._silent_seconds = silent_seconds
        self._workers: dict[str, Worker] = {}
        self._offering: dict[str, dict[str, None]] = {}
        self._silences: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._workers)

    def register(self, worker_id: str, worker: Worker) -> None:
        """Adds a worker; one of the same id hands on its leases and open calls."""
        old = self._workers.get(worker_id)
        if old is None:
            self._watch(worker_id, worker)
        else:
            self._withdraw(worker_id, old)
            worker.open_waits, worker.watched, worker.leases = old.open_waits, old.watched, old.leases
        self._workers[worker_id] = worker
        for verifier in worker.verifiers:
            self._offering.setdefault(verifier, {})[worker_id] = None

    def drop(self, worker_id: str) -> Worker | None:
        """Forgets a worker; what it was, None if it is not known."""
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self._withdraw(worker_id, worker)
        return worker

    def find(self, worker_id: str) -> Worker | None:
        """A worker, or None."""
        return self._workers.get(worker_id)

    def get(self, worker_id: str) -> Worker:
        """A worker.

        Raises:
            WorkerNotFoundError: it is not registered, or was dropped.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            raise WorkerNotFoundError(
                f"The broker does not know worker {worker_id}: register again.", worker=worker_id
            )
        return worker

    def ids(self) -> list[str]:
        """The ids of all, in order."""
        return sorted(self._workers)

    def begin_wait(self, worker_id: str, *, now: float) -> None:
        """A long poll is open: the worker is alive until `end_wait`.

        Raises:
            WorkerNotFoundError: as `get`.
        """
        worker = self.get(worker_id)
        worker.last_seen = now
        worker.open_waits += 1

    def end_wait(self, worker_id: str, *, now: float) -> None:
        """The long poll ended. A worker that is gone by now is no error."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.last_seen = now
            worker.open_waits -= 1
            if not worker.watched:
                self._watch(worker_id, worker)

    def any_offers(self, verifier: str, *, now: float) -> bool:
        """Some worker that is not silent offers the verifier."""
        offering = (self._workers[worker_id] for worker_id in self._offering.get(verifier, ()))
        return any(worker.open_waits or self._silent_at(worker) > now for worker in offering)

    def next_silence(self) -> tuple[float, str] | None:
        """The worker that falls silent first, and when; one in a long poll is watched again after it."""
        while self._silences:
            at, worker_id = self._silences[0]
            worker = self._workers.get(worker_id)
            if worker is None or worker.open_waits:
                heapq.heappop(self._silences)
                if worker is not None:
                    worker.watched = False
            elif self._silent_at(worker) == at:
                return at, worker_id
            else:
                heapq.heapreplace(self._silences, (self._silent_at(worker), worker_id))
        return None

    def _silent_at(self, worker: Worker) -> float:
        return worker.last_seen + self._silent_seconds

    def _watch(self, worker_id: str, worker: Worker) -> None:
        worker.watched = True
        heapq.heappush(self._silences, (self._silent_at(worker), worker_id))

    def _withdraw(self, worker_id: str, worker: Worker) -> None:
        for verifier in set(worker.verifiers):
            offering = self._offering[verifier]
            del offering[worker_id]
            if not offering:
                del self._offering[verifier]
