"""The workers a broker spawns: the same program as any worker, started, restarted and ended by the broker."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass

from hacrl_exchange.broker.interceptors import Identities

_log = logging.getLogger(__name__)

KEY_VARIABLE = "HACRL_WORKER_KEY"
_STOP_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 5.0
_HEALTHY_SECONDS = 10.0
_BUG_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What to spawn: `count` processes with `slots` children each; no verifiers means all built-ins."""

    count: int
    slots: int
    verifiers: tuple[str, ...]


class LocalWorkers:
    """Keeps `count` worker processes alive. A worker dies with the broker: its standard input is a pipe."""

    def __init__(
        self,
        target: str,
        identities: Identities,
        *,
        options: WorkerOptions,
        on_exit: Callable[[str], None],
    ) -> None:
        self._target = target
        self._identities = identities
        self._options = options
        self._on_exit = on_exit
        self._keepers: list[asyncio.Task[None]] = []
        self._stopping = False

    def start(self) -> None:
        """Spawns the workers; they register when they are ready."""
        self._keepers = [
            asyncio.create_task(self._keep(f"local-{number}"), name=f"worker local-{number}")
            for number in range(self._options.count)
        ]

    async def stop(self) -> None:
        """Asks every worker to end, and makes it end."""
        self._stopping = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, name: str) -> None:
        """One worker after the other, with a growing pause while they die young."""
        pause = 0.0
        while not self._stopping:
            await asyncio.sleep(pause)
            try:
                code, lived = await self._run_one(name)
            except Exception:
                # Nobody awaits this task: without it the broker would verify with a worker less for good.
                _log.exception("worker %s could not be run; trying again", name)
                pause = _BUG_PAUSE_SECONDS
                continue
            pause = 0.0 if lived > _HEALTHY_SECONDS else min(_LONGEST_PAUSE_SECONDS, pause * 2 or 0.25)
            _log.warning("worker %s ended with code %s after %.1f s; starting another", name, code, lived)

    async def _run_one(self, name: str) -> tuple[int, float]:
        """Runs a worker to its end; its exit code and the seconds it lived."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        process = await self._spawn(name)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            raise
        finally:
            self._on_exit(name)
        return code, loop.time() - started

    async def _spawn(self, name: str) -> asyncio.subprocess.Process:
        key = secrets.token_urlsafe(32)
        self._identities.allow_worker(name, key)
        arguments = ["--broker", self._target, "--identity", name, "--slots", str(self._options.slots)]
        for verifier in self._options.verifiers:
            arguments += ["--verifier", verifier]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hacrl_exchange.cli",
            "worker",
            *arguments,
            "--until-stdin-closes",
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, KEY_VARIABLE: key},
            start_new_session=True,
        )


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
