"""Joint advantages of several agents' rollouts (HACPO, arXiv 2603.02604, equations 6 to 8).

Rules that the paper lacks:
1. A reward of NaN means "not scored". Such a sample is left out of mean and deviation and gets advantage 0.
2. Sources may have unequal counts; the mean is over the samples that exist. `strict=True` raises instead.
3. A prompt with one scored sample, or with foreign samples only, teaches nothing: advantage 0.
4. Graded rewards (not only 0 and 1) have their advantages clamped to +-`max_abs_advantage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hacrl_agents.hacpo_config import PAPER, HacpoConfig
from hacrl_exchange.capability import capability_ratio

_UNIFORM = 1e-6
"""Rewards of a prompt that differ by less than this are all equal: there is nothing to learn."""


@dataclass(frozen=True)
class AdvantageCounts:
    """How often each rule decided, in prompts unless stated. For logs."""

    prompts: int = 0
    uniform: int = 0
    """All rewards equal: advantage 0."""
    single: int = 0
    """Fewer than two scored samples: advantage 0."""
    foreign_only: int = 0
    """No scored sample of the learner."""
    baseline_guarded: int = 0
    """The weighted baseline exceeded 1."""
    unscored_samples: int = 0
    clamped_ratios: int = 0
    """Foreign sources whose capability ratio is at a bound (sources of the batch, not prompts)."""


def joint_advantages(
    rewards: Tensor,
    prompt_ids: Sequence[str],
    sources: Sequence[str],
    *,
    learner: str,
    capabilities: Mapping[str, float],
    config: HacpoConfig = PAPER,
    strict: bool = False,
    teach_foreign_only: bool = False,
) -> Tensor:
    """Returns the advantage of every sample for one learner, shape (N,), dtype of the rewards.

    Per prompt, over the samples i of all agents (equations 6 to 8):
    `mu_k = mean_i(w(k, src_i) * R_i)`, `A_i = (R_i - mu_k) / (std(R) + epsilon)`; std has ddof 1 and is over
    the unweighted rewards. The learner's baseline serves every sample, own or foreign. Rules 1 to 4 of the
    module hold. An agent missing in `capabilities` has no history: its ratios are 1.

    Args:
        rewards: (N,) in [0, 1]; NaN means not scored.
        prompt_ids: N prompt ids; the samples of a prompt need not be neighbours.
        sources: N agent names.
        learner: the agent that learns.
        capabilities: capability per agent, all of the same step.
        config: see HacpoConfig.
        strict: raise unless every prompt has equally many scored samples of every agent (the paper's rule).
        teach_foreign_only: give advantages to prompts without an own sample too (success-only).

    Raises:
        ValueError: if the lengths differ, a reward is infinite, or a count breaks `strict`.
    """
    advantages, _ = joint_advantages_and_counts(
        rewards,
        prompt_ids,
        sources,
        learner=learner,
        capabilities=capabilities,
        config=config,
        strict=strict,
        teach_foreign_only=teach_foreign_only,
    )
    return advantages


def joint_advantages_and_counts(
    rewards: Tensor,
    prompt_ids: Sequence[str],
    sources: Sequence[str],
    *,
    learner: str,
    capabilities: Mapping[str, float],
    config: HacpoConfig = PAPER,
    strict: bool = False,
    teach_foreign_only: bool = False,
) -> tuple[Tensor, AdvantageCounts]:
    """Returns what `joint_advantages` returns, and how often each of its rules decided."""
    if rewards.dtype not in (torch.float32, torch.float64):
        rewards = rewards.float()
    if rewards.ndim != 1 or not len(rewards) == len(prompt_ids) == len(sources):
        raise ValueError(
            f"Rewards of shape {tuple(rewards.shape)}, {len(prompt_ids)} prompt ids, {len(sources)} sources: "
            "the lengths differ; give one of each per sample."
        )
    if bool(torch.isinf(rewards).any()):
        raise ValueError("A reward is infinite: rewards are numbers in [0, 1], or NaN if not scored.")
    groups = _scored_by_prompt(rewards, prompt_ids)
    if strict:
        _check_equal_counts(groups, sources)
    weights = {
        name: capability_weight(capabilities, learner, name, config=config) for name in dict.fromkeys(sources)
    }
    weight = torch.tensor([weights[name] for name in sources], dtype=rewards.dtype, device=rewards.device)
    is_own = torch.tensor([name == learner for name in sources], dtype=torch.bool, device=rewards.device)
    advantages = torch.zeros_like(rewards)
    tally = dict.fromkeys(("uniform", "single", "foreign_only", "baseline_guarded"), 0)
    for group in groups.values():
        index = torch.tensor(group, dtype=torch.long, device=rewards.device)
        values, own = rewards[index], is_own[index]
        foreign_only = len(group) > 0 and not bool(own.any())
        tally["foreign_only"] += foreign_only
        if len(group) < 2:
            tally["single"] += 1
        elif config.uniform_guard and float(values.max() - values.min()) < _UNIFORM:
            tally["uniform"] += 1
        elif teach_foreign_only or not foreign_only:
            baseline = (weight[index] * values).mean()
            if config.baseline_guard and float(baseline) > 1:
                tally["baseline_guarded"] += 1
                baseline = values.mean() if foreign_only else values[own].mean()
            advantages[index] = _normalized(values, baseline, config)
    bounds = (config.ratio_min, config.ratio_max)
    counts = AdvantageCounts(
        prompts=len(groups),
        unscored_samples=int(torch.isnan(rewards).sum()),
        clamped_ratios=sum(value in bounds for name, value in weights.items() if name != learner),
        **tally,
    )
    return advantages, counts


def capability_weight(
    capabilities: Mapping[str, float],
    numerator: str,
    denominator: str,
    *,
    config: HacpoConfig = PAPER,
) -> float:
    """Returns `P_numerator / P_denominator`, clamped; 1 if either has no history.

    The baseline of learner k weights source j by `(numerator=k, denominator=j)`, the loss by `(j, k)`.
    """
    if numerator == denominator:
        return 1.0
    return capability_ratio(
        capabilities.get(numerator),
        capabilities.get(denominator),
        ratio_min=config.ratio_min,
        ratio_max=config.ratio_max,
    )


def _scored_by_prompt(rewards: Tensor, prompt_ids: Sequence[str]) -> dict[str, list[int]]:
    """Returns the indices of the scored samples of every prompt, in the order the prompts come."""
    groups: dict[str, list[int]] = {prompt_id: [] for prompt_id in prompt_ids}
    for index, unscored in enumerate(torch.isnan(rewards).tolist()):
        if not unscored:
            groups[prompt_ids[index]].append(index)
    return groups


def _check_equal_counts(groups: Mapping[str, Sequence[int]], sources: Sequence[str]) -> None:
    agents = dict.fromkeys(sources)
    for prompt_id, group in groups.items():
        counts = dict.fromkeys(agents, 0)
        for index in group:
            counts[sources[index]] += 1
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(
                f"Prompt {prompt_id!r} has unequal counts of scored samples ({shown}): "
                "leave the prompt out, or call with strict=False."
            )


def _normalized(values: Tensor, baseline: Tensor, config: HacpoConfig) -> Tensor:
    """Returns `(R - mu) / (std(R) + epsilon)` of one prompt, clamped if its rewards are graded."""
    advantages = values - baseline
    if config.normalize_by_std:
        advantages = advantages / (values.std(correction=1) + config.epsilon)
    graded = bool(((values != 0) & (values != 1)).any())
    bound = config.max_abs_advantage
    return advantages.clamp(-bound, bound) if graded else advantages
