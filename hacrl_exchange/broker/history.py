"""Steps as the log holds them: found by index, never kept in the core's state.

Calls go to threads; what was read of a closed step is immutable, so the newest few are kept.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from hacrl_exchange._pb import records_pb2
from hacrl_exchange.broker.core.records import (
    GroupAccepted,
    StepClosed,
    StepOpened,
    StoredGroup,
)
from hacrl_exchange.broker.log import Log
from hacrl_exchange.broker.record_codec import decode_record
from hacrl_exchange.errors import StepNotFoundError

_KEPT_STEPS = 16
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GroupAt:
    """An accepted group and the position its bodies are read by."""

    position: int
    record: GroupAccepted


@dataclass(frozen=True, slots=True)
class ClosedStep:
    """Everything of a closed step but the bodies. Groups and verdicts by (prompt index, roster index).

    Verdicts stay as they are on the wire: they are only passed on.
    """

    opened: StepOpened
    closed: StepClosed
    close_time_us: int
    groups: dict[tuple[int, int], GroupAt]
    verdicts: dict[tuple[int, int], records_pb2.VerdictsRecorded]


class History:
    """Reads the steps of one pool."""

    def __init__(self, log: Log, stream: str) -> None:
        self._log = log
        self._stream = stream
        self._opened: OrderedDict[int, StepOpened] = OrderedDict()
        self._closed: OrderedDict[int, ClosedStep] = OrderedDict()
        self._loading: dict[int, asyncio.Future[ClosedStep]] = {}

    async def opened(self, step: int) -> StepOpened:
        """A step's opening. Open steps are in the core's state; this is for the others.

        Raises:
            StepNotFoundError: it was never opened.
        """
        if step not in self._opened:
            record = await asyncio.to_thread(self._read_opened, step)
            _keep(self._opened, step, record)
        return self._opened[step]

    async def closed(self, step: int) -> ClosedStep:
        """A closed step. Members that ask at the same time share one reading.

        Raises:
            StepNotFoundError: it was never opened, or is not closed.
        """
        if step in self._closed:
            return self._closed[step]
        if step not in self._loading:
            task = asyncio.ensure_future(asyncio.to_thread(self._read_closed, step))
            self._loading[step] = task
            task.add_done_callback(lambda done: self._loaded(step, done))
        return await asyncio.shield(self._loading[step])

    async def first_with(self, agent: str, numbers: Sequence[int]) -> int | None:
        """The first of some steps with the agent on its roster; None if there is none."""
        return await asyncio.to_thread(self._find_first_with, agent, numbers)

    async def groups(self, step: int) -> dict[tuple[int, int], GroupAt]:
        """The accepted groups of a step, open or closed."""
        return await asyncio.to_thread(self._read_groups, step)

    async def stored_group(self, step: int, *, agent: str, prompt_id: str) -> StoredGroup | None:
        """What lies in a slot of a step that is not open; None if nothing does."""
        try:
            opened = await self.opened(step)
            closed = await self.closed(step)
        except StepNotFoundError:
            return None
        if agent not in opened.roster or prompt_id not in opened.prompt_ids:
            return None
        slot = (opened.prompt_ids.index(prompt_id), opened.roster.index(agent))
        found = closed.groups.get(slot)
        if found is None:
            return None
        return StoredGroup(found.record.digest, found.record.session, found.record.rollout_count)

    async def bodies(self, wanted: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[bytes, ...]]:
        """Bodies by (position, part indices)."""
        return await asyncio.to_thread(self._log.read_bodies, self._stream, wanted)

    def _loaded(self, step: int, done: asyncio.Future[ClosedStep]) -> None:
        del self._loading[step]
        if not done.cancelled() and done.exception() is None:
            _keep(self._closed, step, done.result())

    def _find_first_with(self, agent: str, numbers: Sequence[int]) -> int | None:
        for number in numbers:
            if agent in self._read_opened(number).roster:
                return number
        return None

    def _read_opened(self, step: int) -> StepOpened:
        for entry in self._log.find(self._stream, f"o/{step:010d}"):
            body = decode_record(entry.payload).body
            if isinstance(body, StepOpened):
                return body
        raise StepNotFoundError(
            f"Pool {self._stream} has not opened step {step}.", pool=self._stream, step=step
        )

    def _read_closed(self, step: int) -> ClosedStep:
        opened = self._read_opened(step)
        for entry in self._log.find(self._stream, f"c/{step:010d}"):
            record = decode_record(entry.payload)
            if isinstance(record.body, StepClosed):
                return ClosedStep(
                    opened=opened,
                    closed=record.body,
                    close_time_us=record.time_us,
                    groups=self._read_groups(step),
                    verdicts=self._read_verdicts(step),
                )
        raise StepNotFoundError(
            f"Step {step} of pool {self._stream} is not closed yet.", pool=self._stream, step=step
        )

    def _read_groups(self, step: int) -> dict[tuple[int, int], GroupAt]:
        found: dict[tuple[int, int], GroupAt] = {}
        for entry in self._log.find(self._stream, f"g/{step:010d}/"):
            body = decode_record(entry.payload).body
            if isinstance(body, GroupAccepted):
                found[body.prompt_index, body.roster_index] = GroupAt(entry.position, body)
        return found

    def _read_verdicts(self, step: int) -> dict[tuple[int, int], records_pb2.VerdictsRecorded]:
        found: dict[tuple[int, int], records_pb2.VerdictsRecorded] = {}
        for entry in self._log.find(self._stream, f"v/{step:010d}/"):
            body = records_pb2.Record.FromString(entry.payload).verdicts_recorded
            found[body.prompt_index, body.roster_index] = body
        return found


def _keep(kept: OrderedDict[int, _T], step: int, value: _T) -> None:
    kept[step] = value
    while len(kept) > _KEPT_STEPS:
        kept.popitem(last=False)
