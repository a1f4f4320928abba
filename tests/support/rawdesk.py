"""Raw stubs to a real broker and well-formed groups, for integration tests below the SDK."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc

from hacrl_exchange import codec
from hacrl_exchange._pb import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    exchange_service_pb2,
    exchange_service_pb2_grpc,
    prompt_pb2,
    rollout_pb2,
    verdict_pb2,
    verification_service_pb2,
    verification_service_pb2_grpc,
)
from hacrl_exchange.types import (
    FinishReason,
    Group,
    Lockstep,
    PolicyVersion,
    PoolSpec,
    RevealRule,
    Rollout,
    Slot,
    VerificationPlan,
    VerifierUse,
)

GROUP_SIZE = 2
FINGERPRINT = "ab" * 32


def make_group(prompt_id: str, *, seed: int = 0, size: int = GROUP_SIZE) -> Group:
    """A well-formed group; another seed makes another one."""
    rollouts = tuple(
        Rollout(
            text=f"answer {seed} {index}",
            token_count=3,
            logprob_sum=-1.5,
            finish_reason=FinishReason.STOP,
            token_ids=(1 + seed, 2, 3 + index),
            logprobs=(-0.5, -0.25, -0.75),
        )
        for index in range(size)
    )
    version = PolicyVersion(session=1, updates=seed)
    return Group(prompt_id, rollouts, FINGERPRINT, version, version)


@dataclass
class Desk:
    """Raw stubs on one channel, and the few calls every test makes."""

    channel: grpc.Channel
    pool: str = "pools/p"
    sessions: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exchange = exchange_service_pb2_grpc.ExchangeServiceStub(self.channel)
        self.verification = verification_service_pb2_grpc.VerificationServiceStub(self.channel)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(self.channel)

    def create_pool(self, *, prompts: int = 4, name: str = "p", **lockstep: float) -> None:
        """A prompt set and a pool of it; `lockstep` overrides the settings."""
        entries = [
            prompt_pb2.PromptEntry(
                prompt=prompt_pb2.Prompt(
                    prompt_id=f"q{index}", messages=[prompt_pb2.Message(role="user", content=f"{index}+1=")]
                ),
                reference_json=str(index + 1),
            )
            for index in range(prompts)
        ]
        request = admin_service_pb2.CreatePromptSetRequest(
            name=f"promptSets/{name}-prompts", entries=entries, prompt_count=prompts
        )
        self.admin.CreatePromptSet(iter([request]), timeout=10)
        settings: dict[str, float] = {"prompts_per_step": prompts, "min_members": 1, **lockstep}
        spec = PoolSpec(
            prompt_set=f"{name}-prompts",
            group_size=GROUP_SIZE,
            plan=VerificationPlan((VerifierUse("exact_match"),), item_timeout_seconds=5.0),
            lockstep=Lockstep(**settings),  # type: ignore[arg-type]  # ints and floats by name
            reveal=RevealRule.GIVE_TO_GET,
        )
        self.admin.CreatePool(
            admin_service_pb2.CreatePoolRequest(name=f"pools/{name}", spec=codec.pool_spec_to_proto(spec)),
            timeout=10,
        )

    def join(self, agent: str, *, instance: str = "") -> exchange_service_pb2.JoinPoolResponse:
        """Joins and remembers the session."""
        response = self.exchange.JoinPool(
            exchange_service_pb2.JoinPoolRequest(pool=self.pool, agent=agent, instance=instance or agent),
            timeout=10,
        )
        self.sessions[agent] = response.member.session
        return response

    def caller(self, agent: str) -> exchange_service_pb2.Caller:
        """The caller of an agent that joined."""
        return exchange_service_pb2.Caller(agent=agent, session=self.sessions[agent])

    def await_step(
        self, agent: str, *, after: int = 0, wait: float = 5.0
    ) -> exchange_service_pb2.AwaitStepResponse:
        """Waits for the agent's next step."""
        return self.exchange.AwaitStep(
            exchange_service_pb2.AwaitStepRequest(
                pool=self.pool,
                caller=self.caller(agent),
                after_step=after,
                wait=codec.duration_to_proto(wait),
            ),
            timeout=30,
        )

    def encoded(self, agent: str, prompt_id: str, *, step: int = 1, seed: int = 0) -> rollout_pb2.Group:
        """A group on the wire."""
        name = codec.group_name(self.pool.partition("/")[2], Slot(step, prompt_id, agent))
        return codec.encode_group(make_group(prompt_id, seed=seed), name=name)

    def publish(self, agent: str, *groups: rollout_pb2.Group) -> exchange_service_pb2.PublishGroupsResponse:
        """Publishes groups of one agent."""
        return self.exchange.PublishGroups(
            exchange_service_pb2.PublishGroupsRequest(
                pool=self.pool, caller=self.caller(agent), groups=groups
            ),
            timeout=30,
        )

    def manifest(
        self, step: int, *, agent: str = "", wait: float = 10.0
    ) -> exchange_service_pb2.AwaitManifestResponse:
        """Waits for a manifest."""
        return self.exchange.AwaitManifest(
            exchange_service_pb2.AwaitManifestRequest(
                pool=self.pool,
                caller=self.caller(agent) if agent else None,
                step=step,
                wait=codec.duration_to_proto(wait),
            ),
            timeout=30,
        )

    def status(self) -> exchange_service_pb2.GetPoolResponse:
        """The pool and its counts."""
        return self.exchange.GetPool(exchange_service_pb2.GetPoolRequest(name=self.pool), timeout=10)

    def register_worker(self, *, verifier: str = "exact_match") -> str:
        """A worker's id."""
        return self.verification.RegisterWorker(
            verification_service_pb2.RegisterWorkerRequest(
                identity="test",
                verifiers=[verification_service_pb2.OfferedVerifier(verifier=verifier, version="1")],
            ),
            timeout=10,
        ).worker

    def acquire(
        self, worker: str, *, most: int = 64, wait: float = 5.0
    ) -> verification_service_pb2.AcquireLeaseResponse:
        """A lease."""
        return self.verification.AcquireLease(
            verification_service_pb2.AcquireLeaseRequest(
                worker=worker, max_groups=most, wait=codec.duration_to_proto(wait)
            ),
            timeout=30,
        )

    def report(
        self, worker: str, lease: verification_service_pb2.AcquireLeaseResponse, *, score: float = 1.0
    ) -> verification_service_pb2.ReportVerdictsResponse:
        """Scores every rollout of a lease alike."""
        reports = [
            verification_service_pb2.VerdictReport(
                group=leased.group,
                generation=leased.generation,
                verifier=verdict_pb2.VerifierIdentity(
                    verifier=leased.verifier, version="1", config_digest=bytes(32)
                ),
                verdicts=[
                    verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=score))
                    for _ in leased.envelope.rollouts
                ],
            )
            for leased in lease.groups
        ]
        return self.verification.ReportVerdicts(
            verification_service_pb2.ReportVerdictsRequest(worker=worker, lease=lease.lease, reports=reports),
            timeout=30,
        )

    def verify_all(self, worker: str, count: int) -> None:
        """Leases and scores until `count` groups are done."""
        done = 0
        while done < count:
            lease = self.acquire(worker)
            assert lease.groups, "no group came within the wait"
            for result in self.report(worker, lease).results:
                assert result.error.code == 0, result.error.message
            done += len(lease.groups)
