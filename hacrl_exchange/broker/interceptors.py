"""What cuts across every call: errors become statuses, and the caller becomes a principal."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from hacrl_exchange.errors import ExchangeError, InternalError, InvalidRequestError, PermissionDeniedError
from hacrl_exchange.status import DETAILS_KEY, grpc_code, to_status

_log = logging.getLogger(__name__)

LOCAL_PRINCIPAL = "local"
"""Everybody on a loopback broker without keys: one trust domain."""
WORKER_PRINCIPAL = "broker"
"""The workers the broker spawns itself."""
WORKER_KEY = "hacrl-worker-key"
"""Metadata key of a spawned worker's one-time key."""

Context = grpc.aio.ServicerContext[Any, Any]


class Identities:
    """Tells who calls. Spawned workers carry a one-time key; everyone else on loopback is `local`."""

    def __init__(self) -> None:
        self._worker_keys: dict[str, str] = {}

    def allow_worker(self, name: str, key: str) -> None:
        """Admits a worker the broker is about to spawn; replaces the key of the one before it."""
        self._worker_keys[name] = key

    def principal(self, context: Context) -> str:
        """The principal of a call.

        Raises:
            PermissionDeniedError: a worker key that this broker did not give out.
        """
        for name, value in context.invocation_metadata() or ():
            if name != WORKER_KEY:
                continue
            if any(
                hmac.compare_digest(str(value).encode(), key.encode()) for key in self._worker_keys.values()
            ):
                return WORKER_PRINCIPAL
            raise PermissionDeniedError(
                "The worker key is not one this broker gave out; a worker of an earlier broker must stop."
            )
        return LOCAL_PRINCIPAL


async def _abort(context: Context, error: ExchangeError) -> None:
    status = to_status(error)
    await context.abort(
        grpc_code(error.code), status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
    )


def _as_exchange_error(error: Exception, method: str) -> ExchangeError:
    if isinstance(error, ExchangeError):
        return error
    _log.error("%s failed", method, exc_info=error)
    return InternalError(
        f"{method} failed on a bug of the broker; its log holds the traceback.", method=method
    )


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns ExchangeErrors into google.rpc.Status, and every other exception into INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of a method."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith("/hacrl."):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(handler.unary_unary, method),
                _decoder(handler.request_deserializer),
                handler.response_serializer,
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                _unary(handler.stream_unary, method),
                _decoder(handler.request_deserializer),
                handler.response_serializer,
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _stream(handler.unary_stream, method),
                _decoder(handler.request_deserializer),
                handler.response_serializer,
            )
        return handler


class _Undecodable:
    """Stands for a request that is not a message of its method. gRPC itself would answer UNKNOWN and log a
    traceback for each, so the refusal waits until it can be a status."""


def _decoder(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            return _Undecodable()

    return decode


def _decoded(request: Any, method: str) -> Any:
    """A request, or the stream of them; refuses what could not be decoded."""
    if isinstance(request, _Undecodable):
        raise InvalidRequestError(
            f"The request is not a message of {method}, or a text in it is not UTF-8; "
            "encode it with the protocol's own definitions."
        )
    return _all_decoded(request, method) if isinstance(request, AsyncIterable) else request


async def _all_decoded(requests: AsyncIterable[Any], method: str) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request, method)


def _unary(behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await behaviour(_decoded(request, method), context)
        except (grpc.aio.AbortError, grpc.RpcError):
            raise
        except Exception as error:
            await _abort(context, _as_exchange_error(error, method))

    return call


def _stream(behaviour: Callable[..., Any], method: str) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for message in behaviour(_decoded(request, method), context):
                yield message
        except (grpc.aio.AbortError, grpc.RpcError):
            raise
        except Exception as error:
            await _abort(context, _as_exchange_error(error, method))

    return call
