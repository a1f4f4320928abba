"""What the broker tells about itself, as frozen dataclasses: limits, pools, members, prompt sets, workers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from hacrl_exchange._pb import admin_service_pb2, exchange_service_pb2, pool_pb2, prompt_pb2
from hacrl_exchange.codec import (
    duration_from_proto,
    enum_from_proto,
    model_spec_from_proto,
    parse_agent_name,
    parse_pool_name,
    parse_prompt_set_name,
    pool_spec_from_proto,
)
from hacrl_exchange.types import MemberState, ModelSpec, PoolSpec


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one call may carry. Sizes in bytes; 0 where the server states no limit."""

    max_message_size: int
    max_groups_per_publish: int
    max_group_stored_size: int
    max_part_decoded_size: int
    max_meta_size: int
    max_tokens: int
    max_wait_seconds: float


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a broker speaks and allows."""

    protocol_revision: int
    server_version: str
    features: tuple[str, ...]
    limits: ServerLimits
    server_time: datetime


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """A pool and what it is."""

    name: str
    spec: PoolSpec
    create_time: datetime
    prompts_repeat: bool


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """Where a pool stands. Counts are of rollouts: accepted = scored + unscored + pending."""

    name: str
    spec: PoolSpec
    create_time: datetime
    prompts_repeat: bool
    last_step: int
    open_steps: tuple[int, ...]
    accepted_count: int
    scored_count: int
    unscored_count: int
    pending_count: int


@dataclass(frozen=True, slots=True)
class MemberInfo:
    """One agent of a pool; `model` is what its owner says of it."""

    agent: str
    principal: str
    session: int
    state: MemberState
    model: ModelSpec
    acked_step: int


@dataclass(frozen=True, slots=True)
class PromptSetInfo:
    """An immutable prompt set; the digest is its version."""

    name: str
    digest: bytes
    prompt_count: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker that is connected now."""

    worker: str
    identity: str
    verifiers: tuple[str, ...]
    leased_group_count: int


def server_info(response: exchange_service_pb2.GetServerInfoResponse) -> ServerInfo:
    """Reads GetServerInfo's answer."""
    limits = response.limits
    return ServerInfo(
        protocol_revision=response.protocol_revision,
        server_version=response.server_version,
        features=tuple(response.features),
        limits=ServerLimits(
            max_message_size=limits.max_message_size,
            max_groups_per_publish=limits.max_groups_per_publish,
            max_group_stored_size=limits.max_group_stored_size,
            max_part_decoded_size=limits.max_part_decoded_size,
            max_meta_size=limits.max_meta_size,
            max_tokens=limits.max_tokens,
            max_wait_seconds=duration_from_proto(limits.max_wait),
        ),
        server_time=response.server_time.ToDatetime(tzinfo=UTC),
    )


def pool_info(pool: pool_pb2.Pool) -> PoolInfo:
    """Reads a pool."""
    return PoolInfo(
        name=parse_pool_name(pool.name),
        spec=pool_spec_from_proto(pool.spec),
        create_time=pool.create_time.ToDatetime(tzinfo=UTC),
        prompts_repeat=pool.prompts_repeat,
    )


def pool_status(response: exchange_service_pb2.GetPoolResponse) -> PoolStatus:
    """Reads GetPool's answer."""
    pool = pool_info(response.pool)
    return PoolStatus(
        name=pool.name,
        spec=pool.spec,
        create_time=pool.create_time,
        prompts_repeat=pool.prompts_repeat,
        last_step=response.last_step,
        open_steps=tuple(response.open_steps),
        accepted_count=response.accepted_count,
        scored_count=response.scored_count,
        unscored_count=response.unscored_count,
        pending_count=response.pending_count,
    )


def member_info(member: pool_pb2.Member) -> MemberInfo:
    """Reads a member."""
    return MemberInfo(
        agent=parse_agent_name(member.name)[1],
        principal=member.principal,
        session=member.session,
        state=enum_from_proto(MemberState, member.state),
        model=model_spec_from_proto(member.model),
        acked_step=member.acked_step,
    )


def prompt_set_info(prompt_set: prompt_pb2.PromptSet) -> PromptSetInfo:
    """Reads a prompt set."""
    return PromptSetInfo(parse_prompt_set_name(prompt_set.name), prompt_set.digest, prompt_set.prompt_count)


def worker_info(worker: admin_service_pb2.Worker) -> WorkerInfo:
    """Reads a worker."""
    return WorkerInfo(worker.worker, worker.identity, tuple(worker.verifiers), worker.leased_group_count)
