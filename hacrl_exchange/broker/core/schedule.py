"""Which prompts a step asks for: every epoch goes through the set once, in an order of its own.

The remainder of an epoch that does not fill a step is left out of that epoch; another order leaves out
other prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def step_position(step: int, *, prompt_count: int, prompts_per_step: int) -> tuple[int, int]:
    """The epoch of a step (from 0) and the offset of its first prompt in the order of that epoch.

    Raises:
        ValueError: if steps or prompts are counted wrong; checked_spec makes sure that they are not.
    """
    if step < 1 or not 1 <= prompts_per_step <= prompt_count:
        raise ValueError(f"Step {step} of {prompts_per_step} prompts out of {prompt_count} does not exist.")
    epoch, index = divmod(step - 1, prompt_count // prompts_per_step)
    return epoch, index * prompts_per_step


def epoch_order(prompt_ids: Iterable[str], *, seed: int, epoch: int) -> tuple[str, ...]:
    """The prompts in the order of an epoch: by sha256 of "seed/epoch/prompt id" in UTF-8."""

    def rank(prompt_id: str) -> bytes:
        return hashlib.sha256(f"{seed}/{epoch}/{prompt_id}".encode()).digest()

    return tuple(sorted(prompt_ids, key=rank))
