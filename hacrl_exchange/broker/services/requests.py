"""Reading requests: names, waits and pages, the same way in every service."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration

from hacrl_exchange.errors import InvalidRequestError

_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def bare_id(name: str, *, collection: str, field: str) -> str:
    """The id of a resource name "collection/id".

    Raises:
        InvalidRequestError: it is not one.
    """
    prefix, _, identifier = name.partition("/")
    if prefix != collection or not _ID.fullmatch(identifier):
        raise InvalidRequestError(
            f"{field} must be '{collection}/ID', the ID of 1 to 63 characters a-z, 0-9 and '-' "
            f"(not at the ends); it is {name[:100]!r}.",
            field=field,
        )
    return identifier


def agent_id(name: str, *, field: str) -> str:
    """An agent's id, checked.

    Raises:
        InvalidRequestError: it is not one.
    """
    if not _ID.fullmatch(name):
        raise InvalidRequestError(
            f"{field} must be an agent id of 1 to 63 characters a-z, 0-9 and '-' (not at the ends); "
            f"it is {name[:100]!r}.",
            field=field,
        )
    return name


def wait_seconds(wait: Duration, *, limit: float) -> float:
    """A long poll's wait, capped; unset is 0.

    Raises:
        InvalidRequestError: it is negative.
    """
    seconds = wait.seconds + wait.nanos / 1e9
    if seconds < 0:
        raise InvalidRequestError(f"wait must not be negative; it is {seconds} s.", field="wait")
    return min(seconds, limit)


class _Paged(Protocol):
    page_size: int
    page_token: str


_T = TypeVar("_T")


def page(request: _Paged, names: Sequence[str], items: Sequence[_T]) -> tuple[list[_T], str]:
    """One page of items sorted by name, and the token of the next page. The token is the last name sent.

    Raises:
        InvalidRequestError: the page size is negative.
    """
    if request.page_size < 0:
        raise InvalidRequestError(
            f"page_size must not be negative; it is {request.page_size}.", field="page_size"
        )
    size = min(request.page_size or 100, 1000)
    start = next((i for i, name in enumerate(names) if name > request.page_token), len(names))
    if not request.page_token:
        start = 0
    end = start + size
    return list(items[start:end]), names[end - 1] if end < len(names) else ""
