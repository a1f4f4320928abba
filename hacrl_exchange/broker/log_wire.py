"""What reading protobuf from the log shares: whatever cannot be read is CorruptLogError, never a guess."""

from __future__ import annotations

import enum
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from hacrl_exchange._pb import step_pb2
from hacrl_exchange.errors import CorruptLogError
from hacrl_exchange.types import RosterState

_Enum = TypeVar("_Enum", bound=enum.Enum)
_Message = TypeVar("_Message", bound=Message)


def roster_state_to_proto(state: RosterState | None) -> step_pb2.RosterState.ValueType:
    """None, a member that may still publish, is UNSPECIFIED."""
    return step_pb2.RosterState.ValueType(state.value if state else 0)


def known(kind: type[_Enum], value: int) -> _Enum:
    """The member of an enum with this wire value.

    Raises:
        CorruptLogError: this version knows none.
    """
    try:
        return kind(value)
    except ValueError as error:
        raise unreadable(f"its {kind.__name__} is {value}") from error


def parsed(kind: type[_Message], payload: bytes) -> _Message:
    """The message in these bytes.

    Raises:
        CorruptLogError: there is none.
    """
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise unreadable(f"it is no {kind.__name__}") from error


def unreadable(why: str) -> CorruptLogError:
    """The error for bytes that cannot be read."""
    return CorruptLogError(
        f"A record or snapshot of the log cannot be read: {why}. Upgrade hacrl-exchange if a newer version "
        f"wrote it, else restore the data folder from a copy.",
        why=why,
    )
