"""The mathematics of HACPO (arXiv 2603.02604): pure functions of tensors.

Notation: k is the learner, j the source of a sample, `P` a capability (smoothed success rate),
`w(k, j) = P_k / P_j`, sg the stop-gradient, m the number of optimizer updates already made in the step. N
counts the samples of a step, B those of a minibatch, T the tokens of the longest response. Float32 and
float64 inputs keep their dtype; lower precisions are raised to float32, since the own clip band is under 1e-3
wide.

Settings and advantages live in modules of their own and are exported from here too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hacrl_agents.advantages import (
    AdvantageCounts,
    capability_weight,
    joint_advantages,
    joint_advantages_and_counts,
)
from hacrl_agents.hacpo_config import PAPER, HacpoConfig

__all__ = [
    "PAPER",
    "AdvantageCounts",
    "HacpoConfig",
    "capability_weight",
    "cross_lower_bound",
    "gspo_loss",
    "hacpo_loss",
    "joint_advantages",
    "joint_advantages_and_counts",
    "scale_cross_step",
    "sequence_ratio",
    "success_only_loss",
    "summarize_metrics",
]


def sequence_ratio(
    target_log_probs: Tensor,
    target_mask: Tensor,
    source_mean_log_probs: Tensor,
    *,
    config: HacpoConfig = PAPER,
) -> Tensor:
    """Returns `s = exp(mean_t log pi_k(y) - mean_t log pi_j(y))`, shape (B,): equation 11.

    Each mean is over the tokens of its own tokenizer. The log ratio is clamped to +-max_abs_log_ratio, with
    gradient 0 beyond.

    Args:
        target_log_probs: (B, T) log-probs of the learner for its own encoding of the responses. What stands
            outside the mask is ignored, NaN too.
        target_mask: (B, T), true or 1 for tokens that count.
        source_mean_log_probs: (B,) mean log-prob under the policy that produced each text.
        config: see HacpoConfig.

    Raises:
        ValueError: if the shapes disagree or a row has no token.
    """
    log_probs = _at_least_float32(target_log_probs)
    if log_probs.ndim != 2 or target_mask.shape != log_probs.shape:
        raise ValueError(
            f"Log-probs {tuple(log_probs.shape)} and mask {tuple(target_mask.shape)} must both be (B, T)."
        )
    if source_mean_log_probs.shape != log_probs.shape[:1]:
        raise ValueError(f"Source means {tuple(source_mean_log_probs.shape)} must be one per row of (B, T).")
    mask = target_mask.bool()
    count = mask.sum(dim=1)
    if bool((count == 0).any()):
        raise ValueError("A response has no token: leave it out of the minibatch.")
    mean = torch.where(mask, log_probs, torch.zeros_like(log_probs)).sum(dim=1) / count
    bound = config.max_abs_log_ratio
    return torch.exp(torch.clamp(mean - source_mean_log_probs.to(mean.dtype), -bound, bound))


def cross_lower_bound(minibatch_index: int, *, config: HacpoConfig = PAPER) -> float:
    """Returns the lower clamp of foreign ratios, `min(1, 1 - delta + m * step)`: stepwise clipping.

    `minibatch_index` is m, the optimizer updates already made in this step, own minibatches included.
    """
    return min(1.0, 1.0 - config.cross_delta + minibatch_index * config.cross_step)


def scale_cross_step(config: HacpoConfig, *, planned_updates: int) -> HacpoConfig:
    """Returns the settings with `cross_step` scaled by 3 / (M - 1) for M planned updates of the step.

    Four updates give the paper. With more agents the bound would otherwise reach 1 before the last of them
    is heard.
    """
    if planned_updates < 2:
        return config
    return replace(config, cross_step=config.cross_step * (3.0 / (planned_updates - 1)))


def hacpo_loss(
    target_log_probs: Tensor,
    target_mask: Tensor,
    source_mean_log_probs: Tensor,
    advantages: Tensor,
    is_self: Tensor,
    capability_ratio: Tensor,
    *,
    minibatch_index: int,
    config: HacpoConfig = PAPER,
    planned_samples: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the HACPO loss of a minibatch (a scalar) and per-sample metrics.

    With `s` of `sequence_ratio`, `c = clamp(s, lower(m), 1)` and advantage A, the objective of a sample is
    - own: `min(s * A, clamp(s, 1 - self_clip_low, 1 + self_clip_high) * A)`,
    - foreign: `c * sg[c]^alpha * w(j, k) * A`, with gradient 0 where s is outside [lower(m), 1],
    and the loss is minus the mean (equations 47 to 53). The capability ratio of own samples is not used.

    Args:
        target_log_probs: (B, T), see `sequence_ratio`; the only input that gets a gradient.
        target_mask: (B, T).
        source_mean_log_probs: (B,); for own samples the learner's own mean before the step's first update.
        advantages: (B,) of `joint_advantages`.
        is_self: (B,), true for own samples.
        capability_ratio: (B,), `w(source, learner)`.
        minibatch_index: m of `cross_lower_bound`.
        config: see HacpoConfig.
        planned_samples: divisor of the sum, if not B: for micro-batches, and where samples are missing.

    Returns:
        The loss, and detached tensors: `ratio`, `objective` (B,), `is_self`, `own_clipped`, `cross_below`,
        `cross_above` (B,) bool, and the scalar `cross_lower`.

    Raises:
        ValueError: as `sequence_ratio`, or if a per-sample tensor is not (B,).
    """
    lower = cross_lower_bound(minibatch_index, config=config)
    ratio = sequence_ratio(target_log_probs, target_mask, source_mean_log_probs, config=config)
    own = _per_sample(is_self, "is_self", ratio).bool()
    advantage = _per_sample(advantages, "advantages", ratio).to(ratio.dtype).detach()
    weight = _per_sample(capability_ratio, "capability_ratio", ratio).to(ratio.dtype).detach()
    clipped = torch.clamp(ratio, lower, 1.0)
    foreign_objective = clipped * clipped.detach() ** config.alpha * weight * advantage
    objective = torch.where(own, _own_objective(ratio, advantage, config), foreign_objective)
    metrics = _metrics(ratio, objective, advantage, own, lower=lower, config=config)
    return _negative_mean(objective, planned_samples), metrics


def success_only_loss(
    target_log_probs: Tensor,
    target_mask: Tensor,
    source_mean_log_probs: Tensor,
    advantages: Tensor,
    is_self: Tensor,
    capability_ratio: Tensor,
    *,
    config: HacpoConfig = PAPER,
    planned_samples: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the success-only loss: own samples as in `hacpo_loss`, of the others only what went well.

    A foreign sample's objective is `min(s, 1) * w(j, k) * max(A, 0)`, with gradient 0 where s > 1. There
    is no exponent and no lower bound, so m does not matter and `cross_lower` is 0. Arguments, metrics and
    errors are those of `hacpo_loss`. (The idea is that of arXiv 2605.07244; the formula is ours.)
    """
    ratio = sequence_ratio(target_log_probs, target_mask, source_mean_log_probs, config=config)
    own = _per_sample(is_self, "is_self", ratio).bool()
    advantage = _per_sample(advantages, "advantages", ratio).to(ratio.dtype).detach()
    weight = _per_sample(capability_ratio, "capability_ratio", ratio).to(ratio.dtype).detach()
    foreign_objective = torch.clamp(ratio, max=1.0) * weight * torch.clamp(advantage, min=0.0)
    objective = torch.where(own, _own_objective(ratio, advantage, config), foreign_objective)
    metrics = _metrics(ratio, objective, advantage, own, lower=0.0, config=config)
    return _negative_mean(objective, planned_samples), metrics


def gspo_loss(
    target_log_probs: Tensor,
    target_mask: Tensor,
    source_mean_log_probs: Tensor,
    advantages: Tensor,
    *,
    config: HacpoConfig = PAPER,
    planned_samples: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the GSPO loss (arXiv 2507.18071): every sample is the learner's own. See `hacpo_loss`."""
    own = torch.ones(target_log_probs.shape[:1], dtype=torch.bool, device=target_log_probs.device)
    return hacpo_loss(
        target_log_probs,
        target_mask,
        source_mean_log_probs,
        advantages,
        own,
        torch.ones_like(source_mean_log_probs),
        minibatch_index=0,
        config=config,
        planned_samples=planned_samples,
    )


def summarize_metrics(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Returns means over all samples of several minibatches; a mean over no sample is left out.

    Keys: `own_samples`, `own_ratio`, `own_clipped` and `cross_samples`, `cross_ratio`, `cross_below`,
    `cross_above` (the last of each are fractions).
    """
    if not parts:
        return {"own_samples": 0.0, "cross_samples": 0.0}
    own = torch.cat([part["is_self"] for part in parts])
    summary: dict[str, float] = {}
    wanted = {"own": ("ratio", "own_clipped"), "cross": ("ratio", "cross_below", "cross_above")}
    for kind, chosen in (("own", own), ("cross", ~own)):
        summary[f"{kind}_samples"] = float(chosen.sum())
        if not bool(chosen.any()):
            continue
        for name in wanted[kind]:
            values = torch.cat([part[name] for part in parts])[chosen]
            key = f"{kind}_{name}" if name == "ratio" else name
            summary[key] = float(values.double().mean())
    return summary


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _per_sample(values: Tensor, name: str, ratio: Tensor) -> Tensor:
    if values.shape != ratio.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}: give one value per sample ({len(ratio)}).")
    return values


def _own_objective(ratio: Tensor, advantage: Tensor, config: HacpoConfig) -> Tensor:
    clipped = torch.clamp(ratio, 1.0 - config.self_clip_low, 1.0 + config.self_clip_high)
    return torch.minimum(ratio * advantage, clipped * advantage)


def _negative_mean(objective: Tensor, planned_samples: int | None) -> Tensor:
    divisor = len(objective) if planned_samples is None else planned_samples
    if divisor < 1:
        raise ValueError("A minibatch without samples has no loss: skip it.")
    return -objective.sum() / divisor


def _metrics(
    ratio: Tensor, objective: Tensor, advantage: Tensor, own: Tensor, *, lower: float, config: HacpoConfig
) -> dict[str, Tensor]:
    s = ratio.detach()
    too_high = (s > 1.0 + config.self_clip_high) & (advantage > 0)
    too_low = (s < 1.0 - config.self_clip_low) & (advantage < 0)
    return {
        "ratio": s,
        "objective": objective.detach(),
        "is_self": own,
        "own_clipped": own & (too_high | too_low),
        "cross_below": ~own & (s < lower),
        "cross_above": ~own & (s > 1.0),
        "cross_lower": torch.tensor(lower, dtype=s.dtype),
    }
