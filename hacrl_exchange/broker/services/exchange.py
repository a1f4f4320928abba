"""ExchangeService: what agents call. Delivery streams are in delivery.py."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from hacrl_exchange import codec
from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import exchange_service_pb2_grpc, pool_pb2, rollout_pb2, step_pb2
from hacrl_exchange.broker.broker import Broker, Pool
from hacrl_exchange.broker.core.records import Ack, Join, Leave, Touch
from hacrl_exchange.broker.core.state import Member, OpenStep
from hacrl_exchange.broker.interceptors import Context, Identities
from hacrl_exchange.broker.services import delivery
from hacrl_exchange.broker.services.publishing import Publishing
from hacrl_exchange.broker.services.requests import agent_id, bare_id, page, wait_seconds
from hacrl_exchange.errors import (
    InvalidRequestError,
    NotJoinedError,
    PoolEndedError,
    StepNotFoundError,
    StepRetiredError,
)
from hacrl_exchange.types import StepState

PROTOCOL_REVISION = 1
FEATURES = ("lockstep",)
_SCANNED_STEPS = 256
"""Rosters that one AwaitStep looks through; the answer says where to go on."""
_MAX_MODEL_SIZE = 512


class ExchangeService(exchange_service_pb2_grpc.ExchangeServiceServicer):
    """Answers agents and readers."""

    def __init__(self, broker: Broker, identities: Identities, *, gate_threads: ThreadPoolExecutor) -> None:
        self._broker = broker
        self._identities = identities
        self._publishing = Publishing(limits=broker.limits, threads=gate_threads)

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        limits = self._broker.limits
        return pb.GetServerInfoResponse(
            protocol_revision=PROTOCOL_REVISION,
            server_version=version("hacrl-exchange"),
            features=FEATURES,
            compressions=[rollout_pb2.COMPRESSION_NONE, rollout_pb2.COMPRESSION_ZSTD],
            element_types=[
                rollout_pb2.ELEMENT_TYPE_U32,
                rollout_pb2.ELEMENT_TYPE_U32_SPLIT,
                rollout_pb2.ELEMENT_TYPE_F16,
                rollout_pb2.ELEMENT_TYPE_F32,
            ],
            limits=pb.ServerLimits(
                max_message_size=limits.max_message_size,
                max_groups_per_publish=limits.max_groups_per_publish,
                max_group_stored_size=limits.max_group_stored_size,
                max_part_decoded_size=limits.max_part_decoded_size,
                max_meta_size=limits.max_meta_size,
                max_tokens=limits.max_tokens,
                max_wait=codec.duration_to_proto(limits.max_wait_seconds),
            ),
            server_time=Timestamp(seconds=int(time.time())),
        )

    async def GetPool(self, request: pb.GetPoolRequest, context: Context) -> pb.GetPoolResponse:
        pool = self._pool(request.name, field="name")
        state = pool.runtime.state
        response = pb.GetPoolResponse(
            pool=pool_message(pool),
            last_step=state.last_step,
            open_steps=sorted(state.open_steps),
            accepted_count=state.accepted_count,
            scored_count=state.scored_count,
            unscored_count=state.unscored_count,
            pending_count=state.accepted_count - state.scored_count - state.unscored_count,
        )
        await pool.runtime.durable()
        return response

    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:
        pools = self._broker.pools()
        chosen, token = page(request, [pool.runtime.name for pool in pools], pools)
        return pb.ListPoolsResponse(pools=[pool_message(pool) for pool in chosen], next_page_token=token)

    async def ListMembers(self, request: pb.ListMembersRequest, context: Context) -> pb.ListMembersResponse:
        pool = self._pool(request.parent, field="parent")
        members = pool.runtime.state.members
        names = sorted(members)
        chosen, token = page(request, names, names)
        response = pb.ListMembersResponse(
            members=[member_message(pool, members[name]) for name in chosen], next_page_token=token
        )
        await pool.runtime.durable()
        return response

    async def JoinPool(self, request: pb.JoinPoolRequest, context: Context) -> pb.JoinPoolResponse:
        pool = self._pool(request.pool, field="pool")
        agent = agent_id(request.agent, field="agent")
        if not 1 <= len(request.instance.encode()) <= 128:
            raise InvalidRequestError("instance must be 1 to 128 bytes, e.g. a UUID.", field="instance")
        if request.model.ByteSize() > _MAX_MODEL_SIZE:
            raise InvalidRequestError(f"model must be at most {_MAX_MODEL_SIZE} bytes.", field="model")
        pool.runtime.apply(
            Join(
                agent=agent,
                principal=self._identities.principal(context),
                instance=request.instance,
                model=codec.model_spec_from_proto(request.model),
            )
        )
        state = pool.runtime.state
        response = pb.JoinPoolResponse(
            member=member_message(pool, state.members[agent]),
            pool=pool_message(pool),
            last_step=state.last_step,
            open_steps=[
                open_step_message(pool, step, agent=agent)
                for _, step in sorted(state.open_steps.items())
                if agent in step.roster
            ],
        )
        await pool.runtime.durable()
        return response

    async def LeavePool(self, request: pb.LeavePoolRequest, context: Context) -> pb.LeavePoolResponse:
        pool = self._pool(request.pool, field="pool")
        await pool.runtime.submit(Leave(agent=request.caller.agent, session=request.caller.session))
        return pb.LeavePoolResponse()

    async def AwaitStep(self, request: pb.AwaitStepRequest, context: Context) -> pb.AwaitStepResponse:
        pool = self._pool(request.pool, field="pool")
        runtime = pool.runtime
        until = time.monotonic() + wait_seconds(request.wait, limit=self._broker.limits.max_wait_seconds)
        touch(pool, request.caller)
        if request.after_step < 0:
            raise InvalidRequestError("after_step must not be negative.", field="after_step")
        after = max(request.after_step, runtime.state.retired_through)
        while True:
            await runtime.durable()  # what closed in memory is on disk from here on
            last_step = runtime.state.last_step
            through = min(last_step, after + _SCANNED_STEPS)
            step = await self._step_with(pool, request.caller.agent, after, through)
            if step is not None:
                await runtime.durable()
                return pb.AwaitStepResponse(step=step, after_step=step.number)
            after = through
            if through < last_step:
                return pb.AwaitStepResponse(after_step=after)
            max_steps = runtime.state.spec.lockstep.max_steps
            if max_steps and runtime.state.last_step >= max_steps:
                raise PoolEndedError(
                    f"Pool {runtime.name} ended with step {max_steps}; no later step will open.",
                    pool=runtime.name,
                    step=max_steps,
                )
            remaining = until - time.monotonic()
            if remaining <= 0 or (
                runtime.state.last_step == last_step and not await runtime.changed(timeout_seconds=remaining)
            ):
                return pb.AwaitStepResponse(after_step=after)

    async def PublishGroups(
        self, request: pb.PublishGroupsRequest, context: Context
    ) -> pb.PublishGroupsResponse:
        pool = self._pool(request.pool, field="pool")
        touch(pool, request.caller)
        return await self._publishing.publish(pool, request)

    async def AwaitManifest(
        self, request: pb.AwaitManifestRequest, context: Context
    ) -> pb.AwaitManifestResponse:
        pool = self._pool(request.pool, field="pool")
        runtime = pool.runtime
        until = time.monotonic() + wait_seconds(request.wait, limit=self._broker.limits.max_wait_seconds)
        touch(pool, request.caller, optional=True)
        check_step(pool, request.step)
        while request.step in runtime.state.open_steps:
            remaining = until - time.monotonic()
            if remaining <= 0 or not await runtime.changed(timeout_seconds=remaining):
                return pb.AwaitManifestResponse()
        await runtime.durable()
        principal = self._identities.principal(context)
        manifest = await delivery.manifest(pool, request.step, caller=request.caller, principal=principal)
        return pb.AwaitManifestResponse(manifest=manifest)

    async def StreamGroups(
        self, request: pb.StreamGroupsRequest, context: Context
    ) -> AsyncIterator[pb.StreamGroupsResponse]:
        pool = self._pool(request.pool, field="pool")
        touch(pool, request.caller, optional=True)
        check_step(pool, request.step)
        await pool.runtime.durable()
        principal = self._identities.principal(context)
        async for message in delivery.groups(pool, request, principal=principal, limits=self._broker.limits):
            yield message

    async def StreamOwnGroups(
        self, request: pb.StreamOwnGroupsRequest, context: Context
    ) -> AsyncIterator[pb.StreamOwnGroupsResponse]:
        pool = self._pool(request.pool, field="pool")
        touch(pool, request.caller)
        check_step(pool, request.step)
        await pool.runtime.durable()
        async for message in delivery.own_groups(pool, request, limits=self._broker.limits):
            yield message

    async def AckStep(self, request: pb.AckStepRequest, context: Context) -> pb.AckStepResponse:
        pool = self._pool(request.pool, field="pool")
        caller = request.caller
        if request.step < 1:
            raise InvalidRequestError(f"step must be at least 1; it is {request.step}.", field="step")
        await pool.runtime.submit(Ack(agent=caller.agent, session=caller.session, step=request.step))
        return pb.AckStepResponse()

    def _pool(self, name: str, *, field: str) -> Pool:
        return self._broker.pool(bare_id(name, collection="pools", field=field))

    async def _step_with(self, pool: Pool, agent: str, after: int, through: int) -> step_pb2.Step | None:
        """The first step later than `after`, up to `through`, with the agent on its roster."""
        closed = [
            number for number in range(after + 1, through + 1) if number not in pool.runtime.state.open_steps
        ]
        found = await pool.history.first_with(agent, closed) if closed else None
        for number in sorted(pool.runtime.state.open_steps):
            step = pool.runtime.state.open_steps[number]
            if after < number <= through and agent in step.roster and (found is None or number < found):
                return open_step_message(pool, step, agent=agent)
        if found is None:
            return None
        return await delivery.closed_step_message(pool, found, agent=agent)


def touch(pool: Pool, caller: pb.Caller, *, optional: bool = False) -> None:
    """Checks a caller's session and brings an AWAY member back.

    Raises:
        InvalidRequestError: there is no caller, and the call needs one.
        NotJoinedError, SessionSupersededError: as their names say.
    """
    if not caller.agent:
        if optional:
            return
        raise InvalidRequestError(
            "caller.agent is missing; join first and carry the session.", field="caller"
        )
    if caller.session < 1:
        raise NotJoinedError(
            f"Agent {caller.agent} calls without a session; join pool {pool.runtime.name} first.",
            agent=caller.agent,
        )
    pool.runtime.apply(Touch(agent=caller.agent, session=caller.session))


def check_step(pool: Pool, step: int) -> None:
    """Refuses steps that were not opened yet, or whose bodies are gone.

    Raises:
        StepNotFoundError, StepRetiredError: as their names say.
    """
    state = pool.runtime.state
    if not 1 <= step <= state.last_step:
        raise StepNotFoundError(
            f"Pool {state.pool} has not opened step {step}; its newest is {state.last_step}.",
            pool=state.pool,
            step=step,
        )
    if step <= state.retired_through:
        raise StepRetiredError(
            f"Step {step} of pool {state.pool} was retired; the oldest kept is {state.retired_through + 1}.",
            pool=state.pool,
            step=step,
        )


def pool_message(pool: Pool) -> pool_pb2.Pool:
    """A pool on the wire."""
    state = pool.runtime.state
    lockstep = state.spec.lockstep
    steps_per_epoch = state.prompt_count // lockstep.prompts_per_step
    return pool_pb2.Pool(
        name=f"pools/{state.pool}",
        spec=codec.pool_spec_to_proto(state.spec),
        create_time=codec.timestamp_to_proto(state.create_time_us),
        prompts_repeat=not 0 < lockstep.max_steps <= steps_per_epoch,
    )


def member_message(pool: Pool, member: Member) -> pool_pb2.Member:
    """A member on the wire."""
    return pool_pb2.Member(
        name=f"pools/{pool.runtime.name}/agents/{member.agent}",
        principal=member.principal,
        session=member.session,
        state=pool_pb2.MemberState.ValueType(member.state.value),
        model=codec.model_spec_to_proto(member.model),
        acked_step=member.acked_step,
    )


def open_step_message(pool: Pool, step: OpenStep, *, agent: str) -> step_pb2.Step:
    """An open step as one agent sees it."""
    left_us = 0
    if step.state is StepState.PUBLISHING:
        timeout_us = round(pool.runtime.state.spec.lockstep.publish_timeout_seconds * 1e6)
        left_us = min(max(0, step.open_time_us + timeout_us - pool.runtime.now_us()), timeout_us)
    return step_pb2.Step(
        name=f"pools/{pool.runtime.name}/steps/{step.step}",
        number=step.step,
        state=step_pb2.StepState.ValueType(step.state.value),
        prompts=[pool.prompts.prompt(prompt_id) for prompt_id in step.prompt_ids],
        roster=step.roster,
        publish_remaining=Duration(seconds=left_us // 1_000_000, nanos=left_us % 1_000_000 * 1000),
        committed_prompt_ids=step.committed(agent),
    )
