"""The worker: leases groups, runs verifiers in children, reports verdicts, until it is told to stop.

Threads: one acquires, one per slot verifies, one reports, one renews leases. They meet in `_work.WorkInHand`.
A broker that goes away is waited for; a broker that has forgotten this worker gets a new registration.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from hacrl_exchange.client.worker import Lease, OfferedVerifier, VerdictReport, WorkerRegistration
from hacrl_exchange.errors import (
    BrokerStoppingError,
    ExchangeError,
    LeaseExpiredError,
    LogFailedError,
    OverloadedError,
    UnreachableError,
    WorkerNotFoundError,
)
from hacrl_exchange.types import Unscored, UnscoredKind, VerdictReason, VerifierIdentity
from hacrl_verifiers._work import Finished, Task, WorkInHand
from hacrl_verifiers.api import config_digest
from hacrl_verifiers.isolation import IsolationError, Pool, Slot
from hacrl_verifiers.results import Judgement, clipped

_log = logging.getLogger("hacrl.worker")

MAX_GROUPS_PER_LEASE = 64
_POLL_SECONDS = 1.0
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 2.0
_DRAIN_SECONDS = 2.5
_JOIN_SECONDS = 1.0

# The broker is away or busy: the same call will do later.
_PASSING = (UnreachableError, BrokerStoppingError, LogFailedError, OverloadedError)

_Answer = TypeVar("_Answer")


class Broker(Protocol):
    """What a worker asks of the broker; a WorkerClient. Every method may raise ExchangeError."""

    def register(self, identity: str, *, offered: Sequence[OfferedVerifier]) -> WorkerRegistration:
        """Introduces the worker."""

    def acquire(self, worker: str, *, max_groups: int, wait_seconds: float) -> Lease | None:
        """A lease, or None if the wait ran out."""

    def renew(self, worker: str, *, lease: str) -> float:
        """Extends a lease."""

    def report(
        self, worker: str, *, lease: str, reports: Sequence[VerdictReport]
    ) -> Sequence[ExchangeError | None]:
        """Reports verdicts; one answer per report."""


class _Stopped(Exception):
    """The worker stops, so a call is not tried again."""


class Worker:
    """One worker over a pool of children. `run` blocks; `stop` may be called from any other thread."""

    def __init__(self, broker: Broker, pool: Pool, *, identity: str, once: bool = False) -> None:
        self._broker = broker
        self._pool = pool
        self._identity = identity
        self._once = once
        self._offered = {offered.name: offered for offered in pool.offered}
        self._hand = WorkInHand(slots=len(pool.slots))
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._registering = threading.Lock()
        self._registration: WorkerRegistration | None = None
        self._error: Exception | None = None

    def stop(self) -> None:
        """Makes `run` acquire no more, finish what is in hand within a few seconds, and return."""
        self._hand.refuse_more()
        self._stopping.set()

    def run(self) -> None:
        """Works until `stop`, or until nothing is left to lease if `once`. Closes the pool at the end.

        Raises:
            ExchangeError: the broker refuses this worker (passing trouble is waited for, unless `once`).
            IsolationError: children cannot be started any more.
        """
        acquiring = self._thread(self._acquire, "acquire")
        others = [
            self._thread(self._report, "report"),
            self._thread(self._renew, "renew"),
            *(
                self._thread(partial(self._verify, slot), f"slot-{n}")
                for n, slot in enumerate(self._pool.slots)
            ),
        ]
        self._stopping.wait()
        # A poll that is under way may still bring a lease.
        acquiring.join(_POLL_SECONDS + _JOIN_SECONDS)
        if self._error is None and not self._hand.wait_empty(seconds=_DRAIN_SECONDS):
            _log.warning("Stopping with work in hand; the broker will lease it to another worker.")
        self._closing.set()
        self._hand.close()
        self._pool.close()
        for thread in others:
            thread.join(_JOIN_SECONDS)
        if self._error is not None:
            raise self._error

    # the threads

    def _acquire(self) -> None:
        while room := self._hand.room():
            worker = self._registered().worker
            wanted = min(room, MAX_GROUPS_PER_LEASE)
            try:
                leased = self._patiently(
                    lambda: self._broker.acquire(worker, max_groups=wanted, wait_seconds=_POLL_SECONDS),  # noqa: B023
                    until=self._stopping,
                )
            except WorkerNotFoundError:
                self._forget(worker)
                continue
            if leased is not None:
                self._take_in_hand(leased)
            elif self._once:
                self.stop()

    def _take_in_hand(self, lease: Lease) -> None:
        runnable, refused = [], []
        for group in lease.groups:
            if group.problem is not None:
                problem = str(group.problem)
            elif group.verifier not in self._offered:
                problem = f"This worker does not offer the verifier {group.verifier!r}."
            else:
                runnable.append(group)
                continue
            refused.append(Finished(lease.lease, group, (_unavailable(problem),) * group.rollout_count))
        self._hand.add(lease.lease, runnable, finished=refused)

    def _verify(self, slot: Slot) -> None:
        while (task := self._hand.next_task()) is not None:
            started = time.monotonic()
            try:
                judgements = slot.run(task.job())
            except IsolationError:
                if self._closing.is_set():
                    return
                raise
            self._hand.finish(_finished(task, judgements), seconds=time.monotonic() - started)

    def _report(self) -> None:
        while finished := self._hand.next_report():
            self._deliver(finished)
            self._hand.reported(finished)

    def _deliver(self, finished: Sequence[Finished]) -> None:
        """Reports groups of one lease. Verdicts count even if the lease or the registration is gone."""
        lease, reports = finished[0].lease, [self._as_report(one) for one in finished]
        while True:
            worker = self._registered().worker
            try:
                answers = self._patiently(
                    lambda: self._broker.report(worker, lease=lease, reports=reports),  # noqa: B023
                    until=self._closing,
                )
            except WorkerNotFoundError:
                self._forget(worker)
                continue
            except LeaseExpiredError:
                self._hand.drop(lease)
                return
            for report, answer in zip(reports, answers, strict=True):
                if answer is not None:
                    # ALREADY_VERIFIED and STEP_CLOSED are ordinary: someone else, or time, was faster.
                    _log.info("%s was not recorded: %s", report.group, answer)
            return

    def _renew(self) -> None:
        while not self._closing.wait(self._renew_seconds()):
            for lease in self._hand.open_leases():
                registration = self._registration
                if registration is None:
                    break
                try:
                    self._broker.renew(registration.worker, lease=lease)
                except LeaseExpiredError:
                    _log.info("A lease ran out; its groups belong to another worker now.")
                    self._hand.drop(lease)
                except WorkerNotFoundError:
                    self._forget(registration.worker)
                except _PASSING as error:
                    _log.debug("A lease could not be renewed: %s", error)

    # registration and calls

    def _registered(self) -> WorkerRegistration:
        """The present registration; makes one if there is none."""
        with self._registering:
            if self._registration is None:
                offered = [
                    OfferedVerifier(one.name, one.version, one.needs_tokens) for one in self._offered.values()
                ]
                self._registration = self._patiently(
                    lambda: self._broker.register(self._identity, offered=offered), until=self._stopping
                )
                _log.info("Registered with the broker as %s.", self._identity)
            return self._registration

    def _forget(self, worker: str) -> None:
        """Drops a registration that the broker does not know, with the leases it had."""
        with self._registering:
            if self._registration is not None and self._registration.worker == worker:
                _log.info("The broker does not know this worker any more; registering again.")
                self._registration = None
                self._hand.drop_all()

    def _renew_seconds(self) -> float:
        registration = self._registration
        return registration.lease_timeout_seconds / 3 if registration else _FIRST_PAUSE_SECONDS

    def _patiently(self, call: Callable[[], _Answer], *, until: threading.Event) -> _Answer:
        """Repeats a call while the broker is away or busy, with growing pauses.

        Raises:
            _Stopped: `until` was set meanwhile.
            ExchangeError: any other refusal; a passing one too if this worker runs `once`.
        """
        pause, away = _FIRST_PAUSE_SECONDS, False
        while True:
            try:
                answer = call()
            except _PASSING as error:
                if self._once:
                    raise
                if not away:
                    _log.warning("The broker does not answer; trying again until it does: %s", error)
                away = True
                if until.wait(max(error.retry_seconds or 0.0, pause * random.uniform(0.5, 1.0))):
                    raise _Stopped from error
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            else:
                if away:
                    _log.info("The broker answers again.")
                return answer

    def _thread(self, target: Callable[[], None], name: str) -> threading.Thread:
        """Starts a thread whose failure ends the worker."""

        def guarded() -> None:
            try:
                target()
            except _Stopped:
                return
            except Exception as error:  # the boundary of a thread: `run` raises it
                self._error = self._error or error
                self.stop()

        thread = threading.Thread(target=guarded, name=f"worker-{name}", daemon=True)
        thread.start()
        return thread

    def _as_report(self, finished: Finished) -> VerdictReport:
        group, judgements = finished.group, finished.judgements
        offered = self._offered.get(group.verifier)
        version = offered.version if offered else "unavailable"
        return VerdictReport(
            group=group.name,
            generation=group.generation,
            verifier=VerifierIdentity(group.verifier, version, config_digest(group.config_json)),
            verdicts=tuple(judgement.verdict for judgement in judgements),
            details=tuple(one.detail for one in judgements) if any(one.detail for one in judgements) else (),
        )


def _unavailable(problem: str) -> Judgement:
    return Judgement(Unscored(UnscoredKind.UNSUPPORTED, VerdictReason.VERIFIER_UNAVAILABLE), clipped(problem))


def _finished(task: Task, judgements: Sequence[Judgement]) -> list[Finished]:
    """Cuts the judgements of a job into its groups."""
    finished, start = [], 0
    for group in task.groups:
        end = start + group.rollout_count
        finished.append(Finished(task.lease, group, tuple(judgements[start:end])))
        start = end
    return finished
