"""The optimizer updates of one step: one per minibatch, micro-batches only accumulate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hacrl_agents.errors import TrainingDivergedError
from hacrl_agents.hacpo import HacpoConfig, summarize_metrics
from hacrl_agents.lessons import Sample
from hacrl_agents.logprobs import by_length, response_log_probs
from hacrl_agents.minibatching import Minibatch
from hacrl_agents.objectives import LossInputs, Metrics, Objective
from hacrl_agents.policy import Policy


@dataclass(frozen=True)
class UpdateReport:
    """What the updates of one step did."""

    updates: int
    losses: tuple[float, ...]
    """One per minibatch, in order; the sum over its samples by the planned size."""
    gradient_norms: tuple[float, ...]
    """Before clipping."""
    ratios: dict[str, float]
    """See `hacpo.summarize_metrics`: own and foreign ratios, and how often a clip bound."""


def make_optimizer(
    policy: Policy, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Returns AdamW over all trainable parameters."""
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)


def run_updates(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    plan: Sequence[Minibatch[Sample]],
    *,
    objective: Objective,
    config: HacpoConfig,
    learning_rate: float,
    micro_batch: int,
    max_grad_norm: float,
) -> UpdateReport:
    """Steps the optimizer once per minibatch, in order. The index in the plan is m of the clip bounds.

    Raises:
        TrainingDivergedError: if a gradient is not finite; that update is not made.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    losses, norms = [], []
    metrics: list[Metrics] = []
    for index, minibatch in enumerate(plan):
        optimizer.zero_grad(set_to_none=True)
        loss, found = accumulate_gradient(
            policy, minibatch, index=index, objective=objective, config=config, micro_batch=micro_batch
        )
        norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), max_grad_norm))
        if not math.isfinite(norm):
            raise TrainingDivergedError(
                f"The gradient of update {index + 1} of the step is {norm}: go on from the last checkpoint "
                "with a lower learning rate."
            )
        optimizer.step()
        losses.append(loss)
        norms.append(norm)
        metrics += found
    optimizer.zero_grad(set_to_none=True)
    return UpdateReport(len(plan), tuple(losses), tuple(norms), summarize_metrics(metrics))


def accumulate_gradient(
    policy: Policy,
    minibatch: Minibatch[Sample],
    *,
    index: int,
    objective: Objective,
    config: HacpoConfig,
    micro_batch: int,
) -> tuple[float, list[Metrics]]:
    """Adds the gradient of one minibatch to the parameters and returns its loss and metrics."""
    total = 0.0
    metrics = []
    for samples in by_length(minibatch.samples, micro_batch, key=lambda sample: sample):
        log_probs, mask = response_log_probs(policy, samples)
        inputs = _inputs(samples, log_probs, mask)
        loss, found = objective.loss(inputs, index, config, minibatch.planned_samples)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += float(loss.detach())
        metrics.append({name: value.cpu() for name, value in found.items()})
    return total, metrics


def _inputs(samples: Sequence[Sample], log_probs: Tensor, mask: Tensor) -> LossInputs:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=log_probs.device)

    scale = column([sample.length_scale for sample in samples]).to(log_probs.dtype)
    return LossInputs(
        target_log_probs=log_probs * scale[:, None],
        target_mask=mask,
        source_mean_log_probs=column([sample.source_mean for sample in samples]),
        advantages=column([sample.advantage for sample in samples]),
        is_self=torch.tensor([sample.is_self for sample in samples], device=log_probs.device),
        capability_ratio=column([sample.capability_ratio for sample in samples]),
    )
