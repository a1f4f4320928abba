"""From a joint batch to a plan of updates: rewards, advantages, views, source means, order.

Rewards are the pool's: a score at or above its success threshold is 1, any other score 0, and a rollout
without a score is left out. Advantages are over all scored rollouts; what a learner then cannot read (see
`views`) is missing from the loss alone, whose divisor stays the planned size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hacrl_agents.exchange import JointBatch
from hacrl_agents.hacpo import (
    AdvantageCounts,
    HacpoConfig,
    capability_weight,
    joint_advantages_and_counts,
    scale_cross_step,
)
from hacrl_agents.logprobs import Row, all_log_probs
from hacrl_agents.minibatching import Minibatch, plan_minibatches, source_order
from hacrl_agents.objectives import OBJECTIVES
from hacrl_agents.policy import Policy
from hacrl_agents.rollouts import OwnLogProbs, fresh_response_ids
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.views import ForeignRules, Skipped, foreign_response_ids, stale_response_ids
from hacrl_exchange.types import Group, LogprobOrigin, PoolSpec, Rollout, Scored, VerifiedGroup

_SAME_POLICY_NATS = 0.02
"""An own rollout's published mean log-prob differs by less per token from the recomputed one. More, and the
text came from other weights, whatever its version says."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout as the learner trains on it."""

    source: str
    prompt_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    source_mean: float
    """Mean log-prob under the policy that produced it; for fresh own ones with the end token."""
    advantage: float
    is_self: bool
    """Own and of the current version; an older own one is treated as foreign, with capability ratio 1."""
    capability_ratio: float
    length_scale: float = 1.0
    """Multiplies the learner's log-probs: its tokens over the source's, for length_norm source."""


@dataclass(frozen=True)
class SourceCounts:
    """What one agent gave in a step."""

    rollouts: int = 0
    scored: int = 0
    successes: int = 0
    trained: int = 0
    skipped: Mapping[str, int] | None = None
    """Scored rollouts left out, by the words of `views.Skipped`."""
    off_policy_sampling: int = 0
    """Rollouts not sampled at temperature 1 and top_p 1: the log-probs are not those they were drawn with."""


@dataclass(frozen=True)
class Lesson:
    """What one step teaches."""

    plan: tuple[Minibatch[Sample], ...]
    config: HacpoConfig
    """With the clip bound's rise scaled to the planned updates."""
    sources: Mapping[str, SourceCounts]
    advantages: AdvantageCounts
    stale_own: int
    """Own samples of an older policy version."""


def build_lesson(
    batch: JointBatch,
    *,
    policy: Policy,
    learner: str,
    updates: int,
    prompt_ids: Mapping[str, tuple[int, ...]],
    spec: PoolSpec,
    settings: TrainerSettings,
    stored: Mapping[str, Group] | None = None,
    own: OwnLogProbs | None = None,
) -> Lesson:
    """Returns the plan of a step for one learner.

    Args:
        batch: the closed step.
        policy: the learner before the step's first update.
        learner: its agent name.
        updates: optimizer updates made so far; tells own rollouts of this version from older ones.
        prompt_ids: the encoded prompts by id.
        spec: the pool's, for threshold and group size.
        settings: the learner's.
        stored: the learner's own groups by prompt id, with metadata, which batches are fetched without.
        own: log-probs computed for publishing, used again if they are of exactly these rollouts.
    """
    objective = OBJECTIVES[settings.objective]
    alone = not objective.uses_peers or not batch.quorum_met
    groups = [group for group in batch.groups if group.agent == learner or not alone]
    rewards = {id(group): _rewards(group, spec.plan.success_threshold) for group in groups}
    owners = [(group, index) for group in groups for index in range(len(group.group.rollouts))]
    advantages, counts = joint_advantages_and_counts(
        torch.tensor([rewards[id(group)][index] for group, index in owners], dtype=torch.float64),
        [group.group.prompt_id for group, _ in owners],
        [group.agent for group, _ in owners],
        learner=learner,
        capabilities=batch.capabilities,
        config=settings.hacpo,
        teach_foreign_only=objective.teach_foreign_only,
    )
    complete = {
        group.group.prompt_id: (stored or {}).get(group.group.prompt_id, group.group)
        for group in groups
        if group.agent == learner
    }
    fresh = _fresh_own(complete, policy, updates, prompt_ids, settings, own)
    reader = _Reader(policy, learner, prompt_ids, batch.capabilities, settings, fresh)
    scored = [
        (group, index, advantage)
        for (group, index), advantage in zip(owners, advantages.tolist(), strict=True)
        if not math.isnan(rewards[id(group)][index])
    ]
    samples, skipped = reader.read_all(scored)
    plan = plan_minibatches(
        samples,
        source_of=lambda sample: sample.source,
        prompt_of=lambda sample: sample.prompt_id,
        prompt_ids=[prompt.prompt_id for prompt in batch.prompts],
        sources=source_order([entry.agent for entry in batch.roster], learner=learner, step=batch.step),
        minibatch_prompts=settings.minibatch_prompts,
        group_size=spec.group_size,
    )
    return Lesson(
        plan=tuple(plan),
        config=scale_cross_step(settings.hacpo, planned_updates=len(plan)),
        sources=_source_counts(batch, groups, rewards, samples, skipped),
        advantages=counts,
        stale_own=sum(sample.source == learner and not sample.is_self for sample in samples),
    )


def _rewards(group: VerifiedGroup, threshold: float) -> list[float]:
    """Returns 1, 0, or NaN for what has no score."""
    return [
        float(verdict.score >= threshold) if isinstance(verdict, Scored) else math.nan
        for verdict in group.verdicts
    ]


@dataclass(frozen=True, slots=True)
class _Fresh:
    """An own response of the current version."""

    response_ids: tuple[int, ...]
    mean: float


def _fresh_own(
    groups: Mapping[str, Group],
    policy: Policy,
    updates: int,
    prompt_ids: Mapping[str, tuple[int, ...]],
    settings: TrainerSettings,
    own: OwnLogProbs | None,
) -> dict[tuple[str, int], _Fresh]:
    """Returns own responses of the current version by (prompt id, rollout index), with recomputed means.

    They are recomputed from the batch unless `own` is of exactly these rows: so a life that sampled them and
    one that got them back after a crash use the same bits.
    """
    keys: list[tuple[str, int]] = []
    rows: list[Row] = []
    published: list[Rollout] = []
    for prompt_id, group in groups.items():
        for index, ids in enumerate(fresh_response_ids(group, policy, updates=updates)):
            keys.append((prompt_id, index))
            rows.append(Row(prompt_ids[prompt_id], ids))
            published.append(group.rollouts[index])
    if own is not None and own.rows == tuple(rows):
        log_probs = list(own.log_probs)
    else:
        log_probs = all_log_probs(policy, rows, micro_batch=settings.micro_batch)
    found = {}
    for key, row, rollout, values in zip(keys, rows, published, log_probs, strict=True):
        shared = float(values[: rollout.token_count].double().sum())
        if abs(shared - rollout.logprob_sum) <= _SAME_POLICY_NATS * rollout.token_count:
            found[key] = _Fresh(row.response_ids, float(values.double().mean()))
    return found


class _Reader:
    """Turns delivered rollouts into samples of one learner."""

    def __init__(
        self,
        policy: Policy,
        learner: str,
        prompt_ids: Mapping[str, tuple[int, ...]],
        capabilities: Mapping[str, float],
        settings: TrainerSettings,
        fresh: Mapping[tuple[str, int], _Fresh],
    ) -> None:
        self._policy = policy
        self._learner = learner
        self._prompt_ids = prompt_ids
        self._capabilities = capabilities
        self._settings = settings
        self._fresh = fresh

    def read_all(
        self, scored: list[tuple[VerifiedGroup, int, float]]
    ) -> tuple[list[Sample], dict[str, Counter[str]]]:
        """Returns the samples of scored rollouts, and how many were left out by agent and reason."""
        samples: list[Sample] = []
        skipped: dict[str, Counter[str]] = {}
        for group, index, advantage in scored:
            sample = self._read(group, index, advantage)
            if isinstance(sample, Skipped):
                skipped.setdefault(group.agent, Counter())[sample.value] += 1
            else:
                samples.append(sample)
        return samples, skipped

    def _read(self, group: VerifiedGroup, index: int, advantage: float) -> Sample | Skipped:
        prompt_id = group.group.prompt_id
        rollout = group.group.rollouts[index]
        fresh = self._fresh.get((prompt_id, index)) if group.agent == self._learner else None
        scale = 1.0
        if fresh is not None:
            ids, mean = fresh.response_ids, fresh.mean
        else:
            view = self._foreign_view(group, rollout)
            if isinstance(view, Skipped):
                return view
            ids, mean = view, rollout.logprob_sum / rollout.token_count
            if self._settings.length_norm == "source":
                scale = len(ids) / rollout.token_count
        return Sample(
            source=group.agent,
            prompt_id=prompt_id,
            prompt_ids=self._prompt_ids[prompt_id],
            response_ids=ids,
            source_mean=mean,
            advantage=advantage,
            is_self=fresh is not None,
            capability_ratio=capability_weight(
                self._capabilities, group.agent, self._learner, config=self._settings.hacpo
            ),
            length_scale=scale,
        )

    def _foreign_view(self, group: VerifiedGroup, rollout: Rollout) -> tuple[int, ...] | Skipped:
        if group.agent == self._learner:
            return stale_response_ids(rollout, self._policy)
        refuses = self._settings.objective == "hacpo" and not self._settings.allow_sampler_logprobs
        if refuses and group.group.logprob_origin is not LogprobOrigin.TRAINER:
            return Skipped.SAMPLER_LOGPROBS
        room = self._policy.max_positions - len(self._prompt_ids[group.group.prompt_id])
        rules = ForeignRules(min(self._settings.max_tokens, room), self._settings.over_limit == "truncate")
        same = group.group.tokenizer_fingerprint == self._policy.fingerprint
        return foreign_response_ids(rollout, self._policy, rules=rules, same_tokenizer=same)


def _source_counts(
    batch: JointBatch,
    groups: list[VerifiedGroup],
    rewards: Mapping[int, list[float]],
    samples: list[Sample],
    skipped: Mapping[str, Counter[str]],
) -> dict[str, SourceCounts]:
    """Returns the counts of every roster member, in roster order."""
    trained = Counter(sample.source for sample in samples)
    counts = {}
    for entry in batch.roster:
        of_agent = [group for group in groups if group.agent == entry.agent]
        values = [value for group in of_agent for value in rewards[id(group)]]
        scored = [value for value in values if not math.isnan(value)]
        counts[entry.agent] = SourceCounts(
            rollouts=len(values),
            scored=len(scored),
            successes=int(sum(scored)),
            trained=trained[entry.agent],
            skipped=dict(skipped.get(entry.agent, {})),
            off_policy_sampling=sum(
                len(group.group.rollouts)
                for group in of_agent
                if group.group.sampling.temperature != 1 or group.group.sampling.top_p < 1
            ),
        )
    return counts
