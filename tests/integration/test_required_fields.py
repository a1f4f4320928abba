"""Each REQUIRED field of each request, left empty, is refused: the annotations say what the broker does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.api import field_behavior_pb2
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from hacrl_exchange._pb import (
    admin_service_pb2,
    exchange_service_pb2,
    pool_pb2,
    prompt_pb2,
    verdict_pb2,
    verification_service_pb2,
)
from hacrl_exchange.errors import InternalError, UnreachableError
from hacrl_exchange.status import from_rpc_error, from_status
from rawdesk import Desk

SERVICES: tuple[ServiceDescriptor, ...] = (
    admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
    exchange_service_pb2.DESCRIPTOR.services_by_name["ExchangeService"],
    verification_service_pb2.DESCRIPTOR.services_by_name["VerificationService"],
)

ZERO_IS_A_VALUE = {
    "Scored.score": "a real zero is a score",
    "PartInfo.stored_size": "an empty part is possible; a wrong size has its own tests",
    "PartInfo.decoded_size": "likewise",
    "RolloutInfo.logprob_sum": "0 is the sum of certain tokens; a wrong sum has its own tests",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A well-formed request and how to send it."""

    request: Message
    send: Callable[[Any], Any]


def is_required(field: FieldDescriptor) -> bool:
    behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return field_behavior_pb2.REQUIRED in behaviors


def required_paths(message: Message, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of REQUIRED fields set in a message, nested ones included (the first element of lists)."""
    for field, value in message.ListFields():
        name = f"{message.DESCRIPTOR.name}.{field.name}"
        if is_required(field) and name not in ZERO_IS_A_VALUE:
            yield (*path, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if not field.is_repeated:
                yield from required_paths(value, (*path, field.name))
            elif len(value) and isinstance(value[0], Message):
                yield from required_paths(value[0], (*path, field.name, 0))


def without(message: Message, path: tuple[str | int, ...]) -> Message:
    """A copy with one field cleared."""
    copy = type(message)()
    copy.CopyFrom(message)
    target: Any = copy
    for step in path[:-1]:
        target = target[step] if isinstance(step, int) else getattr(target, step)
    target.ClearField(path[-1])
    return copy


def refusals(call: Call, request: Message) -> list[Exception]:
    """Every error in the answer: the call's own, or those of its items."""
    try:
        answer = call.send(request)
        answers = [answer] if isinstance(answer, Message) else list(answer)
    except grpc.RpcError as error:
        return [from_rpc_error(error)]
    return [
        from_status(result.error)
        for message in answers
        for result in getattr(message, "results", ())
        if result.error.code
    ]


def sender(stub: Any, *, streams_in: bool) -> Callable[[Any], Any]:
    """How a request goes to a stub."""
    return lambda request: stub(iter([request]) if streams_in else request, timeout=10)


@pytest.fixture
def calls(desk: Desk) -> dict[str, Call]:
    """One well-formed request for each RPC, against a pool with an open step and a lease."""
    desk.create_pool(name="over", publish_timeout_seconds=0.05, verify_timeout_seconds=0.05)
    over = dataclasses.replace(desk, pool="pools/over", sessions={})
    over.join("a")
    over.manifest(1)
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    desk.publish("a", desk.encoded("a", "q0"))
    worker = desk.register_worker()
    lease = desk.acquire(worker)
    ex, ve, ad = exchange_service_pb2, verification_service_pb2, admin_service_pb2
    me, pool = desk.caller("a"), desk.pool
    spec = desk.exchange.GetPool(ex.GetPoolRequest(name=pool), timeout=5).pool.spec
    report = ve.VerdictReport(
        group=lease.groups[0].group,
        generation=1,
        verifier=verdict_pb2.VerifierIdentity(verifier="exact_match", version="1", config_digest=bytes(32)),
        verdicts=[verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=1.0)) for _ in range(2)],
    )
    entry = prompt_pb2.PromptEntry(
        prompt=prompt_pb2.Prompt(prompt_id="x", messages=[prompt_pb2.Message(role="user")])
    )
    requests: dict[str, Message] = {
        "GetServerInfo": ex.GetServerInfoRequest(),
        "GetPool": ex.GetPoolRequest(name=pool),
        "ListPools": ex.ListPoolsRequest(),
        "ListMembers": ex.ListMembersRequest(parent=pool),
        "JoinPool": ex.JoinPoolRequest(pool=pool, agent="b", instance="i", model=pool_pb2.ModelSpec()),
        "LeavePool": ex.LeavePoolRequest(pool=pool, caller=me),
        "AwaitStep": ex.AwaitStepRequest(pool=pool, caller=me),
        "PublishGroups": ex.PublishGroupsRequest(pool=pool, caller=me, groups=[desk.encoded("a", "q1")]),
        "AwaitManifest": ex.AwaitManifestRequest(pool=over.pool, step=1),
        "StreamGroups": ex.StreamGroupsRequest(pool=over.pool, step=1),
        "StreamOwnGroups": ex.StreamOwnGroupsRequest(pool=pool, caller=me, step=1),
        "AckStep": ex.AckStepRequest(pool=over.pool, caller=over.caller("a"), step=1),
        "RegisterWorker": ve.RegisterWorkerRequest(
            identity="w", verifiers=[ve.OfferedVerifier(verifier="v", version="1")]
        ),
        "AcquireLease": ve.AcquireLeaseRequest(worker=worker),
        "RenewLease": ve.RenewLeaseRequest(worker=worker, lease=lease.lease),
        "ReportVerdicts": ve.ReportVerdictsRequest(worker=worker, lease=lease.lease, reports=[report]),
        "CreatePromptSet": ad.CreatePromptSetRequest(name="promptSets/x", entries=[entry], prompt_count=1),
        "ListPromptSets": ad.ListPromptSetsRequest(),
        "CreatePool": ad.CreatePoolRequest(name="pools/x", spec=spec),
        "ListWorkers": ad.ListWorkersRequest(),
    }
    stubs: dict[str, Any] = {
        "AdminService": desk.admin,
        "ExchangeService": desk.exchange,
        "VerificationService": desk.verification,
    }
    built: dict[str, Call] = {}
    for service in SERVICES:
        for method in service.methods:
            stub = getattr(stubs[service.name], method.name)
            streams_in = method.client_streaming
            built[method.name] = Call(requests[method.name], sender(stub, streams_in=streams_in))
    return built


def test_each_required_field_left_empty_is_refused(calls: dict[str, Call]) -> None:
    accepted: list[str] = []
    checked = 0
    for method, call in sorted(calls.items(), key=lambda named: named[0] == "LeavePool"):
        for path in required_paths(call.request):
            checked += 1
            found = refusals(call, without(call.request, path))
            label = f"{method} without {'.'.join(map(str, path))}"
            if not found:
                accepted.append(label)
            assert not any(isinstance(error, InternalError | UnreachableError) for error in found), label
        assert refusals(call, call.request) == [], f"the whole {method} should be accepted"
    assert accepted == []
    assert checked > 50


def test_a_negative_page_size_is_refused_by_every_list(desk: Desk) -> None:
    lists: tuple[tuple[Any, Message], ...] = (
        (desk.exchange.ListPools, exchange_service_pb2.ListPoolsRequest(page_size=-1)),
        (desk.admin.ListPromptSets, admin_service_pb2.ListPromptSetsRequest(page_size=-1)),
        (desk.admin.ListWorkers, admin_service_pb2.ListWorkersRequest(page_size=-1)),
    )
    for stub, request in lists:
        with pytest.raises(grpc.RpcError) as caught:
            stub(request, timeout=5)
        assert str(from_rpc_error(caught.value)) == "page_size must not be negative; it is -1."


def test_lists_come_in_pages(desk: Desk) -> None:
    for name in ("p1", "p2", "p3"):
        desk.create_pool(name=name)
    first = desk.exchange.ListPools(exchange_service_pb2.ListPoolsRequest(page_size=2), timeout=5)
    second = desk.exchange.ListPools(
        exchange_service_pb2.ListPoolsRequest(page_size=2, page_token=first.next_page_token), timeout=5
    )
    assert [pool.name for pool in first.pools] == ["pools/p1", "pools/p2"]
    assert [pool.name for pool in second.pools] == ["pools/p3"]
    assert second.next_page_token == ""
