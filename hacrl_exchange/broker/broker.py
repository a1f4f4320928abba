"""The broker as an object: the log, the prompt sets, the pools and the verification desk.

Services call it; server.py gives it sockets. It owns the life of every pool.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from hacrl_exchange import codec
from hacrl_exchange.broker.core.records import CreatePool
from hacrl_exchange.broker.core.spec import MAX_MEMBERS, checked_spec
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.desk import VerificationDesk
from hacrl_exchange.broker.history import History
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.log import CATALOG, Log
from hacrl_exchange.broker.prompts import PromptSet, PromptStore
from hacrl_exchange.broker.recovery import fold_stream
from hacrl_exchange.broker.runtime import PoolRuntime
from hacrl_exchange.broker.sqlite_log import open_sqlite_log
from hacrl_exchange.errors import BrokerStoppingError, InvalidPoolError, PoolExistsError, PoolNotFoundError
from hacrl_exchange.types import PoolSpec

_log = logging.getLogger(__name__)

_ROSTER_SIZE = MAX_MEMBERS * (63 + 2) + 256
"""Bytes of a full roster of the longest names, and a step's own fields."""

_JOIN_SIZE = 4096
"""Bytes of what else JoinPool answers: the member, its model, names."""


class Pool:
    """A pool as services see it: what runs it, what it was, and its prompts."""

    def __init__(self, runtime: PoolRuntime, history: History, prompts: PromptSet) -> None:
        self.runtime = runtime
        self.history = history
        self.prompts = prompts


class Broker:
    """Create with `Broker.open`; end with `stop`."""

    def __init__(self, log: Log, *, limits: Limits) -> None:
        self.limits = limits
        self._log = log
        self.prompts = PromptStore(log, limits=limits)
        self.desk = VerificationDesk(limits=limits, pools=self)
        self._pools: dict[str, Pool] = {}
        self._creating = asyncio.Lock()
        self._stopping = False

    @classmethod
    async def open(cls, folder: Path, *, limits: Limits) -> Broker:
        """Opens a data folder and goes on where it stopped.

        Raises:
            DatabaseTooNewError, DatabaseInUseError, CorruptLogError: as their names say.
        """
        log = await asyncio.to_thread(open_sqlite_log, folder)
        broker = cls(log, limits=limits)
        try:
            await asyncio.to_thread(broker.prompts.load)
            for stream in await asyncio.to_thread(log.streams):
                if stream != CATALOG:
                    await broker._open_pool(stream)
        except BaseException:
            await asyncio.to_thread(log.close)
            raise
        broker.desk.start()
        return broker

    def pool(self, name: str) -> Pool:
        """A pool by its bare id.

        Raises:
            PoolNotFoundError: there is none.
        """
        found = self._pools.get(name)
        if found is None:
            raise PoolNotFoundError(
                f"There is no pool {name}; `hacrl pool list` names those that exist.", pool=name
            )
        return found

    def pools(self) -> list[Pool]:
        """Every pool, by name."""
        return [self._pools[name] for name in sorted(self._pools)]

    async def create_pool(self, name: str, spec: PoolSpec) -> Pool:
        """Makes a pool, durable when it returns; the same spec again is the stored pool. Shield it.

        Raises:
            PromptSetNotFoundError, InvalidPoolError, PoolExistsError, LogFailedError: as their names say.
        """
        prompts = self.prompts.get(spec.prompt_set)
        spec = checked_spec(spec, prompt_count=len(prompts.entries))
        async with self._creating:
            if self._stopping:
                raise BrokerStoppingError("The broker is shutting down; retry, it may be back soon.")
            existing = self._pools.get(name)
            if existing is not None and existing.runtime.state.spec == spec:
                return existing
            if existing is not None:
                raise PoolExistsError(
                    f"Pool {name} exists with another spec; pools are immutable, choose another name.",
                    pool=name,
                )
            await self._check_steps_fit(spec, prompts)
            await asyncio.to_thread(self._log.recover, name)
            # Usually empty; after a creation whose outcome was lost it may hold the pool already.
            state, position = await asyncio.to_thread(fold_stream, self._log, name)
            runtime = self._runtime(name, state, position, prompts)
            try:
                await runtime.submit(CreatePool(pool=name, spec=spec, prompt_count=len(prompts.entries)))
            except BaseException:
                await runtime.stop()  # nobody else knows of it
                raise
            return self._admit(name, runtime, prompts)

    async def refuse(self) -> None:
        """Answers waiters and new calls with BROKER_STOPPING, and ends the deadlines."""
        self._stopping = True
        await self.desk.stop()
        async with self._creating:  # a pool that is being created is there, or is not, before all stop
            for pool in list(self._pools.values()):
                await pool.runtime.stop()

    async def stop(self) -> None:
        """Refuses what comes, and closes the log."""
        await self.refuse()
        await asyncio.to_thread(self._log.close)

    async def _open_pool(self, stream: str) -> None:
        state, position = await asyncio.to_thread(fold_stream, self._log, stream)
        if state is None:
            return
        prompts = self.prompts.get(state.spec.prompt_set)
        runtime = self._runtime(stream, state, position, prompts)
        self._admit(stream, runtime, prompts)

    async def _check_steps_fit(self, spec: PoolSpec, prompts: PromptSet) -> None:
        """JoinPool answers with every open step in one message, prompts and rosters and all."""
        lockstep = spec.lockstep
        step_size = await asyncio.to_thread(prompts.step_size, lockstep.prompts_per_step)
        other_size = codec.pool_spec_to_proto(spec).ByteSize() + _JOIN_SIZE
        size = lockstep.max_open_steps * (step_size + _ROSTER_SIZE) + other_size
        if size > self.limits.max_message_size:
            raise InvalidPoolError(
                f"{lockstep.max_open_steps} open steps of {lockstep.prompts_per_step} prompts may take "
                f"{size} bytes with their rosters, but must fit into one message of "
                f"{self.limits.max_message_size}: choose fewer prompts per step, fewer open "
                "steps or shorter prompts.",
                field="lockstep.prompts_per_step",
                value=lockstep.prompts_per_step,
                size=size,
                limit=self.limits.max_message_size,
            )

    def _reset(self, runtime: PoolRuntime) -> None:
        """After a fold. A pool whose creation failed is nobody's: it has no state and nothing to verify."""
        pool = self._pools.get(runtime.name)
        if pool is not None and pool.runtime is runtime:
            self.desk.reset_pool(runtime)

    def _runtime(self, name: str, state: PoolState | None, position: int, prompts: PromptSet) -> PoolRuntime:
        return PoolRuntime(
            self._log,
            name,
            state,
            position,
            prompt_ids=prompts.prompt_ids,
            on_accepted=self.desk.add,
            on_reset=self._reset,
            on_closed=self.desk.step_closed,
            verifier_alive=self.desk.verifier_alive,
        )

    def _admit(self, name: str, runtime: PoolRuntime, prompts: PromptSet) -> Pool:
        pool = Pool(runtime, History(self._log, name), prompts)
        self._pools[name] = pool
        self.desk.reset_pool(runtime)
        runtime.start()
        _log.info("pool %s is open", name)
        return pool
