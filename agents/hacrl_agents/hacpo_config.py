"""Settings of the HACPO objective, shared by advantages and losses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HacpoConfig:
    """Settings of the objective. The defaults are the paper's for agents of different size."""

    alpha: float = 1.0
    """Exponent of the stopped importance weight of foreign samples."""
    cross_delta: float = 0.2
    """The foreign ratio is clamped from below at 1 - cross_delta at the first update of a step."""
    cross_step: float = 0.025
    """By how much that bound rises with every update of the step."""
    self_clip_low: float = 3e-4
    """Own ratios are clipped at 1 - self_clip_low. The default suits some 700 tokens per response."""
    self_clip_high: float = 4e-4
    """Own ratios are clipped at 1 + self_clip_high."""
    max_abs_log_ratio: float = 10.0
    """Log ratios are clamped to +- this before the exponential."""
    ratio_min: float = 0.1
    """Lower clamp of capability ratios."""
    ratio_max: float = 10.0
    """Upper clamp of capability ratios."""
    epsilon: float = 1e-6
    """Added to the standard deviation."""
    normalize_by_std: bool = True
    """Divide advantages by the deviation of the joint rewards; without it A = R - mu exactly."""
    uniform_guard: bool = True
    """Equal rewards give advantage 0. Without it the formula gives about -2.5e5."""
    baseline_guard: bool = True
    """A baseline above 1 is replaced by the mean of the learner's own rewards (rewards are in [0, 1])."""
    max_abs_advantage: float = 10.0
    """Clamp of advantages where rewards are graded; 0/1 rewards are never clamped."""


PAPER = HacpoConfig()
"""The default of every function: the settings of the paper."""
