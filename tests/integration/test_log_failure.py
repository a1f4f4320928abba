"""When the disk fails nobody gets a receipt, nothing half is kept, and the pool goes on later."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import pytest

from hacrl_exchange.broker.core.records import CreatePool, Join, Touch
from hacrl_exchange.broker.log import Entry
from hacrl_exchange.broker.recovery import fold_stream
from hacrl_exchange.broker.runtime import PoolRuntime
from hacrl_exchange.broker.sqlite_log import SqliteLog, open_sqlite_log
from hacrl_exchange.errors import LogFailedError
from hacrl_exchange.types import Lockstep, ModelSpec, PoolSpec, VerificationPlan, VerifierUse

SPEC = PoolSpec(
    prompt_set="s",
    group_size=2,
    plan=VerificationPlan((VerifierUse("exact_match"),)),
    lockstep=Lockstep(prompts_per_step=2),
)


def a_runtime(log: SqliteLog, reset: asyncio.Event) -> PoolRuntime:
    state, position = fold_stream(log, "p")
    return PoolRuntime(
        log,
        "p",
        state,
        position,
        prompt_ids=("q0", "q1"),
        on_accepted=lambda *_: None,
        on_reset=lambda _: reset.set(),
        on_closed=lambda *_: None,
        verifier_alive=lambda _: False,
    )


async def test_a_failed_append_refuses_every_waiter_and_the_pool_refolds(tmp_path: Path) -> None:
    log = open_sqlite_log(tmp_path)
    reset = asyncio.Event()
    runtime = a_runtime(log, reset)
    runtime.start()
    await runtime.submit(CreatePool("p", SPEC, prompt_count=2))
    join = Join(agent="a", principal="local", instance="i", model=ModelSpec())

    broken: Future[None] = Future()

    def append(stream: str, entry: Entry, *, expected_position: int) -> Future[None]:
        return broken

    with mock.patch.object(log, "append", append):
        waiters = [asyncio.ensure_future(runtime.submit(join)), asyncio.ensure_future(runtime.submit(join))]
        await asyncio.sleep(0)
        assert runtime.state.members["a"].session == 1, "evolved ahead of the disk"
        broken.set_exception(LogFailedError("The disk is full."))
        for waiter in waiters:
            with pytest.raises(LogFailedError, match=r"^The log of pool p could not be written; "):
                await waiter
        with pytest.raises(LogFailedError):
            runtime.apply(Touch(agent="a", session=1))
    async with asyncio.timeout(10):
        await reset.wait()

    assert runtime.state.members == {}
    await runtime.submit(join)
    assert runtime.state.members["a"].session == 1
    await runtime.stop()
    log.close()
    again = open_sqlite_log(tmp_path)
    state, _ = fold_stream(again, "p")
    assert state is not None
    assert list(state.members) == ["a"]
    again.close()
