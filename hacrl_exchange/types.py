"""What goes in and out of the exchange, as frozen dataclasses.

Nothing here does I/O or knows protobuf, torch or gRPC. Sizes are in bytes, durations in seconds.
Token ids and log-probs are sequences of numbers: numpy arrays on delivery, anything on publishing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias


class UnscoredKind(enum.Enum):
    """Why a rollout has no score. None of these is ever a number."""

    NOT_APPLICABLE = "not_applicable"
    VERIFIER_ERROR = "verifier_error"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"


class VerdictReason(enum.Enum):
    """The public reason of an outcome; never derived from the reference. Values as in verdict.proto."""

    UNSPECIFIED = 0
    NOT_APPLICABLE = 1
    RAISED = 2
    BAD_RESULT = 3
    CRASHED = 4
    ITEM_DEADLINE = 5
    ATTEMPTS_EXHAUSTED = 6
    VERIFY_DEADLINE = 7
    NO_WORKER = 8
    VERIFIER_UNAVAILABLE = 9


@dataclass(frozen=True, slots=True)
class Scored:
    """A verifier gave a finite score. 0.0 is a real zero: the verifier said so."""

    score: float
    components: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unscored:
    """No score exists. There is no way from here to a number."""

    kind: UnscoredKind
    reason: VerdictReason = VerdictReason.UNSPECIFIED


Verdict: TypeAlias = Scored | Unscored


class LogprobOrigin(enum.Enum):
    """Which engine computed the log-probs. Values as in rollout.proto."""

    TRAINER = 1
    SAMPLER = 2


class FinishReason(enum.Enum):
    """Why a response ended. Values as in rollout.proto."""

    STOP = 1
    LENGTH = 2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What agents see of a prompt."""

    prompt_id: str
    messages: tuple[Message, ...]
    source: str = ""


@dataclass(frozen=True, slots=True)
class PromptEntry:
    """A prompt with its private reference, a JSON text."""

    prompt: Prompt
    reference_json: str = "null"


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How responses were sampled. The paper samples at temperature 1 and top_p 1."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """Which state of a policy produced a text: optimizer updates counted within a session."""

    session: int
    updates: int


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response.

    `token_ids` (length T) and `logprobs` (length T) exclude a trailing end token and may be absent.
    `logprob_sum` is the sum of the T log-probs, computed from `logprobs` when not given on publishing.
    A response that is only the end token has text "" and `terminal_only`, token_count 1.
    """

    text: str
    token_count: int
    logprob_sum: float
    finish_reason: FinishReason = FinishReason.STOP
    terminal_only: bool = False
    token_ids: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The rollouts of one agent for one prompt under one policy version; what an agent publishes."""

    prompt_id: str
    rollouts: tuple[Rollout, ...]
    tokenizer_fingerprint: str
    policy_start: PolicyVersion
    policy_end: PolicyVersion
    sampling: SamplingParameters = SamplingParameters()
    logprob_origin: LogprobOrigin = LogprobOrigin.TRAINER


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a group belongs: the idempotency key."""

    step: int
    prompt_id: str
    agent: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proves that a group is durable."""

    pool: str
    slot: Slot
    digest: bytes
    session: int
    rollout_count: int


@dataclass(frozen=True, slots=True)
class VerifierIdentity:
    """Which code and configuration gave a verdict."""

    verifier: str
    version: str
    config_digest: bytes


@dataclass(frozen=True, slots=True)
class VerifiedGroup:
    """A delivered group: who made it, its rollouts, and one verdict per rollout."""

    agent: str
    group: Group
    digest: bytes
    generation: int
    verifier: VerifierIdentity | None
    verdicts: tuple[Verdict, ...]


class StepState(enum.Enum):
    """Where a step stands. Values as in step.proto."""

    PUBLISHING = 1
    VERIFYING = 2
    CLOSED = 3


class StepOutcome(enum.Enum):
    """How a step ended. Values as in step.proto."""

    COMPLETE = 1
    QUORUM = 2
    DEGRADED = 3


class RosterState(enum.Enum):
    """What became of a member of a step's roster. Values as in step.proto."""

    COMPLETE = 1
    LATE = 2
    LEFT = 3


class MemberState(enum.Enum):
    """Where a member stands. Values as in pool.proto."""

    ACTIVE = 1
    AWAY = 2
    LEFT = 3


@dataclass(frozen=True, slots=True)
class StepCounts:
    """Integer counts of one agent in one step; ratios are computed on reading."""

    step: int
    success_count: int
    scored_count: int
    total_count: int


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One member of a closed step's roster. `counts` is its capability window, this step last."""

    agent: str
    principal: str
    state: RosterState
    counts: tuple[StepCounts, ...]
    withheld: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a member says of its model; shown to the others, not believed."""

    model: str = ""
    architecture: str = ""
    parameters: int = 0
    tokenizer_fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class VerifierUse:
    """One verifier of a plan with its configuration, a JSON object."""

    verifier: str
    config_json: str = "{}"


@dataclass(frozen=True, slots=True)
class VerificationPlan:
    """How rollouts are judged."""

    verifiers: tuple[VerifierUse, ...]
    success_threshold: float = 1.0
    item_timeout_seconds: float = 10.0
    max_attempts: int = 3
    max_unscored_share: float = 0.1


class RevealRule(enum.Enum):
    """When a principal sees the groups of others. Values as in pool.proto."""

    GIVE_TO_GET = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class Lockstep:
    """Settings of a lockstep pool. `max_steps` 0 means that it never ends."""

    prompts_per_step: int
    min_members: int = 2
    publish_timeout_seconds: float = 600.0
    verify_timeout_seconds: float = 300.0
    max_open_steps: int = 1
    max_steps: int = 0


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What a pool is; immutable. `prompt_set` and pool names here are bare ids, without prefix."""

    prompt_set: str
    group_size: int
    plan: VerificationPlan
    lockstep: Lockstep
    seed: int = 0
    max_tokens: int = 0
    reveal: RevealRule = RevealRule.GIVE_TO_GET
    retained_steps: int = 0
    capability_window: int = 5
