"""Counts of a member at the closing of a step: its capability window and whether it is withheld.

The window of hacpo.md: the last `window` steps with a scored rollout. Integers only; the rates are computed
by whoever reads them.
"""

from __future__ import annotations

from fractions import Fraction

from hacrl_exchange.broker.core.state import OpenStep
from hacrl_exchange.types import StepCounts


def step_counts(step: OpenStep) -> tuple[StepCounts, ...]:
    """Counts of the step per roster entry. What has no verdicts counts as unscored."""
    counts = [[0, 0, 0] for _ in step.roster]
    for (_, roster_index), group in step.groups.items():
        of_member = counts[roster_index]
        of_member[0] += group.success_count
        of_member[1] += group.scored_count
        of_member[2] += group.rollout_count
    return tuple(StepCounts(step.step, success, scored, total) for success, scored, total in counts)


def extended_window(
    kept: tuple[StepCounts, ...], latest: StepCounts, *, window: int
) -> tuple[StepCounts, ...]:
    """What a manifest lists for a member: its window with this step last.

    A step without a scored rollout has no rate: it is listed after an unchanged window and enters no later
    one (`scored_steps`). Otherwise the oldest step beyond `window` falls out, and so does what is older than
    two windows: after an absence those rates describe another policy.
    """
    if not latest.scored_count:
        return (*kept, latest)
    recent = [counts for counts in kept if counts.step >= latest.step - 2 * window]
    return (*recent, latest)[-window:]


def scored_steps(listed: tuple[StepCounts, ...]) -> tuple[StepCounts, ...]:
    """What a member keeps of the listed counts: the steps that have a rate."""
    return tuple(counts for counts in listed if counts.scored_count)


def is_withheld(counts: StepCounts, *, max_unscored_share: float) -> bool:
    """The unscored share of the step exceeds the pool's limit, read as the decimal it is written as."""
    unscored = counts.total_count - counts.scored_count
    return unscored > Fraction(repr(float(max_unscored_share))) * counts.total_count
