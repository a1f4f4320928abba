"""The channel to a broker: options, stubs, calls that are tried again. Every call has a deadline.

One method makes an attempt fail or succeed; Patience decides what follows. Only this module and its callers
in this package see protobuf and gRPC.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import version
from typing import TypeVar

import grpc

from hacrl_exchange._pb import (
    admin_service_pb2_grpc,
    exchange_service_pb2_grpc,
    verification_service_pb2_grpc,
)
from hacrl_exchange.client.retry import Patience
from hacrl_exchange.errors import InvalidRequestError, UnreachableError
from hacrl_exchange.status import from_rpc_error

CALL_SECONDS = 30.0
"""Deadline of one attempt of an ordinary call."""
STREAM_SECONDS = 600.0
"""Deadline of one attempt of a stream; the next attempt resumes."""
POLL_SECONDS = 20.0
"""Longest wait of one long poll."""
_POLL_MARGIN_SECONDS = 10.0
_MAX_MESSAGE_SIZE = 64 << 20

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Answer = TypeVar("_Answer")


class Wire:
    """A lazy connection to one broker. Threads may share it."""

    def __init__(
        self,
        target: str,
        *,
        identity: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        patience_seconds: float = 300.0,
    ) -> None:
        """Opens nothing yet.

        Raises:
            InvalidRequestError: the target is empty or the identity is not printable ASCII.
        """
        if not target:
            raise InvalidRequestError("The broker's address is empty; give it as host:port.")
        if not (identity.isascii() and (identity.isprintable() or not identity)):
            raise InvalidRequestError("identity must be printable ASCII, e.g. a host name.", field="identity")
        self.target = target
        self.patience_seconds = patience_seconds
        self._metadata = tuple(metadata)
        self._channel = grpc.insecure_channel(target, options=_options(target, identity))
        self._ended = threading.Event()
        self.exchange = exchange_service_pb2_grpc.ExchangeServiceStub(self._channel)
        self.verification = verification_service_pb2_grpc.VerificationServiceStub(self._channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection and every call on it; they raise UnreachableError. Closing twice is fine."""
        self._ended.set()
        self._channel.close()

    def patience(self, seconds: float | None = None) -> Patience:
        """A fresh patience; this connection's own, or less."""
        longest = self.patience_seconds
        return Patience(
            longest if seconds is None else min(seconds, longest), target=self.target, sleep=self._ended.wait
        )

    def call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        timeout_seconds: float = CALL_SECONDS,
        patience: Patience | None = None,
    ) -> _Response:
        """Makes an idempotent call, again and again while the broker is away or busy.

        Raises:
            UnreachableError: no answer for as long as patience lasts, or the connection was closed.
            ExchangeError: what the broker answered.
        """

        bearing = patience or self.patience()

        def attempt() -> _Response:
            return method(request, timeout=bearing.bound(timeout_seconds), metadata=self._metadata)

        return self.attempts(attempt, bearing)

    def call_stream(
        self,
        method: grpc.StreamUnaryMultiCallable[_Request, _Response],
        requests: Sequence[_Request],
        *,
        timeout_seconds: float = STREAM_SECONDS,
    ) -> _Response:
        """Makes an idempotent client-stream call, from the start in every attempt. Raises as `call`."""

        def attempt() -> _Response:
            return method(iter(requests), timeout=timeout_seconds, metadata=self._metadata)

        return self.attempts(attempt, self.patience())

    def attempts(self, attempt: Callable[[], _Response], patience: Patience) -> _Response:
        """Attempts until it succeeds or patience ends. Raises as `call`."""
        while True:
            self.check_open()
            began = time.monotonic()
            try:
                response = attempt()
            except (grpc.RpcError, ValueError) as error:
                self.pause_after(error, patience, began=began)
            else:
                patience.progress()
                return response

    def pause_after(
        self, error: grpc.RpcError | ValueError, patience: Patience, *, began: float | None = None
    ) -> None:
        """Waits after a failed attempt, or raises what it means. Raises as `call`."""
        self.check_open()
        if isinstance(error, ValueError):
            raise error  # not gRPC's "closed channel", so a bug
        patience.pause(from_rpc_error(error), began=began)

    def pause(self, seconds: float) -> None:
        """Waits between two questions of a caller that polls. Raises UnreachableError once closed."""
        self._ended.wait(seconds)
        self.check_open()

    def check_open(self) -> None:
        """Raises UnreachableError if the connection was closed on this side."""
        if self._ended.is_set():
            raise UnreachableError(
                f"The connection to {self.target} was closed here; connect again.", target=self.target
            )

    def start(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        *,
        timeout_seconds: float = CALL_SECONDS,
    ) -> grpc.Future[_Response]:
        """Starts one attempt and returns at once."""
        self.check_open()
        return method.future(request, timeout=timeout_seconds, metadata=self._metadata)

    def stream(
        self,
        method: grpc.UnaryStreamMultiCallable[_Request, _Response],
        request: _Request,
        *,
        timeout_seconds: float = STREAM_SECONDS,
    ) -> Generator[_Response]:
        """Makes one attempt of a server stream; cancels it when the iterator is closed early.

        Raises:
            grpc.RpcError: the stream broke; the caller resumes it.
        """
        self.check_open()
        call = method(request, timeout=timeout_seconds, metadata=self._metadata)
        try:
            yield from call
        finally:
            call.cancel()

    def wait_for(
        self,
        ask: Callable[[float, float, Patience], _Answer | None],
        *,
        timeout_seconds: float | None,
        what: str,
    ) -> _Answer:
        """Repeats a long poll until it answers. `ask` takes the wait, an attempt's deadline and the patience.

        Raises:
            TimeoutError: the caller's own limit passed.
            UnreachableError: the broker was away for too long.
        """
        patience = self.patience(timeout_seconds)
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            left = POLL_SECONDS if until is None else max(until - time.monotonic(), 0.0)
            wait = min(left, POLL_SECONDS)
            margin = _POLL_MARGIN_SECONDS if until is None else min(_POLL_MARGIN_SECONDS, left - wait + 2.0)
            answer = ask(wait, wait + margin, patience)
            if answer is not None:
                return answer
            if until is not None and time.monotonic() >= until:
                raise TimeoutError(f"{what} did not come within {timeout_seconds:g} s.")


def _options(target: str, identity: str) -> list[tuple[str, int | str]]:
    agent = f"hacrl-exchange/{version('hacrl-exchange')}"
    options: list[tuple[str, int | str]] = [
        ("grpc.primary_user_agent", f"{agent} {identity}".strip()),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_SIZE),
        ("grpc.max_send_message_length", _MAX_MESSAGE_SIZE),
        # A dead peer is noticed in half a minute, also during a long poll.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Calls are retried here, where their meaning is known.
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if _is_local(target):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def _is_local(target: str) -> bool:
    if target.startswith("unix:"):
        return True
    host = target.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
