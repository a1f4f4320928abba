"""Errors of the exchange as google.rpc.Status, and back; the only place where the two meet.

A status carries exactly one ErrorInfo (domain, reason, metadata) and a RetryInfo if the server names a delay.
A reader goes by domain and reason, never by the text.
"""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hacrl_exchange.errors import (
    DOMAIN,
    CorruptLogError,
    ExchangeError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    UnreachableError,
    UnsupportedEncodingError,
    all_errors,
)

DETAILS_KEY = "grpc-status-details-bin"
"""The trailing metadata key in which gRPC carries a google.rpc.Status."""

# A peer answers RESOURCE_EXHAUSTED instead of the error when its headers outgrow some 8 kB; base64 and the
# message, which travels twice, come on top of the details.
_MAX_STATUS_SIZE = 3000
_MAX_MESSAGE = 1000
_MAX_VALUE = 200

_BY_REASON: Final = {error.reason: error for error in all_errors()}
# For a reason that is unknown here, or an error that gRPC itself made. Where no class is near enough to be
# branched on, the request is at fault.
_BY_CODE: Final[dict[str, type[ExchangeError]]] = {
    "CANCELLED": UnreachableError,
    "DATA_LOSS": CorruptLogError,
    "DEADLINE_EXCEEDED": UnreachableError,
    "INTERNAL": InternalError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "UNAUTHENTICATED": PermissionDeniedError,
    "UNAVAILABLE": UnreachableError,
    "UNIMPLEMENTED": UnsupportedEncodingError,
    "UNKNOWN": InternalError,
}
# How gRPC words a connection that broke under a call, with codes that do not say so.
_BROKEN_CONNECTION = ("Stream removed", "RST_STREAM", "GOAWAY", "Connection reset", "Socket closed")


def grpc_code(name: str) -> grpc.StatusCode:
    """The gRPC status code of that name, e.g. "NOT_FOUND".

    Raises:
        KeyError: there is none.
    """
    return grpc.StatusCode[name]


def to_status(error: ExchangeError) -> status_pb2.Status:
    """An error as a status of less than 4 kB; long texts are cut."""
    metadata = {key[:64]: _cut(value, _MAX_VALUE) for key, value in error.metadata.items()}
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=_cut(error.message, _MAX_MESSAGE)
    )
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in metadata.items():
        if status.ByteSize() + info.ByteSize() + len(key) + len(value.encode()) < _MAX_STATUS_SIZE:
            info.metadata[key] = value
    status.details.add().Pack(info)
    if error.retry_seconds is not None:
        delay = Duration()
        delay.FromNanoseconds(round(max(error.retry_seconds, 0.0) * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def from_status(status: status_pb2.Status) -> ExchangeError:
    """A status as an error: the class of its reason, or the nearest by code with the text kept."""
    info, retry_seconds = error_details_pb2.ErrorInfo(), None
    for detail in status.details:
        try:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                detail.Unpack(info)
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_seconds = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            continue  # a malformed detail adds nothing; code and message still say what happened
    known = _BY_REASON.get(info.reason) if info.domain == DOMAIN else None
    metadata = dict(info.metadata)
    if known is None:
        code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
        known = _nearest(code, status.message)
        if info.reason:
            metadata["unknown_reason"] = info.reason
    # Set afterwards: a key like "message" would collide with a parameter of the constructor.
    error = known(status.message, retry_seconds=retry_seconds)
    error.metadata.update(metadata)
    return error


def from_rpc_error(error: grpc.RpcError) -> ExchangeError:
    """What a failed call of a gRPC stub means. Works for sync and aio errors."""
    code = getattr(error, "code", None)
    status_code = code() if callable(code) else grpc.StatusCode.UNKNOWN
    trailing = getattr(error, "trailing_metadata", None)
    for key, value in (trailing() if callable(trailing) else None) or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value if isinstance(value, bytes) else value.encode())
        except DecodeError:
            break
        if status.code == status_code.value[0]:
            return from_status(status)
    details = getattr(error, "details", None)
    text = (details() if callable(details) else None) or status_code.name
    return _nearest(status_code.name, text)(text)


def _nearest(code: str, text: str) -> type[ExchangeError]:
    if code in ("INTERNAL", "UNKNOWN") and any(words in text for words in _BROKEN_CONNECTION):
        return UnreachableError
    return _BY_CODE.get(code, InvalidRequestError)


def _cut(text: str, size: int) -> str:
    """The text, or its beginning with dots, in at most `size` bytes of UTF-8."""
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= size:
        return raw.decode()
    return raw[: size - 3].decode(errors="ignore") + "..."
