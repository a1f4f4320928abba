"""A broker of a few lines on a real socket, that does what a test tells it to."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from hacrl_exchange import codec
from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import exchange_service_pb2_grpc, pool_pb2, rollout_pb2, step_pb2, verdict_pb2
from hacrl_exchange.errors import ExchangeError, PoolEndedError, SlotTakenError
from hacrl_exchange.status import DETAILS_KEY, grpc_code, to_status
from hacrl_exchange.types import (
    Group,
    Lockstep,
    Message,
    PolicyVersion,
    PoolSpec,
    Prompt,
    Receipt,
    Rollout,
    Slot,
    VerificationPlan,
    VerifierUse,
)

SPEC = PoolSpec("set", 2, VerificationPlan((VerifierUse("exact_match"),)), Lockstep(prompts_per_step=3))
AGENTS = ("a", "b")


def make_group(prompt_id: str, text: str = "four", **changes: Any) -> Group:
    """A group of two rollouts."""
    rollouts = tuple(
        Rollout(f"{text} {n}", 2, float("nan"), token_ids=[n, n], logprobs=[-0.5, -0.25]) for n in range(2)
    )
    fields = {
        "prompt_id": prompt_id,
        "rollouts": rollouts,
        "tokenizer_fingerprint": "ab" * 32,
        "policy_start": PolicyVersion(1, 0),
        "policy_end": PolicyVersion(1, 0),
    }
    return Group(**{**fields, **changes})


class FakeBroker(exchange_service_pb2_grpc.ExchangeServiceServicer):
    """Keeps what agents publish. Every group of a closed step is scored 1.

    `fail[rpc]` holds errors for the next calls, `refuse[prompt_id]` for the next groups of that prompt, and
    `break_after` the numbers of groups after which the next streams break.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fail: dict[str, deque[ExchangeError | grpc.StatusCode]] = defaultdict(deque)
        self.refuse: dict[str, deque[ExchangeError]] = defaultdict(deque)
        self.break_after: deque[int] = deque()
        self.steps: list[step_pb2.Step] = []
        self.stored: dict[str, rollout_pb2.Group] = {}
        self.ended = True
        self.on_manifest: Callable[[step_pb2.Manifest], None] = lambda manifest: None
        self.on_delivery: Callable[[pb.DeliveredGroup], None] = lambda delivered: None
        self.cancelled = threading.Event()
        self.waiting = threading.Event()
        self.limits = pb.ServerLimits(max_message_size=8 << 20, max_groups_per_publish=64)

    def add_step(
        self, number: int, *, state: step_pb2.StepState.ValueType = step_pb2.STEP_STATE_PUBLISHING
    ) -> None:
        """A step with prompts p0, p1, p2 and both agents."""
        prompts = [Prompt(f"p{n}", (Message("user", "2+2?"),)) for n in range(3)]
        self.steps.append(
            step_pb2.Step(
                number=number, state=state, prompts=map(codec.prompt_to_proto, prompts), roster=AGENTS
            )
        )

    def store(self, group: Group, *, agent: str = "a", step: int = 1) -> None:
        """A group that the broker has already."""
        name = codec.group_name("math", Slot(step, group.prompt_id, agent))
        self.stored[name] = codec.encode_group(group, name=name)

    def requests(self, rpc: str) -> list[Any]:
        """What came in for an RPC."""
        return [request for name, request in self.calls if name == rpc]

    def _enter(self, rpc: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append((rpc, request))
        if self.fail[rpc]:
            _abort(context, self.fail[rpc].popleft())

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        self._enter("GetServerInfo", request, context)
        return pb.GetServerInfoResponse(protocol_revision=1, server_version="fake", limits=self.limits)

    def GetPool(self, request: pb.GetPoolRequest, context: grpc.ServicerContext) -> pb.GetPoolResponse:
        self._enter("GetPool", request, context)
        last = max((step.number for step in self.steps), default=0)
        return pb.GetPoolResponse(pool=_pool(), last_step=last, accepted_count=4, pending_count=4)

    def ListPools(self, request: pb.ListPoolsRequest, context: grpc.ServicerContext) -> pb.ListPoolsResponse:
        self._enter("ListPools", request, context)
        if request.page_token:
            return pb.ListPoolsResponse(pools=[_pool("zebra")])
        return pb.ListPoolsResponse(pools=[_pool()], next_page_token="more")

    def ListMembers(
        self, request: pb.ListMembersRequest, context: grpc.ServicerContext
    ) -> pb.ListMembersResponse:
        self._enter("ListMembers", request, context)
        names = AGENTS[1:] if request.page_token else AGENTS[:1]
        members = [
            pool_pb2.Member(name=f"pools/math/agents/{name}", state=pool_pb2.MEMBER_STATE_ACTIVE)
            for name in names
        ]
        return pb.ListMembersResponse(members=members, next_page_token="" if request.page_token else "more")

    def JoinPool(self, request: pb.JoinPoolRequest, context: grpc.ServicerContext) -> pb.JoinPoolResponse:
        self._enter("JoinPool", request, context)
        opened = [step for step in self.steps if step.state != step_pb2.STEP_STATE_CLOSED]
        return pb.JoinPoolResponse(
            member=pool_pb2.Member(name=f"pools/math/agents/{request.agent}", session=7),
            pool=_pool(),
            last_step=max((step.number for step in self.steps), default=0),
            open_steps=[self._shown(step, request.agent) for step in opened],
        )

    def LeavePool(self, request: pb.LeavePoolRequest, context: grpc.ServicerContext) -> pb.LeavePoolResponse:
        self._enter("LeavePool", request, context)
        return pb.LeavePoolResponse()

    def AwaitStep(self, request: pb.AwaitStepRequest, context: grpc.ServicerContext) -> pb.AwaitStepResponse:
        self._enter("AwaitStep", request, context)
        for step in self.steps:
            if step.number > request.after_step:
                return pb.AwaitStepResponse(step=self._shown(step, request.caller.agent))
        if self.ended:
            _abort(context, PoolEndedError("The pool ended."))
        self._hang(request.wait.seconds, context)
        return pb.AwaitStepResponse()

    def PublishGroups(
        self, request: pb.PublishGroupsRequest, context: grpc.ServicerContext
    ) -> pb.PublishGroupsResponse:
        self._enter("PublishGroups", request, context)
        return pb.PublishGroupsResponse(results=[self._put(group) for group in request.groups])

    def AwaitManifest(
        self, request: pb.AwaitManifestRequest, context: grpc.ServicerContext
    ) -> pb.AwaitManifestResponse:
        self._enter("AwaitManifest", request, context)
        if not self.ended:
            self._hang(request.wait.seconds, context)
            return pb.AwaitManifestResponse()
        manifest = self._manifest(request.step)
        self.on_manifest(manifest)
        return pb.AwaitManifestResponse(manifest=manifest)

    def StreamGroups(
        self, request: pb.StreamGroupsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamGroupsResponse]:
        self._enter("StreamGroups", request, context)
        context.add_callback(self.cancelled.set)
        stop = self.break_after.popleft() if self.break_after else None
        entries = self._entries(request.step)[request.start_entry :]
        for sent, (group, _, _) in enumerate(entries):
            if sent == stop:
                _abort(context, grpc.StatusCode.UNAVAILABLE)
            delivered = pb.DeliveredGroup(
                entry=request.start_entry + sent, group=group, verdict=_verdict(len(group.envelope.rollouts))
            )
            del delivered.group.parts[:]
            for info, stored in zip(group.envelope.parts, group.parts, strict=True):
                if info.kind in request.part_kinds:
                    delivered.group.parts.append(stored)
                    delivered.group.part_kinds.append(info.kind)
            self.on_delivery(delivered)
            yield pb.StreamGroupsResponse(groups=[delivered])

    def StreamOwnGroups(
        self, request: pb.StreamOwnGroupsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.StreamOwnGroupsResponse]:
        self._enter("StreamOwnGroups", request, context)
        for group, _, agent in self._entries(request.step):
            if agent == request.caller.agent:
                own = rollout_pb2.Group()
                own.CopyFrom(group)
                own.part_kinds.extend(info.kind for info in group.envelope.parts)
                yield pb.StreamOwnGroupsResponse(groups=[own])

    def AckStep(self, request: pb.AckStepRequest, context: grpc.ServicerContext) -> pb.AckStepResponse:
        self._enter("AckStep", request, context)
        return pb.AckStepResponse()

    def _hang(self, seconds: float, context: grpc.ServicerContext) -> None:
        """Waits as a long poll does, until the client lets go."""
        gone = threading.Event()
        if context.add_callback(gone.set):
            self.waiting.set()
            gone.wait(seconds)
            if gone.is_set():
                self.cancelled.set()

    def _put(self, group: rollout_pb2.Group) -> pb.PublishResult:
        _, slot = codec.parse_group_name(group.name)
        if self.refuse[slot.prompt_id]:
            return pb.PublishResult(error=to_status(self.refuse[slot.prompt_id].popleft()))
        digest = codec.group_digest(group.envelope)
        held = self.stored.setdefault(group.name, group)
        if codec.group_digest(held.envelope) != digest:
            return pb.PublishResult(error=to_status(SlotTakenError("The slot holds another group.")))
        receipt = Receipt("math", slot, digest, 7, len(group.envelope.rollouts))
        return pb.PublishResult(receipt=codec.receipt_to_proto(receipt))

    def _entries(self, step: int) -> list[tuple[rollout_pb2.Group, str, str]]:
        """Groups of a step with prompt and agent, in manifest order."""
        found = []
        for name, group in self.stored.items():
            _, slot = codec.parse_group_name(name)
            if slot.step == step:
                found.append((group, slot.prompt_id, slot.agent))
        return sorted(found, key=lambda entry: entry[1:])

    def _manifest(self, step: int) -> step_pb2.Manifest:
        prompt_ids = [f"p{n}" for n in range(3)]
        return step_pb2.Manifest(
            step=step,
            outcome=step_pb2.STEP_OUTCOME_COMPLETE,
            quorum_met=True,
            prompt_ids=prompt_ids,
            roster=[
                step_pb2.RosterEntry(
                    agent=agent,
                    principal="local",
                    state=step_pb2.ROSTER_STATE_COMPLETE,
                    counts=[
                        step_pb2.StepCounts(step=step, success_count=3 + n, scored_count=6, total_count=6)
                    ],
                )
                for n, agent in enumerate(AGENTS)
            ],
            entries=[
                step_pb2.ManifestEntry(
                    prompt_index=prompt_ids.index(prompt_id),
                    roster_index=AGENTS.index(agent),
                    digest=codec.group_digest(group.envelope),
                    generation=1,
                )
                for group, prompt_id, agent in self._entries(step)
            ],
            models=[pool_pb2.ModelSpec(model=agent) for agent in AGENTS],
        )

    def _shown(self, step: step_pb2.Step, agent: str) -> step_pb2.Step:
        shown = step_pb2.Step()
        shown.CopyFrom(step)
        shown.committed_prompt_ids.extend(
            prompt_id for _, prompt_id, owner in self._entries(step.number) if owner == agent
        )
        return shown


@pytest.fixture
def broker() -> FakeBroker:
    """The fake; `target` puts it on a socket."""
    return FakeBroker()


@pytest.fixture
def group() -> Callable[..., Group]:
    """Makes groups: test files cannot import from here."""
    return make_group


@pytest.fixture
def target(broker: FakeBroker) -> Iterator[str]:
    """Where the fake serves."""
    server = grpc.server(ThreadPoolExecutor(8))
    exchange_service_pb2_grpc.add_ExchangeServiceServicer_to_server(broker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def _abort(context: grpc.ServicerContext, error: ExchangeError | grpc.StatusCode) -> None:
    if isinstance(error, grpc.StatusCode):
        context.abort(error, f"scripted {error.name}")
    context.set_trailing_metadata(((DETAILS_KEY, to_status(error).SerializeToString()),))
    context.abort(grpc_code(error.code), error.message)


def _pool(name: str = "math") -> pool_pb2.Pool:
    return pool_pb2.Pool(name=f"pools/{name}", spec=codec.pool_spec_to_proto(SPEC))


def _verdict(count: int) -> verdict_pb2.GroupVerdict:
    scored = verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=1.0))
    return verdict_pb2.GroupVerdict(generation=1, verdicts=[scored] * count)
