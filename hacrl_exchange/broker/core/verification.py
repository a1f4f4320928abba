"""Which worker verifies what: groups that wait, leases, workers. Volatile; a restart begins with nothing.

The durable side is the pool's: a group without verdicts is pending (`pending_groups`), and verdicts count
once, whoever reports them and whether or not the lease is still known. So this queue may forget at any
time, and only has to be fair and to make progress. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Set
from dataclasses import dataclass

from hacrl_exchange.broker.core.leases import (
    Failed,
    GroupRef,
    Lease,
    Statistics,
    WorkerInfo,
    pending_groups,
)
from hacrl_exchange.broker.core.workers import Worker, Workers
from hacrl_exchange.errors import LeaseExpiredError

__all__ = [
    "Failed",
    "GroupRef",
    "Lease",
    "Statistics",
    "VerificationQueue",
    "WorkerInfo",
    "pending_groups",
]

SILENT_LEASES = 3
"""A worker without an open call is dropped after so many lease timeouts without one."""


@dataclass(slots=True)
class _Item:
    ref: GroupRef
    arrival: int
    attempts: int = 0
    alone: bool = False
    lease_id: str = ""


@dataclass(slots=True)
class _Lease:
    worker_id: str
    expires_at: float
    granted_count: int
    items: dict[GroupRef, _Item]
    ends_at: float = math.inf


class VerificationQueue:
    """Groups wait per verifier and pool, ordered by step, then arrival; the pool whose head came first is
    served first.

    A lease that fails (it runs out, or its worker dies) returns its groups to their old places. If it held
    several, nobody knows which one did it: they are retried singly, and no attempt is charged. If it held
    one, an attempt is charged, and at `max_attempts` the group is exhausted. Every operation costs
    O(log n) per group it touches; queues are many heaps whose dead entries are skipped when they surface.
    So it is with the times: a lease or a worker has one entry, which moves on when it surfaces too early.
    """

    def __init__(self, *, lease_seconds: float) -> None:
        self.lease_seconds = lease_seconds
        self._arrivals = 0
        self._items: dict[GroupRef, _Item] = {}
        self._by_step: dict[tuple[str, int], dict[GroupRef, None]] = {}
        self._queues: dict[str, dict[str, list[tuple[int, int, GroupRef]]]] = {}
        self._leases: dict[str, _Lease] = {}
        self._expiries: list[tuple[float, str]] = []
        self._workers = Workers(silent_seconds=SILENT_LEASES * lease_seconds)
        self._leased_count = 0

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"<VerificationQueue [{now.waiting_count} waiting, {now.leased_count} leased, "
            f"{now.worker_count} workers]>"
        )

    # --- workers -----------------------------------------------------------------------------------

    def register(
        self,
        worker_id: str,
        *,
        identity: str,
        verifiers: Iterable[str],
        principal: str,
        now: float,
        needs_tokens: Iterable[str] = (),
    ) -> None:
        """Introduces a worker under an id that the caller made up; the same id again keeps its leases."""
        self._workers.register(
            worker_id, Worker(identity, principal, tuple(verifiers), now, frozenset(needs_tokens))
        )

    def touch(self, worker_id: str, *, now: float) -> None:
        """Notes a call of a worker.

        Raises:
            WorkerNotFoundError: the worker is not registered, or was dropped.
        """
        self._workers.get(worker_id).last_seen = now

    def begin_wait(self, worker_id: str, *, now: float) -> None:
        """A long poll of the worker is open: it is alive until `end_wait`.

        Raises:
            WorkerNotFoundError: as `touch`.
        """
        self._workers.begin_wait(worker_id, now=now)

    def end_wait(self, worker_id: str, *, now: float) -> None:
        """The long poll ended. A worker that is gone by now is no error."""
        self._workers.end_wait(worker_id, now=now)

    def release_worker(self, worker_id: str) -> Failed:
        """Drops a worker whose process is gone; its leases fail at once. Unknown workers are no error."""
        worker = self._workers.drop(worker_id)
        if worker is None:
            return Failed()
        returned: list[GroupRef] = []
        exhausted: list[GroupRef] = []
        for lease_id in list(worker.leases):
            self._fail(lease_id, returned, exhausted)
        return Failed(tuple(returned), tuple(exhausted), (worker_id,))

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The registered workers by id."""
        return tuple(self.worker(worker_id) for worker_id in self._workers.ids())

    def worker(self, worker_id: str) -> WorkerInfo:
        """One registered worker.

        Raises:
            WorkerNotFoundError: as `touch`.
        """
        worker = self._workers.get(worker_id)
        leased = sum(len(self._leases[lease_id].items) for lease_id in worker.leases)
        return WorkerInfo(
            worker_id, worker.identity, worker.principal, worker.verifiers, leased, worker.needs_tokens
        )

    def verifier_alive(self, verifier: str, *, now: float) -> bool:
        """Some worker that is not silent offers the verifier."""
        return self._workers.any_offers(verifier, now=now)

    # --- groups ------------------------------------------------------------------------------------

    def add(self, ref: GroupRef) -> None:
        """Queues a group. One that is queued or leased already stays where it is."""
        if ref in self._items:
            return
        self._arrivals += 1
        item = _Item(ref, self._arrivals)
        self._items[ref] = item
        self._by_step.setdefault((ref.pool, ref.step), {})[ref] = None
        self._push(item)

    def acquire(
        self,
        worker_id: str,
        *,
        lease_id: str,
        max_groups: int,
        now: float,
        excluded_pools: Set[str] = frozenset(),
    ) -> Lease | None:
        """Leases up to `max_groups` groups for verifiers of the worker; None if none wait.

        `excluded_pools` are those whose groups the worker must not judge: its principal owns agents there.

        Raises:
            WorkerNotFoundError: as `touch`.
        """
        worker = self._workers.get(worker_id)
        worker.last_seen = now
        taken: dict[GroupRef, _Item] = {}
        while len(taken) < max_groups:
            queue = self._first_queue(worker.verifiers, excluded_pools=excluded_pools)
            if queue is None:
                break
            item = self._items[queue[0][2]]
            if item.alone and taken:
                break
            heapq.heappop(queue)
            item.lease_id = lease_id
            taken[item.ref] = item
            if item.alone:
                break
        if not taken:
            return None
        expires_at = now + self.lease_seconds
        self._leases[lease_id] = _Lease(worker_id, expires_at, len(taken), taken)
        self._leased_count += len(taken)
        worker.leases[lease_id] = None
        heapq.heappush(self._expiries, (expires_at, lease_id))
        return Lease(lease_id, worker_id, expires_at, tuple(taken))

    def renew(self, worker_id: str, lease_id: str, *, now: float) -> float:
        """Extends a lease of the worker, up to its end; the time it now runs out.

        Raises:
            WorkerNotFoundError: as `touch`.
            LeaseExpiredError: the lease ran out, or nothing of it is left to do.
        """
        self._workers.get(worker_id).last_seen = now
        lease = self._leases.get(lease_id)
        if lease is None or lease.worker_id != worker_id:
            raise LeaseExpiredError(
                f"The lease {lease_id} ran out or is done: stop working on it and acquire another.",
                lease=lease_id,
                worker=worker_id,
            )
        lease.expires_at = min(now + self.lease_seconds, lease.ends_at)
        return lease.expires_at

    def bound(self, lease_id: str, *, ends_at: float) -> None:
        """Sets a time, at least a lease time from now, beyond which a lease cannot be renewed."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.ends_at = ends_at

    def finish(self, ref: GroupRef) -> bool:
        """Forgets a group that has its verdicts, wherever it is; False if it was not here."""
        item = self._items.pop(ref, None)
        if item is None:
            return False
        refs = self._by_step[ref.pool, ref.step]
        del refs[ref]
        if not refs:
            del self._by_step[ref.pool, ref.step]
        if item.lease_id:
            self._take_out(item)
        return True

    def put_back(self, ref: GroupRef, *, lease_id: str = "") -> None:
        """A leased group was not worked on after all: it waits in its old place, attempts as before.

        With `lease_id`, only if it is that lease that holds it.
        """
        item = self._items.get(ref)
        if item is not None and item.lease_id and lease_id in ("", item.lease_id):
            self._leases[item.lease_id].granted_count -= 1
            self._take_out(item)
            self._push(item)

    def remove_step(self, pool: str, step: int) -> None:
        """Forgets the groups of a closed step; leases on them end."""
        for ref in list(self._by_step.get((pool, step), ())):
            self.finish(ref)

    def remove_pool(self, pool: str) -> None:
        """Forgets every group of a pool; a pool that was folded again adds what it still needs."""
        for name, step in [key for key in self._by_step if key[0] == pool]:
            self.remove_step(name, step)

    # --- time --------------------------------------------------------------------------------------

    def expire(self, *, now: float) -> Failed:
        """Fails the leases that ran out and drops the workers that are silent."""
        returned: list[GroupRef] = []
        exhausted: list[GroupRef] = []
        while (lease := self._next_lease()) is not None and lease[0] <= now:
            self._fail(lease[1], returned, exhausted)
        dropped: list[str] = []
        while (silence := self._workers.next_silence()) is not None and silence[0] <= now:
            failed = self.release_worker(silence[1])
            dropped.append(silence[1])
            returned.extend(failed.returned)
            exhausted.extend(failed.exhausted)
        return Failed(tuple(returned), tuple(exhausted), tuple(dropped))

    def next_expiry(self) -> float | None:
        """When `expire` has something to do, if nothing else happens before."""
        entries = (self._next_lease(), self._workers.next_silence())
        return min((entry[0] for entry in entries if entry is not None), default=None)

    def statistics(self) -> Statistics:
        """How many groups wait and are leased, under how many leases and workers."""
        return Statistics(
            waiting_count=len(self._items) - self._leased_count,
            leased_count=self._leased_count,
            lease_count=len(self._leases),
            worker_count=len(self._workers),
        )

    # --- inside ------------------------------------------------------------------------------------

    def _next_lease(self) -> tuple[float, str] | None:
        """The lease that runs out first, and when."""
        while self._expiries:
            at, lease_id = self._expiries[0]
            lease = self._leases.get(lease_id)
            if lease is None:
                heapq.heappop(self._expiries)
            elif lease.expires_at == at:
                return at, lease_id
            else:
                heapq.heapreplace(self._expiries, (lease.expires_at, lease_id))
        return None

    def _push(self, item: _Item) -> None:
        pools = self._queues.setdefault(item.ref.verifier, {})
        heapq.heappush(pools.setdefault(item.ref.pool, []), (item.ref.step, item.arrival, item.ref))

    def _first_queue(
        self, verifiers: tuple[str, ...], *, excluded_pools: Set[str]
    ) -> list[tuple[int, int, GroupRef]] | None:
        """The queue whose head arrived first, its dead entries removed. Looks at one head per pool."""
        first: list[tuple[int, int, GroupRef]] | None = None
        for verifier in verifiers:
            pools = self._queues.get(verifier, {})
            for pool in list(pools):
                queue = pools[pool]
                while queue and not self._waits(queue[0]):
                    heapq.heappop(queue)
                if not queue:
                    del pools[pool]
                elif pool not in excluded_pools and (first is None or queue[0][1] < first[0][1]):
                    first = queue
        return first

    def _waits(self, entry: tuple[int, int, GroupRef]) -> bool:
        item = self._items.get(entry[2])
        return item is not None and item.arrival == entry[1] and not item.lease_id

    def _fail(self, lease_id: str, returned: list[GroupRef], exhausted: list[GroupRef]) -> None:
        lease = self._drop_lease(lease_id)
        self._leased_count -= len(lease.items)
        for item in lease.items.values():
            item.lease_id = ""
            item.attempts += lease.granted_count == 1
            item.alone = True
            if item.attempts >= item.ref.max_attempts:
                self.finish(item.ref)
                exhausted.append(item.ref)
            else:
                self._push(item)
                returned.append(item.ref)

    def _take_out(self, item: _Item) -> None:
        lease_id, item.lease_id = item.lease_id, ""
        lease = self._leases[lease_id]
        del lease.items[item.ref]
        self._leased_count -= 1
        if not lease.items:
            self._drop_lease(lease_id)

    def _drop_lease(self, lease_id: str) -> _Lease:
        lease = self._leases.pop(lease_id)
        worker = self._workers.find(lease.worker_id)
        if worker is not None:
            del worker.leases[lease_id]
        return lease
