"""What a worker has in hand: leases, their groups, how much to take. Knows no gRPC, starts no process."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hacrl_exchange.client.worker import LeasedGroup
from hacrl_verifiers.isolation import Job, Responses
from hacrl_verifiers.results import Judgement

# One job should take about this long: long enough to drown its overhead, short enough to share among slots.
_JOB_SECONDS = 0.05
# How much work to hold, so that slots never wait for a lease.
_HELD_SECONDS = 0.5
_MAX_JOB_BYTES = 4 << 20
_MAX_HELD_GROUPS = 256
_SMOOTHING = 0.2


@dataclass(frozen=True, slots=True)
class Task:
    """Groups of one lease that one slot runs as one job."""

    lease: str
    groups: tuple[LeasedGroup, ...]

    def job(self) -> Job:
        """The job for the child."""
        first = self.groups[0]
        responses = tuple(_responses(group) for group in self.groups)
        return Job(first.verifier, first.config_json, first.item_timeout_seconds, responses)


@dataclass(frozen=True, slots=True)
class Finished:
    """A group with its judgements, ready to be reported."""

    lease: str
    group: LeasedGroup
    judgements: tuple[Judgement, ...]


@dataclass(slots=True)
class _Pace:
    """How long a group takes, smoothed. Starts as if groups were slow: the first leases stay small."""

    seconds: float = 0.25

    def learn(self, seconds: float, *, groups: int) -> None:
        self.seconds += _SMOOTHING * (seconds / groups - self.seconds)

    def groups_in(self, seconds: float, *, at_most: int) -> int:
        return max(1, min(at_most, int(seconds / max(self.seconds, 1e-6))))


@dataclass(slots=True)
class _Lease:
    waiting: deque[LeasedGroup] = field(default_factory=deque)
    unreported: int = 0


class WorkInHand:
    """The worker's threads meet here. Every method may be called from any thread."""

    def __init__(self, *, slots: int) -> None:
        self._slots = slots
        self._changed = threading.Condition()
        self._leases: dict[str, _Lease] = {}
        self._finished: deque[Finished] = deque()
        self._pace = _Pace()
        self._acquiring = True
        self._closed = False

    # the thread that acquires

    def room(self) -> int:
        """Waits until more groups are welcome; how many. 0 once `refuse_more` was called."""
        with self._changed:
            while self._acquiring:
                held = sum(lease.unreported for lease in self._leases.values())
                wanted = self._slots * 2 * self._pace.groups_in(_HELD_SECONDS / 2, at_most=_MAX_HELD_GROUPS)
                wanted = min(wanted, _MAX_HELD_GROUPS)
                if held <= wanted // 2:
                    return wanted - held
                self._changed.wait()
            return 0

    def add(self, lease: str, groups: Sequence[LeasedGroup], *, finished: Sequence[Finished] = ()) -> None:
        """Takes a lease in hand: groups to verify, and groups that are judged already."""
        with self._changed:
            if groups or finished:
                self._leases[lease] = _Lease(deque(groups), len(groups) + len(finished))
                self._finished.extend(finished)
                self._changed.notify_all()

    def refuse_more(self) -> None:
        """Ends acquiring; what is in hand goes on."""
        with self._changed:
            self._acquiring = False
            self._changed.notify_all()

    # the threads that verify

    def next_task(self) -> Task | None:
        """Waits for groups to run together, oldest lease first. None once closed."""
        with self._changed:
            while not self._closed:
                for name, lease in self._leases.items():
                    if lease.waiting:
                        return Task(name, tuple(self._take(lease.waiting)))
                self._changed.wait()
            return None

    def finish(self, finished: Sequence[Finished], *, seconds: float | None = None) -> None:
        """Hands judged groups to the thread that reports. `seconds` is what they took together."""
        with self._changed:
            if seconds is not None:
                self._pace.learn(seconds, groups=len(finished))
            self._finished.extend(finished)
            self._changed.notify_all()

    # the threads that report and renew

    def next_report(self) -> list[Finished]:
        """Waits for finished groups and returns all that belong to one lease. Empty once closed."""
        with self._changed:
            while not self._finished:
                if self._closed:
                    return []
                self._changed.wait()
            lease = self._finished[0].lease
            report = [one for one in self._finished if one.lease == lease]
            self._finished = deque(one for one in self._finished if one.lease != lease)
            return report

    def reported(self, report: Sequence[Finished]) -> None:
        """Lets go of groups whose verdicts are recorded or refused for good."""
        with self._changed:
            lease = self._leases.get(report[0].lease)
            if lease is not None:
                lease.unreported -= len(report)
                if lease.unreported <= 0:
                    del self._leases[report[0].lease]
            self._changed.notify_all()

    def open_leases(self) -> list[str]:
        """The leases to keep alive."""
        with self._changed:
            return list(self._leases)

    def drop(self, lease: str) -> None:
        """Forgets a lease that ran out: what has not started belongs to another worker now."""
        with self._changed:
            self._leases.pop(lease, None)
            self._changed.notify_all()

    def drop_all(self) -> None:
        """Forgets every lease: the broker does not know this worker any more."""
        with self._changed:
            self._leases.clear()
            self._changed.notify_all()

    # the end

    def wait_empty(self, *, seconds: float) -> bool:
        """Waits until nothing is in hand; whether that happened in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._leases and not self._finished, seconds)

    def close(self) -> None:
        """Wakes every thread for good."""
        with self._changed:
            self._closed = True
            self._acquiring = False
            self._changed.notify_all()

    def _take(self, waiting: deque[LeasedGroup]) -> list[LeasedGroup]:
        """The first groups that fit one job: same verifier, configuration and deadline."""
        # Groups still waiting are shared among the slots before they are bundled.
        share = -(-len(waiting) // self._slots)
        limit = min(share, self._pace.groups_in(_JOB_SECONDS, at_most=_MAX_HELD_GROUPS))
        taken = [waiting.popleft()]
        size = _size(taken[0])
        while waiting and len(taken) < limit and _kind(waiting[0]) == _kind(taken[0]):
            size += _size(waiting[0])
            if size > _MAX_JOB_BYTES:
                break
            taken.append(waiting.popleft())
        return taken


def _kind(group: LeasedGroup) -> tuple[str, str, float]:
    return group.verifier, group.config_json, group.item_timeout_seconds


def _size(group: LeasedGroup) -> int:
    return sum(len(rollout.text) for rollout in group.rollouts)


def _responses(group: LeasedGroup) -> Responses:
    texts = tuple(rollout.text for rollout in group.rollouts)
    tokens = tuple(rollout.token_ids for rollout in group.rollouts if rollout.token_ids is not None)
    whole = tokens if len(tokens) == len(texts) else ()
    return Responses(group.prompt.prompt, group.prompt.reference_json, texts, whole)
