"""Publishing: groups into calls, a few calls in flight, an outcome per group.

While the broker checks and writes the groups of one call, the caller's thread encodes those of the next.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import rollout_pb2
from hacrl_exchange.client.retry import Patience, is_passing
from hacrl_exchange.client.views import ServerLimits
from hacrl_exchange.client.wire import Wire
from hacrl_exchange.codec import pool_name, receipt_from_proto, wire_size
from hacrl_exchange.errors import (
    ExchangeError,
    InternalError,
    NotJoinedError,
    SessionSupersededError,
    UnsupportedEncodingError,
)
from hacrl_exchange.status import from_status
from hacrl_exchange.types import Receipt

_CALLS_IN_FLIGHT = 4
_CALL_SIZE = 1 << 20
"""Aimed at, in bytes: large enough to amortize a commit, small enough to overlap with encoding."""
_CALL_GROUPS = 64
_OLDEST_SECONDS = 1.0
"""A group does not wait longer than this for others to share its call."""
_PUBLISH_SECONDS = 60.0

Outcome: TypeAlias = Receipt | ExchangeError


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What became of the groups of one `publish`. Refused groups are not here: they raise.

    `receipts`: one per group that is durable now, in no particular order; for a slot that held another group
    of this agent the receipt is that group's. `kept`: prompts whose stored group, of an earlier attempt or
    life, counts instead of the one given; `step.committed` has them. `late`: prompts whose group came after
    publishing had ended. `wire_bytes` is the size of the calls, `call_seconds` how long each took from its
    sending to its answer, in no particular order; repeats are not counted.
    """

    receipts: tuple[Receipt, ...]
    kept: tuple[str, ...] = ()
    late: tuple[str, ...] = ()
    wire_bytes: int = 0
    call_seconds: tuple[float, ...] = ()


class Publisher:
    """Publishes encoded groups of one session."""

    def __init__(self, wire: Wire, *, pool: str, caller: pb.Caller, limits: ServerLimits) -> None:
        self._wire = wire
        self._pool = pool_name(pool)
        self._caller = caller
        self._max_groups = min(limits.max_groups_per_publish or _CALL_GROUPS, _CALL_GROUPS)
        self._max_size = min(limits.max_message_size or _CALL_SIZE, _CALL_SIZE)
        self._wire_bytes = 0
        self._call_seconds: list[float] = []

    def publish(self, groups: Iterable[rollout_pb2.Group]) -> Iterator[tuple[rollout_pb2.Group, Outcome]]:
        """Yields every group with its receipt or refusal, in order, as the answers come.

        Raises:
            SessionSupersededError, NotJoinedError: the session is over; nothing more can be published.
            UnreachableError: the broker was away for too long. What was accepted is safe.
        """
        flights: deque[_Flight] = deque()
        try:
            for batch in _batches(groups, max_groups=self._max_groups, max_size=self._max_size):
                while flights and (len(flights) >= _CALLS_IN_FLIGHT or flights[0].future.done()):
                    yield from self._land(flights.popleft())
                flights.append(self._start(batch))
            while flights:
                yield from self._land(flights.popleft())
        finally:
            for flight in flights:
                flight.future.cancel()

    def take_costs(self) -> tuple[int, tuple[float, ...]]:
        """Size of the calls since this was last asked, and how long each took."""
        wire_bytes, self._wire_bytes = self._wire_bytes, 0
        call_seconds, self._call_seconds = self._call_seconds, []
        return wire_bytes, tuple(call_seconds)

    def _start(self, groups: list[rollout_pb2.Group]) -> _Flight:
        request = pb.PublishGroupsRequest(pool=self._pool, caller=self._caller, groups=groups)
        began = time.monotonic()
        future = self._wire.start(
            self._wire.exchange.PublishGroups, request, timeout_seconds=_PUBLISH_SECONDS
        )
        self._wire_bytes += sum(map(wire_size, groups))
        # The answer waits until this thread has encoded the next call; its arrival does not.
        future.add_done_callback(lambda _: self._call_seconds.append(time.monotonic() - began))
        return _Flight(groups, request, future, began)

    def _land(self, flight: _Flight) -> Iterator[tuple[rollout_pb2.Group, Outcome]]:
        patience = self._wire.patience()
        try:
            response = flight.future.result()
        except grpc.RpcError as error:
            self._wire.pause_after(error, patience, began=flight.began)
            response = self._again(flight.request, patience)
        except grpc.FutureCancelledError:
            self._wire.check_open()
            response = self._again(flight.request, patience)
        outcomes = _outcomes(response, len(flight.groups))
        # A group alone may be refused for a passing reason; the others of the call stand.
        while waiting := [number for number, outcome in enumerate(outcomes) if _is_passing(outcome)]:
            patience.pause(_as_error(outcomes[waiting[0]]))
            request = pb.PublishGroupsRequest(
                pool=self._pool, caller=self._caller, groups=[flight.groups[number] for number in waiting]
            )
            answers = _outcomes(self._again(request, patience), len(waiting))
            for number, answer in zip(waiting, answers, strict=True):
                outcomes[number] = answer
        for group, outcome in zip(flight.groups, outcomes, strict=True):
            if isinstance(outcome, SessionSupersededError | NotJoinedError):
                raise outcome
            yield group, outcome

    def _again(self, request: pb.PublishGroupsRequest, patience: Patience) -> pb.PublishGroupsResponse:
        return self._wire.call(
            self._wire.exchange.PublishGroups, request, timeout_seconds=_PUBLISH_SECONDS, patience=patience
        )


@dataclass(frozen=True, slots=True)
class _Flight:
    """A call under way."""

    groups: list[rollout_pb2.Group]
    request: pb.PublishGroupsRequest
    future: grpc.Future[pb.PublishGroupsResponse]
    began: float


def _batches(
    groups: Iterable[rollout_pb2.Group],
    *,
    max_groups: int,
    max_size: int,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[rollout_pb2.Group]]:
    """Groups by the call. A group that is larger than a call should be travels alone."""
    batch: list[rollout_pb2.Group] = []
    size = 0
    since = 0.0
    for group in groups:
        group_size = wire_size(group)
        if batch and size + group_size > max_size:
            yield batch
            batch, size = [], 0
        if not batch:
            since = clock()
        batch.append(group)
        size += group_size
        if len(batch) >= max_groups or clock() - since >= _OLDEST_SECONDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _outcomes(response: pb.PublishGroupsResponse, count: int) -> list[Outcome]:
    if len(response.results) != count:
        raise InternalError(f"The broker answered {len(response.results)} results to {count} groups.")
    return [_outcome(result) for result in response.results]


def _outcome(result: pb.PublishResult) -> Outcome:
    match result.WhichOneof("result"):
        case "receipt":
            return receipt_from_proto(result.receipt)
        case "error":
            return from_status(result.error)
        case _:
            return UnsupportedEncodingError(
                "The broker answered something newer than this version; upgrade hacrl-exchange."
            )


def _is_passing(outcome: Outcome) -> bool:
    return isinstance(outcome, ExchangeError) and is_passing(outcome)


def _as_error(outcome: Outcome) -> ExchangeError:
    return outcome if isinstance(outcome, ExchangeError) else InternalError("A receipt is no error.")
