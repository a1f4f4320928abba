"""Runs verifiers in children that can be killed, so that an item costs nothing but itself.

Each slot is one child at a time. A whole job goes to the child in one message; results stream back while
shared memory says which item runs since when. An item over its deadline is killed with its process group and
is a TIMEOUT; an item whose child dies is a VERIFIER_ERROR (CRASHED); whatever else was in the job runs again
in a fresh child. When it is not certain which item brought the child down, the suspects run one by one; when
an item brought the zygote down, and so the children of all slots, they run while no other slot works.

Covered: hangs in Python or C, exits, signals, memory, output, forks, orphans. Not covered: files and other
processes of the same user, network, and the verifier's own honesty. docs/verifiers.md says more.
"""

from __future__ import annotations

import enum
import select
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hacrl_exchange.types import Prompt, Unscored, UnscoredKind, VerdictReason
from hacrl_verifiers import _frames
from hacrl_verifiers._linux import Limits
from hacrl_verifiers._progress import PREPARING, WAITING, Mark
from hacrl_verifiers._supervised import Child, IsolationError, Offered, Zygote
from hacrl_verifiers._turnstile import Turnstile
from hacrl_verifiers.results import BadResultError, Judgement, failed, from_wire

__all__ = ["IsolationError", "Job", "Limits", "Offered", "Pool", "Responses", "Slot"]

PREPARE_SECONDS = 60.0
# How often a job is tried again when no item of it is to blame.
_FREE_RETRIES = 3
_CHUNK = 1 << 18
_EXPIRED = Judgement(
    Unscored(UnscoredKind.TIMEOUT, VerdictReason.ITEM_DEADLINE), "The item ran past its deadline: killed."
)
_DIED = failed(VerdictReason.CRASHED, "The process that ran the verifier died.")


@dataclass(frozen=True, slots=True)
class Responses:
    """The responses to one prompt. `token_ids` is empty or has one sequence per response."""

    prompt: Prompt
    reference_json: str
    texts: tuple[str, ...]
    token_ids: tuple[Sequence[int], ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """Work for one child: any responses for one verifier and configuration."""

    verifier: str
    config_json: str
    item_timeout_seconds: float
    groups: tuple[Responses, ...]

    @property
    def item_count(self) -> int:
        """How many responses there are; items are numbered through all groups."""
        return sum(len(group.texts) for group in self.groups)


class _End(enum.Enum):
    """How a pass over some items ended."""

    DONE = enum.auto()
    DIED = enum.auto()
    EXPIRED = enum.auto()
    REFUSED = enum.auto()


class _Care(enum.IntEnum):
    """How items are run: as they come; each reported before the next; and with no other slot at work."""

    NONE = 0
    SINGLY = 1
    ALONE = 2


@dataclass(frozen=True, slots=True)
class _Round:
    """Items to run, in ascending order, and how."""

    items: list[int]
    care: _Care


@dataclass(frozen=True, slots=True)
class _Pass:
    """The end of a pass; what was running then (positions within the pass); the text of a refusal."""

    end: _End
    mark: Mark
    detail: str = ""


class Pool:
    """Slots for children, over one zygote. Use it as a context manager.

    Raises:
        IsolationError: the zygote does not start.
    """

    def __init__(
        self, verifiers: Sequence[str] = (), *, slots: int = 1, limits: Limits | None = None
    ) -> None:
        self._zygote = Zygote(verifiers, limits or Limits())
        turnstile = Turnstile()
        self.slots = tuple(Slot(self._zygote, turnstile, number=number) for number in range(slots))

    @property
    def offered(self) -> tuple[Offered, ...]:
        """The verifiers that loaded."""
        return self._zygote.offered

    @property
    def failures(self) -> tuple[tuple[str, str], ...]:
        """A name and a sentence for each verifier that did not load."""
        return self._zygote.failures

    @property
    def zygote_pid(self) -> int:
        """Process id of the zygote, for monitoring."""
        return self._zygote.pid

    def close(self) -> None:
        """Kills every child and the zygote. A slot that is running a job then raises IsolationError."""
        self._zygote.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        for slot in self.slots:
            slot.release()


class Slot:
    """Runs one job at a time. Each slot belongs to one thread."""

    def __init__(self, zygote: Zygote, turnstile: Turnstile, *, number: int) -> None:
        self._zygote = zygote
        self._turnstile = turnstile
        self._number = number
        self._child: Child | None = None
        self._reader = _frames.FrameReader(_frames.MAX_RESULT_BYTES)
        self._jobs = 0

    @property
    def child_pid(self) -> int | None:
        """Process id of the present child, if there is one."""
        return self._child.pid if self._child else None

    def release(self) -> None:
        """Lets go of the child."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def run(self, job: Job) -> list[Judgement]:
        """One judgement per item, in order. Takes at most a bounded time: every deadline kills.

        Raises:
            IsolationError: no child can be started.
        """
        results: list[Judgement | None] = [None] * job.item_count
        rounds = deque([_Round(list(range(job.item_count)), _Care.NONE)])
        free_retries = _FREE_RETRIES
        while rounds:
            now = rounds.popleft()
            with self._turnstile.alone() if now.care is _Care.ALONE else self._turnstile.together():
                done = self._pass(job, now, results)
            missing = [item for item in now.items if results[item] is None]
            if done.end is _End.REFUSED:
                _settle(results, failed(VerdictReason.VERIFIER_UNAVAILABLE, done.detail))
                break
            if not missing:
                continue
            # A mark that contradicts the results is a lie: then the items are to blame after all.
            unstarted = done.mark.first == WAITING and len(missing) == len(now.items)
            orphaned = self._orphaned()
            self.release()
            if orphaned and now.care is not _Care.ALONE:
                rounds.extendleft(_suspected(done, now, missing, care=_Care.ALONE))
            elif unstarted and free_retries:
                free_retries -= 1
                rounds.appendleft(_Round(missing, max(now.care, _Care.SINGLY)))
            elif done.mark.first == PREPARING and len(missing) == len(now.items):
                text = f"{job.verifier} could not be prepared: its process died or took too long."
                _settle(results, failed(VerdictReason.VERIFIER_UNAVAILABLE, text))
                break
            else:
                rounds.extendleft(_after_fault(done, now, missing, results))
        _settle(results, failed(VerdictReason.CRASHED))
        return [result for result in results if result is not None]

    def _pass(self, job: Job, now: _Round, results: list[Judgement | None]) -> _Pass:
        """Sends the items and collects results until all are there or the child must go."""
        items, single = now.items, now.care is not _Care.NONE
        child = self._ready_child()
        self._jobs += 1
        child.progress.mark(WAITING, 0)
        message = [self._jobs, job.verifier, job.config_json, single, _packed(job, items)]
        budget = PREPARE_SECONDS + job.item_timeout_seconds * (len(items) + 1)
        give_up = time.monotonic() + budget
        try:
            child.connection.settimeout(PREPARE_SECONDS)
            child.connection.sendall(_frames.encode(message))
            child.connection.setblocking(False)
            return self._collect(child, job, items, results, give_up)
        except (OSError, _frames.FrameError, BadResultError):
            return _Pass(_End.DIED, child.progress.read())

    def _collect(
        self, child: Child, job: Job, items: list[int], results: list[Judgement | None], give_up: float
    ) -> _Pass:
        poller = select.poll()
        poller.register(child.connection, select.POLLIN)
        received = 0
        while received < len(items):
            mark = child.progress.read()
            wait = min(_deadline(mark, job.item_timeout_seconds), give_up) - time.monotonic()
            # Never longer than an item may take: the child may start one right after we looked.
            if not poller.poll(max(min(wait, job.item_timeout_seconds), 0) * 1000):
                # Read again: the item may have ended while the poll did.
                if wait <= 0 and (child.progress.read() == mark or time.monotonic() >= give_up):
                    return _Pass(_End.EXPIRED, mark)
                continue
            data = child.connection.recv(_CHUNK)
            if not data:
                return _Pass(_End.DIED, child.progress.read())
            self._reader.feed(data)
            while (message := self._reader.next()) is not None:
                first, judgements = _checked(message, number=self._jobs, received=received, total=len(items))
                if isinstance(judgements, str):
                    return _Pass(_End.REFUSED, mark, judgements)
                for offset, judgement in enumerate(judgements):
                    results[items[first + offset]] = judgement
                received += len(judgements)
        return _Pass(_End.DONE, Mark(0.0, WAITING, 0))

    def _orphaned(self) -> bool:
        """Whether the child may have died only because its zygote did."""
        return self._child is not None and not self._zygote.lives(self._child.generation)

    def _ready_child(self) -> Child:
        if self._child is None:
            self._child = self._zygote.fork(self._number)
            self._reader = _frames.FrameReader(_frames.MAX_RESULT_BYTES)
        return self._child


def _after_fault(
    done: _Pass, now: _Round, missing: list[int], results: list[Judgement | None]
) -> list[_Round]:
    """Settles the item to blame if it is known. Returns what is left to run, the last part first."""
    expired = done.end is _End.EXPIRED
    running = _running(done, now, missing)
    if expired and len(running) == 1:
        blamed = running[0]
    elif now.care is not _Care.NONE:
        blamed = missing[0]  # each result was sent before the next item began
    else:
        return _suspected(done, now, missing, care=_Care.SINGLY)
    results[blamed] = _EXPIRED if expired else _DIED
    rest = [item for item in missing if item != blamed]
    return [_Round(rest, min(now.care, _Care.SINGLY))] if rest else []


def _suspected(done: _Pass, now: _Round, missing: list[int], *, care: _Care) -> list[_Round]:
    """The items that may be to blame run with more care; those that had not begun run as before.

    Results on their way died with the child: the item to blame is a running one or one not yet reported.
    """
    last = max(_running(done, now, missing), default=missing[-1])
    suspects = _Round([item for item in missing if item <= last], care)
    others = _Round([item for item in missing if item > last], now.care)
    return [others, suspects] if others.items else [suspects]


def _running(done: _Pass, now: _Round, missing: list[int]) -> list[int]:
    first, count = done.mark.first, done.mark.count
    return [item for item in now.items[first : first + count] if item in missing]


def _settle(results: list[Judgement | None], judgement: Judgement) -> None:
    for item, result in enumerate(results):
        if result is None:
            results[item] = judgement


def _deadline(mark: Mark, item_timeout_seconds: float) -> float:
    """When the supervisor loses patience: at once if the mark is a lie (the future, or no time at all)."""
    now = time.monotonic()
    allowed = PREPARE_SECONDS if mark.first in (WAITING, PREPARING) else item_timeout_seconds
    return mark.began + allowed if mark.began <= now else now


def _packed(job: Job, items: list[int]) -> list[list[Any]]:
    """The wanted items by group."""
    wanted = set(items) if len(items) < job.item_count else None
    packed: list[list[Any]] = []
    start = 0
    for group in job.groups:
        numbers = range(start, start + len(group.texts))
        start += len(group.texts)
        chosen = [n - numbers.start for n in numbers if wanted is None or n in wanted]
        if not chosen:
            continue
        prompt = group.prompt
        messages = [[message.role, message.content] for message in prompt.messages]
        texts = [group.texts[position] for position in chosen]
        tokens = [list(map(int, group.token_ids[p])) for p in chosen] if group.token_ids else None
        packed.append([prompt.prompt_id, prompt.source, messages, group.reference_json, texts, tokens])
    return packed


def _checked(message: Any, *, number: int, received: int, total: int) -> tuple[int, list[Judgement] | str]:
    """First item and judgements of a child's message, or the text of its refusal.

    Raises:
        BadResultError: not what an honest child sends at this point.
    """
    match message:
        case [int() as job, "refused", str() as detail] if job == number:
            return 0, detail
        case [int() as job, int() as first, [*wires]] if (
            job == number and first == received and 0 < len(wires) <= total - received
        ):
            return first, [from_wire(wire) for wire in wires]
    raise BadResultError("The child sent something that is not a result.")
