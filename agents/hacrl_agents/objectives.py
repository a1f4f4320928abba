"""The objectives by name: which samples each uses, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from hacrl_agents.hacpo import HacpoConfig, gspo_loss, hacpo_loss, success_only_loss

Metrics = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Tensors of one micro-batch, named as in `hacpo.hacpo_loss`."""

    target_log_probs: Tensor
    target_mask: Tensor
    source_mean_log_probs: Tensor
    advantages: Tensor
    is_self: Tensor
    capability_ratio: Tensor


LossFunction = Callable[[LossInputs, int, HacpoConfig, int], tuple[Tensor, Metrics]]
"""(inputs, minibatch index m, config, planned samples) -> loss and metrics."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One objective."""

    name: str
    uses_peers: bool
    """Learns from the rollouts of others; otherwise its advantages are of the plain own group, too."""
    teach_foreign_only: bool
    """Prompts without an own sample teach, too."""
    loss: LossFunction


def _hacpo(inputs: LossInputs, index: int, config: HacpoConfig, planned: int) -> tuple[Tensor, Metrics]:
    return hacpo_loss(
        inputs.target_log_probs,
        inputs.target_mask,
        inputs.source_mean_log_probs,
        inputs.advantages,
        inputs.is_self,
        inputs.capability_ratio,
        minibatch_index=index,
        config=config,
        planned_samples=planned,
    )


def _gspo(inputs: LossInputs, index: int, config: HacpoConfig, planned: int) -> tuple[Tensor, Metrics]:
    return gspo_loss(
        inputs.target_log_probs,
        inputs.target_mask,
        inputs.source_mean_log_probs,
        inputs.advantages,
        config=config,
        planned_samples=planned,
    )


def _success_only(
    inputs: LossInputs, index: int, config: HacpoConfig, planned: int
) -> tuple[Tensor, Metrics]:
    return success_only_loss(
        inputs.target_log_probs,
        inputs.target_mask,
        inputs.source_mean_log_probs,
        inputs.advantages,
        inputs.is_self,
        inputs.capability_ratio,
        config=config,
        planned_samples=planned,
    )


OBJECTIVES: Final[dict[str, Objective]] = {
    "hacpo": Objective("hacpo", uses_peers=True, teach_foreign_only=False, loss=_hacpo),
    "gspo": Objective("gspo", uses_peers=False, teach_foreign_only=False, loss=_gspo),
    "success_only": Objective("success_only", uses_peers=True, teach_foreign_only=True, loss=_success_only),
}
"""By the names of `settings.OBJECTIVES`."""
