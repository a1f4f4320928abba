"""One pool at work: its state, its stream in the log, its deadlines.

Everything here runs on the broker's event loop; the log's blocking calls go to threads. The order is
always: decide, evolve, append; replies, leases and deliveries wait until the position they were read from
is durable. If an append fails, every waiter gets LogFailedError and the pool folds its stream again from
the last durable position.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from hacrl_exchange.broker.core import timers
from hacrl_exchange.broker.core.pool import decide, evolve
from hacrl_exchange.broker.core.records import (
    CloseStep,
    Command,
    EndPublishing,
    GroupAccepted,
    OpenStep,
    Record,
    RecordBody,
    RetireSteps,
    StepClosed,
    StepsRetired,
    record_key,
)
from hacrl_exchange.broker.core.schedule import epoch_order
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.log import Entry, Log
from hacrl_exchange.broker.record_codec import encode_record, snapshot_to_bytes
from hacrl_exchange.broker.recovery import PoolClock, fold_stream
from hacrl_exchange.errors import BrokerStoppingError, LogFailedError

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
_SNAPSHOT_RECORDS = 1000
"""A step that closes this many records after the last snapshot makes one: so many a start folds at most,
and those of the open steps."""

_QUIET = (GroupAccepted,)
"""Records that change nothing anybody waits for; they wake only the pool's own timer."""


class PoolRuntime:
    """Runs one pool. Create with `create` or `open`, then `start`; `stop` ends it."""

    def __init__(
        self,
        log: Log,
        stream: str,
        state: PoolState | None,
        position: int,
        *,
        prompt_ids: Sequence[str],
        on_accepted: Callable[[PoolRuntime, int, GroupAccepted], None],
        on_reset: Callable[[PoolRuntime], None],
        on_closed: Callable[[PoolRuntime, int], None],
        verifier_alive: Callable[[PoolRuntime], bool],
    ) -> None:
        self._log = log
        self._stream = stream
        self._state = state
        self._position = position
        self._durable_position = position
        self._snapshot_position = position
        self._reports: deque[tuple[int, BaseException | None]] = deque()
        self._reports_scheduled = False
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._tickets = itertools.count()
        self._in_flight: deque[tuple[int, RecordBody, bytes | None]] = deque()
        self._prompt_ids = prompt_ids
        self._orders: dict[int, tuple[str, ...]] = {}
        self._on_accepted = on_accepted
        self._on_reset = on_reset
        self._on_closed = on_closed
        self._verifier_alive = verifier_alive
        self._clock = PoolClock(not_before_us=state.last_time_us if state else 0)
        self._loop = asyncio.get_running_loop()
        self._poke = asyncio.Event()
        self._changed = asyncio.Event()
        self._timer: asyncio.Task[None] | None = None
        self._chores: set[asyncio.Task[None]] = set()
        self._failed = False
        self._stopping = False

    # --- what services read --------------------------------------------------------------------

    @property
    def state(self) -> PoolState:
        """The state, evolved ahead of the disk: reply only after `durable()`."""
        if self._state is None:
            raise RuntimeError("the pool has no PoolCreated record yet")
        return self._state

    @property
    def name(self) -> str:
        """The pool's bare id, which is its stream's name."""
        return self._stream

    def now_us(self) -> int:
        """Record time."""
        return self._clock.now_us()

    def durable(self) -> asyncio.Future[None]:
        """A future that is done once everything the caller has read up to now is durable.

        Call it in the same breath as the reading or `apply`, with no await between: after one, a failed log
        may have been folded again, and what was read is gone.

        Raises:
            LogFailedError: it could not be made durable, and the pool went back to before it.
        """
        self._refuse_if_down()
        waiter: asyncio.Future[None] = self._loop.create_future()
        if self._position <= self._durable_position:
            waiter.set_result(None)
        else:
            heapq.heappush(self._waiters, (self._position, next(self._tickets), waiter))
        return waiter

    async def changed(self, *, timeout_seconds: float) -> bool:
        """Waits for a durable change of members or steps; False if the time ran out.

        Raises:
            BrokerStoppingError: the broker is going down.
        """
        self._refuse_if_down()
        event = self._changed
        try:
            async with asyncio.timeout(timeout_seconds):
                await event.wait()
        except TimeoutError:
            return False
        self._refuse_if_down()
        return True

    # --- what services ask for -----------------------------------------------------------------

    def apply(self, command: Command, *, bodies: tuple[bytes, ...] = ()) -> RecordBody | None:
        """Decides and evolves at once; durable only after `durable()`. None: it was so already.

        Raises:
            ExchangeError: refused; nothing changed.
        """
        self._refuse_if_down()
        now_us = self._clock.now_us()
        if self._state is not None:
            now_us = max(now_us, self._state.last_time_us)
        body = decide(self._state, command, now_us=now_us)
        if body is None:
            return None
        record = Record(time_us=now_us, body=body)
        self._state = evolve(self._state, record)
        entry = Entry(payload=encode_record(record), key=record_key(body), bodies=bodies)
        snapshot = None
        if isinstance(body, StepClosed) and self._position - self._snapshot_position >= _SNAPSHOT_RECORDS:
            snapshot = snapshot_to_bytes(self._state)
            self._snapshot_position = self._position + 1
        future = self._log.append(self._stream, entry, expected_position=self._position)
        self._position += 1
        position = self._position
        self._in_flight.append((position, body, snapshot))
        future.add_done_callback(functools.partial(self._report, position))
        self._poke.set()
        return body

    async def submit(self, command: Command, *, bodies: tuple[bytes, ...] = ()) -> RecordBody | None:
        """`apply`, then `durable`."""
        body = self.apply(command, bodies=bodies)
        await self.durable()
        return body

    # --- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the deadlines."""
        self._timer = self._loop.create_task(self._drive(), name=f"timer of {self._stream}")

    async def stop(self) -> None:
        """Refuses further calls, wakes every waiter, ends the deadlines."""
        self._stopping = True
        self._wake_changed()
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        if self._chores:
            await asyncio.gather(*self._chores, return_exceptions=True)

    def poke(self) -> None:
        """Looks at the deadlines again, e.g. because workers came or went."""
        self._poke.set()

    # --- inside --------------------------------------------------------------------------------

    def _refuse_if_down(self) -> None:
        if self._stopping:
            raise BrokerStoppingError(
                "The broker is shutting down; retry, it may be back soon.", retry_seconds=1.0
            )
        if self._failed:
            raise LogFailedError(
                f"The log of pool {self._stream} could not be written; nothing was accepted. Retry soon.",
                retry_seconds=1.0,
                pool=self._stream,
            )

    def _report(self, position: int, done: Future[None]) -> None:
        """In the log's thread: tells the event loop what became of a position, once for a whole batch."""
        self._reports.append((position, done.exception()))
        if self._reports_scheduled:
            return
        self._reports_scheduled = True
        # RuntimeError: the loop is closed, the broker is gone, nobody waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle_reports)

    def _settle_reports(self) -> None:
        self._reports_scheduled = False  # before looking: what comes later schedules another look
        while self._reports:
            self._settle(*self._reports.popleft())

    def _settle(self, position: int, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
            return
        if position <= self._durable_position:
            return
        self._durable_position = position
        wake = False
        while self._in_flight and self._in_flight[0][0] <= position:
            at, body, snapshot = self._in_flight.popleft()
            wake = wake or not isinstance(body, _QUIET)
            self._react(at, body, snapshot)
        while self._waiters and self._waiters[0][0] <= position:
            waiter = heapq.heappop(self._waiters)[2]
            if not waiter.done():
                waiter.set_result(None)
        if wake:
            self._wake_changed()

    def _react(self, position: int, body: RecordBody, snapshot: bytes | None) -> None:
        """What follows from a record once it is durable."""
        match body:
            case GroupAccepted():
                self._on_accepted(self, position, body)
            case StepClosed():
                self._on_closed(self, body.step)
                if snapshot is not None:
                    self._chore(asyncio.to_thread(self._log.save_snapshot, self._stream, position, snapshot))
            case StepsRetired():
                self._chore(asyncio.to_thread(self._drop_bodies, body.through_step))
            case _:
                pass

    def _chore(self, work: asyncio.Future[None] | object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)  # type: ignore[arg-type]  # a coroutine
        self._chores.add(task)
        task.add_done_callback(self._chore_done)

    def _chore_done(self, task: asyncio.Task[None]) -> None:
        self._chores.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error(
                "pool %s: upkeep failed; it is tried again at the next step",
                self._stream,
                exc_info=task.exception(),
            )

    def _drop_bodies(self, through_step: int) -> None:
        following = self._log.find(self._stream, f"o/{through_step + 1:010d}")
        if following:
            self._log.drop_bodies(self._stream, through_position=following[0].position - 1)

    def _wake_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail(self, error: BaseException) -> None:
        if self._failed:
            return
        self._failed = True
        _log.error(
            "pool %s: the log failed; folding again from the last durable position: %s", self._stream, error
        )
        failure = LogFailedError(
            f"The log of pool {self._stream} could not be written; nothing was accepted. Retry soon.",
            retry_seconds=1.0,
            pool=self._stream,
        )
        while self._waiters:
            waiter = heapq.heappop(self._waiters)[2]
            if not waiter.done():
                waiter.set_exception(failure)
        self._in_flight.clear()
        self._chore(self._refold())

    async def _refold(self) -> None:
        """Goes back to what is durable. Stays down, and tries again each second, while the log is broken."""
        while not self._stopping:
            try:
                await asyncio.to_thread(self._log.recover, self._stream)
                state, position = await asyncio.to_thread(fold_stream, self._log, self._stream)
            except Exception as error:  # whatever it is: the pool stays down until a fold succeeds
                expected = isinstance(error, LogFailedError | OSError)
                _log.error("pool %s: the log is still broken: %s", self._stream, error, exc_info=not expected)
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            self._state, self._position, self._durable_position = state, position, position
            self._snapshot_position = min(self._snapshot_position, position)
            self._failed = False
            self._on_reset(self)
            self._poke.set()
            self._wake_changed()
            return

    async def _drive(self) -> None:
        """Takes every decision that is due, then sleeps until the next one or a poke."""
        while not self._stopping:
            self._poke.clear()
            delay: float | None = None
            if not self._failed and self._state is not None:
                try:
                    self._take_due()
                    delay = self._delay_seconds()
                except Exception as error:  # deadlines must go on, or a step would stay open for ever
                    expected = isinstance(error, LogFailedError)
                    _log.error(
                        "pool %s: a deadline has to wait: %s", self._stream, error, exc_info=not expected
                    )
                    delay = _RETRY_SECONDS
            try:
                async with asyncio.timeout(delay):
                    await self._poke.wait()
            except TimeoutError:
                continue

    def _take_due(self) -> None:
        while True:
            now_us = max(self._clock.now_us(), self.state.last_time_us)
            due = timers.due(self.state, now_us=now_us)
            if due is None:
                return
            self.apply(self._command(due))

    def _command(self, due: timers.Due) -> Command:
        match due:
            case timers.OpenDue():
                start = due.offset
                count = self.state.spec.lockstep.prompts_per_step
                prompt_ids = self._order(due.epoch)[start : start + count]
                return OpenStep(step=due.step, epoch=due.epoch, prompt_ids=prompt_ids)
            case timers.EndPublishingDue():
                return EndPublishing(step=due.step)
            case timers.CloseDue():
                return CloseStep(step=due.step, verifier_alive=self._verifier_alive(self))
            case timers.RetireDue():
                return RetireSteps(through_step=due.through_step)

    def _order(self, epoch: int) -> tuple[str, ...]:
        if epoch not in self._orders:
            self._orders.clear()  # epochs only go forward; one order is kept
            self._orders[epoch] = epoch_order(self._prompt_ids, seed=self.state.spec.seed, epoch=epoch)
        return self._orders[epoch]

    def _delay_seconds(self) -> float | None:
        wake_us = timers.wake_us(self.state)
        if wake_us is None:
            return None
        return max(0.0, (wake_us - self._clock.now_us()) / 1e6) + 0.001
