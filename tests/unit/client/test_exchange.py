"""Rules of the connection: it waits for a broker, retries what may be retried, and ends when told to."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import rollout_pb2
from hacrl_exchange.client import connect
from hacrl_exchange.client.wire import Wire
from hacrl_exchange.errors import (
    AgentTakenError,
    BrokerStoppingError,
    ExchangeError,
    InvalidRequestError,
    LogFailedError,
    OverloadedError,
    StepRetiredError,
    UnreachableError,
)
from hacrl_exchange.types import Group, MemberState

if TYPE_CHECKING:
    from tests.unit.client.conftest import FakeBroker

PASSING = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    BrokerStoppingError("Stopping."),
    LogFailedError("The log failed."),
    OverloadedError("Full.", retry_seconds=0.01),
]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_connecting_tells_what_the_broker_speaks(broker: FakeBroker, target: str) -> None:
    with connect(target) as exchange:
        assert exchange.info.protocol_revision == 1
        assert exchange.info.limits.max_groups_per_publish == 64
        assert repr(exchange) == f"<Exchange at {target}>"


def test_a_wrong_address_is_said_in_a_sentence() -> None:
    address = f"127.0.0.1:{closed_port()}"

    with pytest.raises(
        UnreachableError,
        match=rf"^No broker answered at {address} within 0\.2 s\. "
        r"Check the address, and that `hacrl broker` runs there\.$",
    ):
        connect(address, timeout_seconds=0.2)


def test_an_address_that_swallows_everything_meets_the_deadline() -> None:
    """A socket that accepts and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        with pytest.raises(UnreachableError, match=r"^No broker answered at "):
            connect(address, timeout_seconds=0.3)


@pytest.mark.parametrize(("address", "identity"), [("", ""), ("localhost:1", "ü"), ("localhost:1", "a\nb")])
def test_a_malformed_address_or_identity_is_refused(address: str, identity: str) -> None:
    with pytest.raises(InvalidRequestError):
        connect(address, identity=identity)


@pytest.mark.parametrize("error", PASSING, ids=str)
@pytest.mark.parametrize("rpc", ["GetServerInfo", "GetPool", "ListPools", "ListMembers", "JoinPool"])
def test_a_call_is_retried_while_the_broker_is_away_or_busy(
    broker: FakeBroker, target: str, rpc: str, error: ExchangeError | grpc.StatusCode
) -> None:
    broker.fail[rpc].extend([error, error])

    with connect(target) as exchange:
        exchange.pool("math")
        exchange.pools()
        exchange.members("math")
        exchange.join("math", agent="a")

    calls = len(broker.requests(rpc))
    assert calls == (4 if rpc in ("ListPools", "ListMembers") else 3)


@pytest.mark.parametrize(
    "error", [AgentTakenError("Taken."), OverloadedError("Full."), StepRetiredError("Gone.")], ids=str
)
def test_what_cannot_pass_is_raised_at_once(broker: FakeBroker, target: str, error: ExchangeError) -> None:
    broker.fail["JoinPool"].append(error)

    with connect(target) as exchange, pytest.raises(type(error), match=rf"^{error}$"):
        exchange.join("math", agent="a")
    assert len(broker.requests("JoinPool")) == 1


def test_a_retried_join_names_the_same_instance(broker: FakeBroker, target: str) -> None:
    broker.fail["JoinPool"].extend([grpc.StatusCode.UNAVAILABLE] * 2)

    with connect(target) as exchange:
        exchange.join("math", agent="a")
        exchange.join("math", agent="a")

    instances = [request.instance for request in broker.requests("JoinPool")]
    assert len(set(instances[:3])) == 1
    assert instances[3] != instances[0]


def test_patience_ends(broker: FakeBroker, target: str) -> None:
    broker.fail["GetPool"].extend([grpc.StatusCode.UNAVAILABLE] * 100)

    with (
        connect(target, patience_seconds=0.2) as exchange,
        pytest.raises(UnreachableError, match=rf"^The broker at {target} has not answered for 0 s\. Check "),
    ):
        exchange.pool("math")


def test_pools_and_members_are_read_page_by_page(broker: FakeBroker, target: str) -> None:
    with connect(target) as exchange:
        assert [pool.name for pool in exchange.pools()] == ["math", "zebra"]
        members = exchange.members("math")
        status = exchange.pool("math")

    assert [(member.agent, member.state) for member in members] == [
        ("a", MemberState.ACTIVE),
        ("b", MemberState.ACTIVE),
    ]
    assert (status.name, status.accepted_count, status.pending_count) == ("math", 4, 4)
    assert status.spec.group_size == 2


def test_closing_ends_a_call_that_waits_in_another_thread(broker: FakeBroker, target: str) -> None:
    broker.ended = False
    errors: list[BaseException] = []
    exchange = connect(target)
    agent = exchange.join("math", agent="a")

    def wait() -> None:
        try:
            next(agent.steps())
        except UnreachableError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert broker.waiting.wait(10)
    exchange.close()
    thread.join(10)

    assert not thread.is_alive()
    assert [str(error) for error in errors] == [f"The connection to {target} was closed here; connect again."]
    assert broker.cancelled.wait(10)


def test_a_closed_connection_says_so(broker: FakeBroker, target: str) -> None:
    with connect(target) as exchange:
        pass

    with pytest.raises(UnreachableError, match=r" was closed here; connect again\.$"):
        exchange.pool("math")
    exchange.close()


def test_an_abandoned_stream_is_cancelled(
    broker: FakeBroker, target: str, group: Callable[..., Group]
) -> None:
    """The groups are too large to fit into the buffers of a connection."""
    for number in range(20):
        broker.store(group(f"p{number}", random.randbytes(200_000).hex()))
    wire = Wire(target)
    request = pb.StreamGroupsRequest(pool="pools/math", step=1, part_kinds=[rollout_pb2.PART_KIND_TEXT])
    stream = wire.stream(wire.exchange.StreamGroups, request)
    next(stream)
    stream.close()

    assert broker.cancelled.wait(10)
    wire.close()


def test_a_reader_replays_and_follows_without_joining(
    broker: FakeBroker, target: str, group: Callable[..., Group]
) -> None:
    broker.store(group("p0"), step=1)
    broker.store(group("p1"), step=2)
    broker.add_step(1)
    broker.add_step(2)

    with connect(target) as exchange:
        batch = exchange.replay("math", 1, parts=("text",))
        following = exchange.follow("math", 1)
        followed = [next(following).step, next(following).step]

    assert followed == [1, 2]
    assert [prompt.messages for prompt in batch.prompts] == [(), (), ()]
    assert batch.groups[0].group.rollouts[0].text == "four 0"
    assert batch.groups[0].group.rollouts[0].token_ids is None
    assert not broker.requests("JoinPool")
    assert not broker.requests("StreamGroups")[0].HasField("caller")


def test_the_package_gives_its_names_on_first_use() -> None:
    """In a fresh interpreter: the import loads neither gRPC nor numpy, and neither do the types."""
    code = (
        "import sys, hacrl_exchange as h\n"
        "assert h.Rollout and h.ExchangeError and not {'grpc', 'numpy', 'google'} & set(sys.modules)\n"
        "assert all(getattr(h, name) for name in h.__all__) and 'grpc' in sys.modules\n"
        "assert set(h.__all__) <= set(dir(h))\n"
        "try: h.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.stderr == ""
    assert done.stdout == "module 'hacrl_exchange' has no attribute 'nothing'\n"


def test_a_journal_that_cannot_be_written_is_said_before_joining(
    broker: FakeBroker, target: str, tmp_path: Path
) -> None:
    with connect(target) as exchange, pytest.raises(FileNotFoundError):
        exchange.join("math", agent="a", journal=tmp_path / "no" / "journal")
    assert not broker.requests("JoinPool")
