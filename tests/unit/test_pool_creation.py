"""A pool that could never run is refused, and one that could not be created leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hacrl_exchange._pb import prompt_pb2
from hacrl_exchange.broker.broker import Broker
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.broker.log import Entry
from hacrl_exchange.errors import BrokerStoppingError, InvalidPoolError, LogFailedError
from hacrl_exchange.types import Lockstep, PoolSpec, VerificationPlan, VerifierUse

SPEC = PoolSpec("s", 2, VerificationPlan((VerifierUse("v"),)), Lockstep(prompts_per_step=2, min_members=1))


class HeldLog:
    """A log that fails a pool's first record, or keeps it back until told."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self.failing = False
        self.held: asyncio.Event | None = None
        self._waiting: list[tuple[Future[None], str, Entry, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, stream: str, entry: Entry, *, expected_position: int) -> Future[None]:
        future: Future[None] = Future()
        if self.failing:
            future.set_exception(LogFailedError("The disk is full."))
        elif self.held is not None:
            self._waiting.append((future, stream, entry, expected_position))
            self.held.set()
        else:
            written: Future[None] = self._log.append(stream, entry, expected_position=expected_position)
            return written
        return future

    def release(self) -> None:
        """Writes what was held back."""
        for future, stream, entry, position in self._waiting:
            self._log.append(stream, entry, expected_position=position).result()
            future.set_result(None)
        self._waiting = []
        self.held = None


async def opened(folder: Path, *, content: str = "?", count: int = 8) -> tuple[Broker, HeldLog]:
    broker = await Broker.open(folder, limits=Limits())
    entries = [
        prompt_pb2.PromptEntry(
            prompt=prompt_pb2.Prompt(
                prompt_id=f"q{n}", messages=[prompt_pb2.Message(role="user", content=content)]
            )
        )
        for n in range(count)
    ]
    await broker.prompts.create("s", entries)
    log = HeldLog(broker._log)
    broker._log = log
    return broker, log


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[tuple[Broker, HeldLog]]:
    broker, log = await opened(tmp_path)
    yield broker, log
    await broker.stop()


def tasks_of_pools() -> list[str]:
    """What runs besides the test and the desk's keeper."""
    return [task.get_name() for task in asyncio.all_tasks() if "timer of" in task.get_name()]


async def test_a_pool_that_could_not_be_created_leaves_nothing_running(
    broker: tuple[Broker, HeldLog], caplog: pytest.LogCaptureFixture
) -> None:
    loop_errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
    before = asyncio.all_tasks()
    broker[1].failing = True
    with pytest.raises(LogFailedError):
        await broker[0].create_pool("p", SPEC)
    assert asyncio.all_tasks() == before
    assert broker[0].pools() == []
    assert not any("upkeep failed" in record.message for record in caplog.records)
    assert loop_errors == []
    broker[1].failing = False
    assert (await broker[0].create_pool("p", SPEC)).runtime.state.pool == "p"


async def test_a_pool_created_while_the_broker_stops_is_stopped_with_it(
    broker: tuple[Broker, HeldLog],
) -> None:
    broker[1].held = asyncio.Event()
    creating = asyncio.ensure_future(broker[0].create_pool("p", SPEC))
    late = asyncio.ensure_future(broker[0].create_pool("q", SPEC))
    await broker[1].held.wait()
    stopping = asyncio.ensure_future(broker[0].refuse())
    await asyncio.sleep(0)
    broker[1].release()
    await stopping
    await asyncio.wait([creating, late])
    with pytest.raises(BrokerStoppingError):
        late.result()
    assert creating.exception() is None
    assert tasks_of_pools() == []


async def test_a_creation_whose_outcome_was_lost_is_found_by_the_retry(
    broker: tuple[Broker, HeldLog],
) -> None:
    broker[1].held = asyncio.Event()
    creating = asyncio.ensure_future(broker[0].create_pool("p", SPEC))
    await broker[1].held.wait()
    creating.cancel()
    await asyncio.wait([creating])
    broker[1].release()
    pool = await broker[0].create_pool("p", SPEC)
    assert pool.runtime.state.spec.capability_window == 5
    assert len(list(broker[1].read("p"))) == 1


@pytest.mark.parametrize(("prompts", "open_steps"), [(32, 1), (8, 4)])
async def test_a_pool_whose_steps_do_not_fit_into_a_message_is_refused(
    tmp_path: Path, prompts: int, open_steps: int
) -> None:
    broker, _ = await opened(tmp_path, content="x" * (260 << 10), count=32)
    lockstep = Lockstep(prompts_per_step=prompts, min_members=1, max_open_steps=open_steps)
    with pytest.raises(InvalidPoolError, match="must fit into one message"):
        await broker.create_pool("p", replace(SPEC, lockstep=lockstep))
    assert broker.pools() == []
    fewer = replace(lockstep, prompts_per_step=prompts - 2)
    assert await broker.create_pool("p", replace(SPEC, lockstep=fewer)) is broker.pool("p")
    await broker.stop()


@pytest.mark.parametrize("config", ["[" * 100_000, '{"a":' * 100_000, '{"a": NaN}', "[]"])
async def test_a_configuration_that_is_not_a_strict_json_object_is_refused(
    broker: tuple[Broker, HeldLog], config: str
) -> None:
    plan = VerificationPlan((VerifierUse("v", config),))
    with pytest.raises(InvalidPoolError, match="a JSON object"):
        await broker[0].create_pool("p", replace(SPEC, plan=plan))
