"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from hacrl_exchange.testing import running_broker
from rawdesk import Desk


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A broker without workers, and stubs to it."""
    with running_broker() as broker, grpc.insecure_channel(broker.target) as channel:
        yield Desk(channel)
