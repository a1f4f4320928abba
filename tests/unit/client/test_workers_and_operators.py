"""Rules of the clients for workers and operators."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from hacrl_exchange import codec
from hacrl_exchange._pb import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    pool_pb2,
    prompt_pb2,
    rollout_pb2,
    verification_service_pb2_grpc,
)
from hacrl_exchange._pb import verification_service_pb2 as pb
from hacrl_exchange.client import AdminClient, OfferedVerifier, VerdictReport, WorkerClient
from hacrl_exchange.errors import (
    AlreadyVerifiedError,
    DigestMismatchError,
    InternalError,
    UnreachableError,
    WorkerNotFoundError,
)
from hacrl_exchange.status import DETAILS_KEY, to_status
from hacrl_exchange.types import (
    Group,
    Lockstep,
    Message,
    PolicyVersion,
    PoolSpec,
    Prompt,
    PromptEntry,
    Rollout,
    Scored,
    Unscored,
    UnscoredKind,
    VerdictReason,
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

NAME = "pools/math/steps/1/prompts/p/agents/a"
SPEC = PoolSpec("sums", 2, VerificationPlan((VerifierUse("exact_match"),)), Lockstep(prompts_per_step=3))


class FakeDesk(
    verification_service_pb2_grpc.VerificationServiceServicer, admin_service_pb2_grpc.AdminServiceServicer
):
    """Lends one group once, and keeps what is reported and stored."""

    def __init__(self) -> None:
        self.metadata: list[tuple[str, str | bytes]] = []
        self.requests: list[Any] = []
        self.groups: list[pb.LeasedGroup] = []
        self.results: list[pb.ReportResult] = []
        self.known = True
        self.failures = 0

    def RegisterWorker(
        self, request: pb.RegisterWorkerRequest, context: grpc.ServicerContext
    ) -> pb.RegisterWorkerResponse:
        self.requests.append(request)
        self.metadata.extend((key, value) for key, value in context.invocation_metadata())
        return pb.RegisterWorkerResponse(worker="w1", lease_timeout=codec.duration_to_proto(10.0))

    def AcquireLease(
        self, request: pb.AcquireLeaseRequest, context: grpc.ServicerContext
    ) -> pb.AcquireLeaseResponse:
        self.requests.append(request)
        if not self.known:
            status = to_status(WorkerNotFoundError("Register again."))
            context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
            context.abort(grpc.StatusCode.NOT_FOUND, "Register again.")
        groups, self.groups = self.groups, []
        return pb.AcquireLeaseResponse(lease="l1" if groups else "", groups=groups)

    def RenewLease(
        self, request: pb.RenewLeaseRequest, context: grpc.ServicerContext
    ) -> pb.RenewLeaseResponse:
        return pb.RenewLeaseResponse(lease_timeout=codec.duration_to_proto(2.5))

    def ReportVerdicts(
        self, request: pb.ReportVerdictsRequest, context: grpc.ServicerContext
    ) -> pb.ReportVerdictsResponse:
        self.requests.append(request)
        return pb.ReportVerdictsResponse(results=self.results)

    def CreatePromptSet(
        self,
        request_iterator: Iterable[admin_service_pb2.CreatePromptSetRequest],
        context: grpc.ServicerContext,
    ) -> admin_service_pb2.CreatePromptSetResponse:
        requests = list(request_iterator)
        if self.failures:
            self.failures -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        self.requests.extend(requests)
        count = sum(len(request.entries) for request in requests)
        stored = prompt_pb2.PromptSet(name=requests[0].name, digest=b"d" * 32, prompt_count=count)
        return admin_service_pb2.CreatePromptSetResponse(prompt_set=stored)

    def ListPromptSets(
        self, request: admin_service_pb2.ListPromptSetsRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.ListPromptSetsResponse:
        name = f"promptSets/{request.page_token or 'a'}"
        token = "" if request.page_token else "b"
        return admin_service_pb2.ListPromptSetsResponse(
            prompt_sets=[prompt_pb2.PromptSet(name=name)], next_page_token=token
        )

    def CreatePool(
        self, request: admin_service_pb2.CreatePoolRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.CreatePoolResponse:
        pool = pool_pb2.Pool(name=request.name, spec=request.spec)
        return admin_service_pb2.CreatePoolResponse(pool=pool)

    def ListWorkers(
        self, request: admin_service_pb2.ListWorkersRequest, context: grpc.ServicerContext
    ) -> admin_service_pb2.ListWorkersResponse:
        worker = admin_service_pb2.Worker(worker="w1", identity="host:7", verifiers=["math"])
        return admin_service_pb2.ListWorkersResponse(
            workers=[worker], next_page_token="" if request.page_token else "more"
        )


@pytest.fixture
def desk() -> FakeDesk:
    return FakeDesk()


@pytest.fixture
def target(desk: FakeDesk) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    verification_service_pb2_grpc.add_VerificationServiceServicer_to_server(desk, server)
    admin_service_pb2_grpc.add_AdminServiceServicer_to_server(desk, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def leased_group() -> pb.LeasedGroup:
    """A group of two rollouts as a worker gets it: the text alone."""
    version = PolicyVersion(1, 0)
    rollouts = (Rollout("4", 2, -1.0), Rollout("5", 3, -2.0))
    group = codec.encode_group(Group("p", rollouts, "ab" * 32, version, version), name=NAME)
    return pb.LeasedGroup(
        group=NAME,
        generation=1,
        verifier="exact_match",
        item_timeout=codec.duration_to_proto(1.5),
        prompt=prompt_pb2.PromptEntry(prompt=prompt_pb2.Prompt(prompt_id="p"), reference_json='"4"'),
        envelope=group.envelope,
        parts=group.parts,
        part_kinds=[rollout_pb2.PART_KIND_TEXT],
    )


def test_a_worker_shows_its_key_and_what_it_offers(desk: FakeDesk, target: str) -> None:
    with WorkerClient(target, key="secret") as client:
        registration = client.register("host:7", offered=[OfferedVerifier("math", "1.0", needs_tokens=True)])

    assert (registration.worker, registration.lease_timeout_seconds) == ("w1", 10.0)
    assert ("hacrl-worker-key", "secret") in desk.metadata
    (request,) = desk.requests
    assert request.identity == "host:7"
    assert request.verifiers[0].needs_tokens


def test_a_lease_brings_decoded_groups(desk: FakeDesk, target: str) -> None:
    desk.groups = [leased_group()]
    with WorkerClient(target) as client:
        lease = client.acquire("w1", max_groups=4, wait_seconds=0.5)
        nothing = client.acquire("w1")

    assert nothing is None
    assert lease is not None
    assert lease.lease == "l1"
    (group,) = lease.groups
    assert (group.name, group.verifier, group.config_json) == (NAME, "exact_match", "{}")
    assert group.item_timeout_seconds == 1.5
    assert group.prompt.reference_json == '"4"'
    assert [rollout.text for rollout in group.rollouts] == ["4", "5"]
    assert group.problem is None
    assert (desk.requests[0].max_groups, desk.requests[0].wait.nanos) == (4, 500_000_000)


def test_a_group_that_does_not_decode_is_a_problem_of_that_group_alone(desk: FakeDesk, target: str) -> None:
    broken = leased_group()
    broken.parts[0] = bytes(len(broken.parts[0]))
    desk.groups = [broken, leased_group()]
    with WorkerClient(target) as client:
        lease = client.acquire("w1", max_groups=2)

    assert lease is not None
    assert isinstance(lease.groups[0].problem, DigestMismatchError)
    assert (lease.groups[0].rollouts, lease.groups[0].rollout_count) == ((), 2)
    assert lease.groups[1].problem is None


def test_a_forgotten_worker_is_told(desk: FakeDesk, target: str) -> None:
    desk.known = False
    with WorkerClient(target) as client, pytest.raises(WorkerNotFoundError, match=r"^Register again\.$"):
        client.acquire("w1")


def test_a_worker_makes_one_attempt() -> None:
    with WorkerClient("127.0.0.1:1") as client, pytest.raises(UnreachableError):
        client.renew("w1", lease="l1")


def test_reports_are_answered_one_by_one(desk: FakeDesk, target: str) -> None:
    desk.results = [
        pb.ReportResult(),
        pb.ReportResult(error=to_status(AlreadyVerifiedError("It has verdicts."))),
    ]
    identity = VerifierIdentity("exact_match", "1", b"c" * 32)
    verdicts = (Scored(1.0), Unscored(UnscoredKind.TIMEOUT, VerdictReason.ITEM_DEADLINE))
    report = VerdictReport(NAME, 1, identity, verdicts, details=("", "too slow"))
    with WorkerClient(target) as client:
        first, second = client.report("w1", lease="l1", reports=[report, report])
        remaining = client.renew("w1", lease="l1")
        with pytest.raises(InternalError, match=r"^The broker answered 2 results to 1 reports\.$"):
            client.report("w1", lease="l1", reports=[report])

    assert first is None
    assert isinstance(second, AlreadyVerifiedError)
    assert remaining == 2.5
    sent = desk.requests[0].reports[0]
    assert tuple(codec.verdict_from_proto(verdict) for verdict in sent.verdicts) == verdicts
    assert list(sent.details) == ["", "too slow"]


def test_a_prompt_set_travels_in_messages_of_a_mebibyte(desk: FakeDesk, target: str) -> None:
    desk.failures = 1
    entries = [PromptEntry(Prompt(f"p{n}", (Message("user", "x" * 300_000),)), "4") for n in range(10)]
    with AdminClient(target) as admin:
        stored = admin.create_prompt_set("sums", iter(entries))

    assert (stored.name, stored.prompt_count) == ("sums", 10)
    assert [request.name for request in desk.requests] == ["promptSets/sums", "", "", ""]
    assert max(request.ByteSize() for request in desk.requests) <= 1 << 20
    sent = [codec.prompt_entry_from_proto(entry) for request in desk.requests for entry in request.entries]
    assert sent == entries


def test_an_empty_prompt_set_is_left_to_the_broker_to_refuse(desk: FakeDesk, target: str) -> None:
    with AdminClient(target) as admin:
        admin.create_prompt_set("sums", [])

    assert [request.name for request in desk.requests] == ["promptSets/sums"]


def test_an_operator_sees_pools_prompt_sets_and_workers(desk: FakeDesk, target: str) -> None:
    with AdminClient(target) as admin:
        assert admin.create_pool("math", SPEC).spec == SPEC
        assert [one.name for one in admin.prompt_sets()] == ["a", "b"]
        assert [one.identity for one in admin.workers()] == ["host:7", "host:7"]
