"""The verification desk: hands groups to workers, takes verdicts back.

It joins the volatile queue of the core to the pools, which alone make verdicts durable. It may forget
everything at any time: groups without verdicts come back from the pools' states.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hacrl_exchange.broker.core.records import GroupAccepted, RecordVerdicts
from hacrl_exchange.broker.core.verification import (
    SILENT_LEASES,
    Failed,
    GroupRef,
    Lease,
    VerificationQueue,
    WorkerInfo,
    pending_groups,
)
from hacrl_exchange.broker.history import GroupAt
from hacrl_exchange.broker.interceptors import LOCAL_PRINCIPAL, WORKER_PRINCIPAL
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.runtime import PoolRuntime
from hacrl_exchange.errors import (
    AlreadyVerifiedError,
    BrokerStoppingError,
    ExchangeError,
    OverloadedError,
    StepClosedError,
    WorkerNotFoundError,
)
from hacrl_exchange.types import Unscored, UnscoredKind, VerdictReason

if TYPE_CHECKING:
    from hacrl_exchange.broker.broker import Broker

_log = logging.getLogger(__name__)

GENERATION = 1
"""Every group's first verification."""
_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LeasedWork:
    """A lease: its id and the groups in it, with the position their bodies are read by."""

    lease_id: str
    groups: tuple[tuple[GroupRef, GroupAt], ...]


class VerificationDesk:
    """Where workers get groups and bring verdicts. `start` begins to look after leases that run out."""

    def __init__(self, *, limits: Limits, pools: Broker) -> None:
        self._limits = limits
        self._pools = pools
        self._queue = VerificationQueue(lease_seconds=limits.lease_timeout_seconds)
        self._at: dict[tuple[str, int], dict[tuple[int, int], GroupAt]] = {}
        self._work = asyncio.Event()
        self._waiter_count = 0
        self._wakes_at = 0.0
        self._poke = asyncio.Event()
        self._stopping = False
        self._keeper: asyncio.Task[None] | None = None

    # --- the pools' side -----------------------------------------------------------------------

    def add(self, runtime: PoolRuntime, position: int, group: GroupAccepted) -> None:
        """Queues a group that has just become durable."""
        slot = (group.prompt_index, group.roster_index)
        step = runtime.state.open_steps.get(group.step)
        if step is None:
            return
        self._at.setdefault((runtime.name, group.step), {})[slot] = GroupAt(position, group)
        plan = runtime.state.spec.plan
        self._queue.add(
            GroupRef(
                pool=runtime.name,
                step=group.step,
                prompt_index=group.prompt_index,
                roster_index=group.roster_index,
                generation=GENERATION,
                verifier=plan.verifiers[0].verifier,
                max_attempts=plan.max_attempts,
            )
        )
        self._wake_workers()

    def step_closed(self, runtime: PoolRuntime, step: int) -> None:
        """Forgets the groups of a step that is final."""
        self._queue.remove_step(runtime.name, step)
        self._at.pop((runtime.name, step), None)

    def reset_pool(self, runtime: PoolRuntime) -> None:
        """Queues what a pool that was just folded needs verified, and forgets what was lost with the fold."""
        self._queue.remove_pool(runtime.name)
        self._at = {key: known for key, known in self._at.items() if key[0] != runtime.name}
        for ref in pending_groups(runtime.state):
            self._queue.add(ref)
        self._wake_workers()

    def verifier_alive(self, runtime: PoolRuntime) -> bool:
        """Some live worker offers the pool's verifier."""
        verifier = runtime.state.spec.plan.verifiers[0].verifier
        return self._queue.verifier_alive(verifier, now=time.monotonic())

    # --- the workers' side ---------------------------------------------------------------------

    def register(
        self, *, identity: str, verifiers: Sequence[str], principal: str, needs_tokens: Sequence[str] = ()
    ) -> str:
        """Introduces a worker; the id it carries from now on.

        Raises:
            OverloadedError: there are as many workers as the broker takes.
        """
        limit = self._limits.max_workers
        if self._queue.statistics().worker_count >= limit:
            raise OverloadedError(
                f"The broker has {limit} workers and takes no more; stop some, or retry when silent ones "
                "are dropped.",
                retry_seconds=self._limits.lease_timeout_seconds,
            )
        worker_id = uuid.uuid4().hex
        self._queue.register(
            worker_id,
            identity=identity,
            verifiers=verifiers,
            principal=principal,
            now=time.monotonic(),
            needs_tokens=needs_tokens,
        )
        self._look_by(SILENT_LEASES * self._limits.lease_timeout_seconds)
        _log.info("worker %s offers %s", identity, ", ".join(verifiers))
        return worker_id

    async def acquire(self, worker_id: str, *, max_groups: int, wait_seconds: float) -> LeasedWork | None:
        """Waits for groups; None if none came.

        Raises:
            WorkerNotFoundError: register again.
            BrokerStoppingError: the broker is going down.
        """
        until = time.monotonic() + wait_seconds
        async with self._waiting(worker_id):
            while True:
                self._refuse_if_stopping()
                event = self._work
                lease = self._queue.acquire(
                    worker_id,
                    lease_id=uuid.uuid4().hex,
                    max_groups=max_groups,
                    now=time.monotonic(),
                    excluded_pools=self._excluded_pools(worker_id),
                )
                if lease is not None:
                    self._look_by(self._limits.lease_timeout_seconds)
                    work = await self._located(lease)
                    if work.groups:
                        return work
                    continue
                remaining = until - time.monotonic()
                if remaining <= 0:
                    return None
                self._waiter_count += 1
                try:
                    async with asyncio.timeout(remaining):
                        await event.wait()
                except TimeoutError:
                    pass  # the queue is asked once more, then there is no time left
                finally:
                    self._waiter_count -= 1

    def put_back(self, refs: Sequence[GroupRef], *, lease_id: str) -> None:
        """Takes groups out of a lease, unworked: they do not fit into one message, or nobody gets it."""
        for ref in refs:
            self._queue.put_back(ref, lease_id=lease_id)
        if refs:
            self._wake_workers()

    def renew(self, worker_id: str, lease_id: str) -> None:
        """Extends a lease.

        Raises:
            WorkerNotFoundError, LeaseExpiredError: as their names say.
        """
        self._queue.renew(worker_id, lease_id, now=time.monotonic())

    def touch(self, worker_id: str) -> None:
        """Notes a worker's call.

        Raises:
            WorkerNotFoundError: register again.
        """
        self._queue.touch(worker_id, now=time.monotonic())

    def identity(self, worker_id: str) -> str:
        """What a worker calls itself.

        Raises:
            WorkerNotFoundError: register again.
        """
        return self._queue.worker(worker_id).identity

    def needs_tokens(self, worker_id: str) -> frozenset[str]:
        """The verifiers of a worker that want token ids; none for a worker that is gone."""
        try:
            return self._queue.worker(worker_id).needs_tokens
        except WorkerNotFoundError:
            return frozenset()

    def finish(self, command: RecordVerdicts, *, pool: str) -> None:
        """Forgets a group whose verdicts are recorded."""
        plan = self._pools.pool(pool).runtime.state.spec.plan
        self._queue.finish(
            GroupRef(
                pool=pool,
                step=command.step,
                prompt_index=command.prompt_index,
                roster_index=command.roster_index,
                generation=command.generation,
                verifier=plan.verifiers[0].verifier,
                max_attempts=plan.max_attempts,
            )
        )

    def workers(self) -> tuple[WorkerInfo, ...]:
        """The registered workers."""
        return self._queue.workers()

    def local_worker_ended(self, name: str) -> None:
        """The process of a spawned worker is gone: its groups go elsewhere at once."""
        for worker in self._queue.workers():
            if worker.identity == name and worker.principal == WORKER_PRINCIPAL:
                self._settle(self._queue.release_worker(worker.worker_id))

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to look after leases that run out and workers that fall silent."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="verification desk")

    async def stop(self) -> None:
        """Answers waiting workers with BROKER_STOPPING."""
        self._stopping = True
        self._wake_workers()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    # --- inside --------------------------------------------------------------------------------

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise BrokerStoppingError(
                "The broker is shutting down; retry, it may be back soon.", retry_seconds=1.0
            )

    @contextlib.asynccontextmanager
    async def _waiting(self, worker_id: str) -> AsyncIterator[None]:
        self._queue.begin_wait(worker_id, now=time.monotonic())
        try:
            yield
        finally:
            self._queue.end_wait(worker_id, now=time.monotonic())
            self._look_by(SILENT_LEASES * self._limits.lease_timeout_seconds)

    def _excluded_pools(self, worker_id: str) -> set[str]:
        """Pools in which the worker's principal owns an agent: nobody judges their own competition."""
        principal = self._queue.worker(worker_id).principal
        if principal in (LOCAL_PRINCIPAL, WORKER_PRINCIPAL):
            return set()
        return {
            pool.runtime.name
            for pool in self._pools.pools()
            if any(member.principal == principal for member in pool.runtime.state.members.values())
        }

    async def _located(self, lease: Lease) -> LeasedWork:
        """A lease with where its bodies lie; a caller that gives up meanwhile leaves the groups untouched."""
        try:
            found = [(ref, at) for ref in lease.items if (at := await self._find(ref)) is not None]
        except BaseException:
            self.put_back(lease.items, lease_id=lease.lease_id)
            raise
        missing = set(lease.items).difference(ref for ref, _ in found)
        for ref in missing:
            self._queue.finish(ref)  # its step closed, or it is not in the log: nobody can verify it
        limits = self._limits
        seconds = limits.max_lease_seconds
        for ref, at in found:
            plan = self._pools.pool(ref.pool).runtime.state.spec.plan
            longest = at.record.rollout_count * plan.item_timeout_seconds
            seconds = max(seconds, longest + limits.lease_margin_seconds)
        self._queue.bound(lease.lease_id, ends_at=time.monotonic() + seconds)
        return LeasedWork(lease.lease_id, tuple(found))

    async def _find(self, ref: GroupRef) -> GroupAt | None:
        """Where a group's bodies lie; after a restart it is read from the log once a step."""
        key, slot = (ref.pool, ref.step), (ref.prompt_index, ref.roster_index)
        known = self._at.get(key)
        if known is not None and slot in known:
            return known[slot]
        pool = self._pools.pool(ref.pool)
        if ref.step not in pool.runtime.state.open_steps:
            return None
        groups = await pool.history.groups(ref.step)
        if ref.step in pool.runtime.state.open_steps:
            self._at.setdefault(key, {}).update(groups)
        return groups.get(slot)

    def _wake_workers(self) -> None:
        if self._waiter_count:
            self._work.set()
            self._work = asyncio.Event()

    def _look_by(self, seconds: float) -> None:
        """Wakes the keeper if it would sleep past a time that has just come into being."""
        if time.monotonic() + seconds < self._wakes_at:
            self._poke.set()

    async def _keep(self) -> None:
        while True:
            try:
                await self._look_after()
            except Exception:
                # Without this task no lease would ever run out again, so it outlives its bugs.
                _log.exception("the verification desk failed on a bug; it goes on")
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _look_after(self) -> None:
        """Fails what ran out, and sleeps until something else can."""
        self._poke.clear()
        self._settle(self._queue.expire(now=time.monotonic()))
        expiry = self._queue.next_expiry()
        self._wakes_at = math.inf if expiry is None else expiry + 0.001
        delay = None if expiry is None else max(0.0, self._wakes_at - time.monotonic())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._poke.wait()

    def _settle(self, failed: Failed) -> None:
        """Goes on after failed leases: others take the groups, and those out of attempts end."""
        if failed.returned:
            _log.warning("%d groups return to the queue after a failed lease", len(failed.returned))
            self._wake_workers()
        for ref in failed.exhausted:
            try:
                self._exhaust(ref)
            except (StepClosedError, AlreadyVerifiedError):
                continue  # it is final without us
            except ExchangeError as error:
                _log.error("group %s could not be ended, it is tried again: %s", ref, error)
                self._queue.add(ref)

    def _exhaust(self, ref: GroupRef) -> None:
        runtime = self._pools.pool(ref.pool).runtime
        step = runtime.state.open_steps.get(ref.step)
        if step is None:
            return
        group = step.groups[ref.prompt_index, ref.roster_index]
        verdict = Unscored(UnscoredKind.VERIFIER_ERROR, VerdictReason.ATTEMPTS_EXHAUSTED)
        runtime.apply(
            RecordVerdicts(
                step=ref.step,
                prompt_index=ref.prompt_index,
                roster_index=ref.roster_index,
                generation=ref.generation,
                verifier=None,
                worker="",
                verdicts=(verdict,) * group.rollout_count,
            )
        )
