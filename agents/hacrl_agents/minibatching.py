"""The order of a step's updates: own block first, then the other agents; cut by prompts, never shuffled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

SampleT = TypeVar("SampleT")


@dataclass(frozen=True, slots=True)
class Minibatch(Generic[SampleT]):
    """The samples of one optimizer update. They come from one agent."""

    source: str
    samples: tuple[SampleT, ...]
    planned_samples: int
    """Prompts of the cut times the pool's group size: what the loss is divided by, present or not."""


def source_order(roster: Sequence[str], *, learner: str, step: int) -> list[str]:
    """Returns the learner, then the others in roster order, rotated by the step if there are several.

    Without the rotation the first of several peers would always meet the widest clip bounds.
    """
    others = [agent for agent in roster if agent != learner]
    turn = step % len(others) if others else 0
    return [learner, *others[turn:], *others[:turn]]


def plan_minibatches(
    samples: Sequence[SampleT],
    *,
    source_of: Callable[[SampleT], str],
    prompt_of: Callable[[SampleT], str],
    prompt_ids: Sequence[str],
    sources: Sequence[str],
    minibatch_prompts: int,
    group_size: int,
) -> list[Minibatch[SampleT]]:
    """Returns the minibatches of a step in the order they are stepped; index = m of the clip bounds.

    Every agent's samples are cut at the same prompts, in manifest order. A minibatch without a sample doesn't
    exist and isn't counted.

    Args:
        samples: what can be trained on, in any order across prompts; kept in order within one prompt.
        source_of: the agent of a sample.
        prompt_of: the prompt id of a sample.
        prompt_ids: the step's prompts in manifest order.
        sources: agents in the order of their blocks.
        minibatch_prompts: prompts per cut; the last cut may hold fewer.
        group_size: rollouts per prompt and agent that the pool plans.
    """
    by_slot: dict[tuple[str, str], list[SampleT]] = {}
    for sample in samples:
        by_slot.setdefault((source_of(sample), prompt_of(sample)), []).append(sample)
    plan = []
    for source in sources:
        for start in range(0, len(prompt_ids), minibatch_prompts):
            cut = prompt_ids[start : start + minibatch_prompts]
            chosen = tuple(sample for prompt_id in cut for sample in by_slot.get((source, prompt_id), ()))
            if chosen:
                plan.append(Minibatch(source, chosen, len(cut) * group_size))
    return plan
