"""Rules of errors on the wire: a class survives the trip, and a stranger's error is never lost."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.rpc import code_pb2, error_details_pb2, status_pb2

from hacrl_exchange.errors import (
    DOMAIN,
    ExchangeError,
    GroupNotFoundError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    PermissionDeniedError,
    SlotTakenError,
    UnreachableError,
    UnsupportedEncodingError,
    all_errors,
)
from hacrl_exchange.status import DETAILS_KEY, from_rpc_error, from_status, grpc_code, to_status


class FakeCallError(grpc.RpcError):
    """What a stub raises, reduced to what is read of it."""

    def __init__(
        self, code: grpc.StatusCode, details: str | None, trailing: tuple[tuple[str, bytes], ...] | None = ()
    ) -> None:
        super().__init__()
        self._code = code
        self._details = details
        self._trailing = trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...] | None:  # type: ignore[override]  # aio's
        return self._trailing


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.reason)
def test_every_error_survives_the_trip(kind: type[ExchangeError]) -> None:
    error = kind("A thing went wrong; mend it.", step=3, message_count="two")

    back = from_status(status_pb2.Status.FromString(to_status(error).SerializeToString()))

    assert type(back) is kind
    assert str(back) == "A thing went wrong; mend it."
    assert back.metadata == {"step": "3", "message_count": "two"}
    assert back.retry_seconds is None
    assert grpc_code(kind.code).value[0] == to_status(error).code


def test_reasons_are_unique() -> None:
    assert len({kind.reason for kind in all_errors()}) == len(all_errors())


def test_a_status_has_exactly_one_error_info() -> None:
    status = to_status(OverloadedError("Too much.", retry_seconds=0.25))

    infos = [detail for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    assert len(infos) == 1
    assert len(status.details) == 2


def test_a_retry_delay_survives_the_trip() -> None:
    assert from_status(to_status(OverloadedError("Too much.", retry_seconds=0.25))).retry_seconds == 0.25


def test_a_status_stays_below_4_kb_whatever_is_put_in() -> None:
    error = SlotTakenError("ü" * 100_000)
    error.metadata.update({f"key{n}" * 20: "\N{PILE OF POO}" * 10_000 for n in range(100)})

    status = to_status(error)

    assert status.ByteSize() < 4096
    back = from_status(status)
    assert isinstance(back, SlotTakenError)
    assert back.message.endswith("ü...")


def test_text_that_is_no_unicode_does_not_break_the_answer() -> None:
    assert from_status(to_status(InternalError("\ud800", path="\udcff"))).message == "?"


def test_metadata_named_like_a_parameter_survives() -> None:
    error = InvalidRequestError("No.")
    error.metadata.update({"message": "a", "retry_seconds": "b", "self": "c"})

    assert from_status(to_status(error)).metadata == {"message": "a", "retry_seconds": "b", "self": "c"}


@pytest.mark.parametrize(
    ("code", "nearest"),
    [
        ("NOT_FOUND", InvalidRequestError),
        ("INVALID_ARGUMENT", InvalidRequestError),
        ("UNAVAILABLE", UnreachableError),
        ("DEADLINE_EXCEEDED", UnreachableError),
        ("RESOURCE_EXHAUSTED", OverloadedError),
        ("UNAUTHENTICATED", PermissionDeniedError),
        ("UNIMPLEMENTED", UnsupportedEncodingError),
        ("INTERNAL", InternalError),
    ],
)
def test_an_unknown_reason_becomes_the_nearest_class_and_keeps_its_text(
    code: str, nearest: type[ExchangeError]
) -> None:
    info = Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="FROM_2031", domain=DOMAIN, metadata={"a": "b"}))
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message="Something new.", details=[info])

    error = from_status(status)

    assert type(error) is nearest
    assert error.message == "Something new."
    assert error.metadata == {"a": "b", "unknown_reason": "FROM_2031"}


def test_a_reason_of_another_domain_is_not_ours() -> None:
    info = Any()
    info.Pack(error_details_pb2.ErrorInfo(reason="SLOT_TAKEN", domain="example.com"))

    assert type(from_status(status_pb2.Status(code=13, details=[info]))) is InternalError


def test_a_malformed_detail_is_skipped() -> None:
    broken = Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")

    error = from_status(status_pb2.Status(code=14, message="Away.", details=[broken]))

    assert type(error) is UnreachableError
    assert error.message == "Away."


def test_a_failed_call_carries_its_status_in_the_trailers() -> None:
    status = to_status(GroupNotFoundError("There is no such group.", group="g"))
    failed = FakeCallError(
        grpc.StatusCode.NOT_FOUND, "There is no such group.", ((DETAILS_KEY, status.SerializeToString()),)
    )

    error = from_rpc_error(failed)

    assert type(error) is GroupNotFoundError
    assert error.metadata == {"group": "g"}


@pytest.mark.parametrize(
    ("code", "details", "nearest"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect", UnreachableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", UnreachableError),
        (grpc.StatusCode.CANCELLED, "CANCELLED", UnreachableError),
        (grpc.StatusCode.UNKNOWN, "Stream removed", UnreachableError),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", UnreachableError),
        (grpc.StatusCode.INTERNAL, "a bug", InternalError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max", OverloadedError),
    ],
)
def test_grpcs_own_errors_become_ours(
    code: grpc.StatusCode, details: str, nearest: type[ExchangeError]
) -> None:
    error = from_rpc_error(FakeCallError(code, details))

    assert type(error) is nearest
    assert error.message == details


def test_trailers_that_contradict_the_code_are_not_believed() -> None:
    status = to_status(SlotTakenError("Taken."))
    failed = FakeCallError(grpc.StatusCode.UNAVAILABLE, "away", ((DETAILS_KEY, status.SerializeToString()),))

    assert type(from_rpc_error(failed)) is UnreachableError


def test_an_error_without_anything_is_still_an_error() -> None:
    assert type(from_rpc_error(grpc.RpcError())) is InternalError
    assert from_rpc_error(FakeCallError(grpc.StatusCode.UNAVAILABLE, None, None)).message == "UNAVAILABLE"
