"""What callers see while the log is slow, and while it fails under a call that is under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from hacrl_exchange import codec
from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import prompt_pb2, step_pb2
from hacrl_exchange.broker.broker import Broker, Pool
from hacrl_exchange.broker.interceptors import Identities
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.log import Entry
from hacrl_exchange.broker.services.exchange import ExchangeService
from hacrl_exchange.errors import LogFailedError
from hacrl_exchange.types import Lockstep, PoolSpec, Slot, VerificationPlan, VerifierUse
from rawdesk import make_group

POOL = "pools/p"
CALLER = pb.Caller(agent="a", session=1)


class HeldLog:
    """A log whose appends can be held back, or made to fail."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._held: list[tuple[Future[None], str, Entry, int]] = []
        self.holding = False
        self.failing_key = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, stream: str, entry: Entry, *, expected_position: int) -> Future[None]:
        future: Future[None] = Future()
        if self.failing_key and entry.key.startswith(self.failing_key):
            self.failing_key = ""
            future.set_exception(LogFailedError("The disk is full."))
        elif self.holding:
            self._held.append((future, stream, entry, expected_position))
        else:
            written: Future[None] = self._log.append(stream, entry, expected_position=expected_position)
            return written
        return future

    def release(self) -> None:
        """Writes what was held back."""
        self.holding = False
        for future, stream, entry, position in self._held:
            self._log.append(stream, entry, expected_position=position).result()
            future.set_result(None)
        self._held = []


class NoContext:
    """A call without metadata."""

    def invocation_metadata(self) -> tuple[()]:
        return ()


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[tuple[Broker, HeldLog]]:
    """A broker whose log the test holds."""
    broker = await Broker.open(tmp_path, limits=Limits())
    log = HeldLog(broker._log)
    broker._log = log
    entries = [
        prompt_pb2.PromptEntry(
            prompt=prompt_pb2.Prompt(
                prompt_id=f"q{n}", messages=[prompt_pb2.Message(role="user", content="?")]
            )
        )
        for n in range(8)
    ]
    await broker.prompts.create("s", entries)
    yield broker, log
    await broker.stop()


async def start(broker: Broker, *, publish_seconds: float = 0.2) -> tuple[Pool, Any, ThreadPoolExecutor]:
    """A pool with short deadlines and one member, and the service to call."""
    plan = VerificationPlan((VerifierUse("v"),))
    lockstep = Lockstep(
        prompts_per_step=2,
        min_members=1,
        max_open_steps=2,
        publish_timeout_seconds=publish_seconds,
        verify_timeout_seconds=0.2,
    )
    pool = await broker.create_pool("p", PoolSpec("s", 2, plan, lockstep))
    threads = ThreadPoolExecutor(1)
    service = ExchangeService(broker, Identities(), gate_threads=threads)
    await service.JoinPool(pb.JoinPoolRequest(pool=POOL, agent="a", instance="i"), NoContext())  # type: ignore[arg-type]
    return pool, service, threads


def request_of(step: int, prompt_id: str) -> Any:
    name = codec.group_name("p", Slot(step, prompt_id, "a"))
    return codec.encode_group(make_group(prompt_id), name=name)


async def until(pool: Pool, condition: Any) -> None:
    """Waits for the pool's own deadlines."""
    async with asyncio.timeout(10):
        while not condition():
            await pool.runtime.changed(timeout_seconds=0.02)


async def test_a_step_that_is_closed_in_memory_alone_is_waited_for_not_denied(
    broker: tuple[Broker, HeldLog],
) -> None:
    pool, service, threads = await start(broker[0])
    state = pool.runtime.state
    await until(pool, lambda: state.open_steps)
    prompt_ids = state.open_steps[1].prompt_ids
    broker[1].holding = True
    await until(pool, lambda: 1 not in state.open_steps)
    waiting = asyncio.ensure_future(
        service.AwaitStep(pb.AwaitStepRequest(pool=POOL, caller=CALLER), NoContext())
    )
    late = asyncio.ensure_future(
        service.PublishGroups(
            pb.PublishGroupsRequest(pool=POOL, caller=CALLER, groups=[request_of(1, prompt_ids[0])]),
            NoContext(),
        )
    )
    await asyncio.sleep(0.05)
    assert not waiting.done()
    broker[1].release()
    assert (await waiting).step.number == 1
    assert (await waiting).step.state == step_pb2.STEP_STATE_CLOSED
    (result,) = (await late).results
    assert "STEP_CLOSED" in str(result.error)
    threads.shutdown()


async def test_no_receipt_for_a_group_that_was_lost_while_the_call_looked_something_up(
    broker: tuple[Broker, HeldLog],
) -> None:
    pool, service, threads = await start(broker[0], publish_seconds=1.0)
    state = pool.runtime.state
    await until(pool, lambda: state.last_step == 2 and not state.open_steps)
    await service.AwaitStep(pb.AwaitStepRequest(pool=POOL, caller=CALLER, after_step=99), NoContext())
    await until(pool, lambda: pool.runtime.state.open_steps)
    number = max(pool.runtime.state.open_steps)
    prompt_id = pool.runtime.state.open_steps[number].prompt_ids[0]
    old_id = (await pool.history.opened(1)).prompt_ids[0]
    broker[1].failing_key = "g/"
    groups = [request_of(number, prompt_id), request_of(1, old_id)]
    with pytest.raises(LogFailedError):
        await service.PublishGroups(
            pb.PublishGroupsRequest(pool=POOL, caller=CALLER, groups=groups), NoContext()
        )
    assert broker[1].find("p", "g/") == []
    threads.shutdown()
