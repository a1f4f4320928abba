"""Log-probs of responses under a policy: raw logits, float32 log-softmax, response positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from hacrl_agents.policy import Policy

ItemT = TypeVar("ItemT")

_IGNORED = -100


class HasTokens(Protocol):
    """Anything with prompt and response ids; the response has at least one."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The prompt's ids."""
        ...

    @property
    def response_ids(self) -> tuple[int, ...]:
        """The response's ids, with the end token if it counts."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt with one response, as token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def response_log_probs(policy: Policy, rows: Sequence[HasTokens]) -> tuple[Tensor, Tensor]:
    """Returns log-probs (B, T) float32 and mask (B, T) bool of the rows' responses, in one forward pass.

    Prompts are padded on the left and responses on the right, so all responses begin in one column and no
    logits are computed for prompts. Gradients flow if they are enabled.
    """
    prompts = max(len(row.prompt_ids) for row in rows)
    width = max(len(row.response_ids) for row in rows)
    ids = torch.full((len(rows), prompts + width), policy.pad_id)
    attended = torch.zeros((len(rows), prompts + width), dtype=torch.long)
    targets = torch.full((len(rows), width), _IGNORED)
    for index, row in enumerate(rows):
        start, end = prompts - len(row.prompt_ids), prompts + len(row.response_ids)
        ids[index, start:end] = torch.tensor((*row.prompt_ids, *row.response_ids))
        attended[index, start:end] = 1
        targets[index, : len(row.response_ids)] = torch.tensor(row.response_ids)
    logits = _logits(policy, ids, attended, prompts=prompts)
    targets = targets.to(policy.device)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return -losses.view_as(targets), targets != _IGNORED


@torch.no_grad()
def all_log_probs(policy: Policy, rows: Sequence[HasTokens], *, micro_batch: int) -> list[Tensor]:
    """Returns the log-probs of every row's response: float32 on the CPU, one tensor (T,) each, in order.

    The result depends on the rows and their order alone, so two lives of an agent with the same weights and
    rows get the same bits.
    """
    found: list[Tensor | None] = [None] * len(rows)
    for part in by_length(list(enumerate(rows)), micro_batch, key=lambda pair: pair[1]):
        log_probs, _ = response_log_probs(policy, [row for _, row in part])
        kept = log_probs.cpu()
        for line, (index, row) in enumerate(part):
            found[index] = kept[line, : len(row.response_ids)].clone()
    return [each for each in found if each is not None]


def by_length(items: Sequence[ItemT], size: int, *, key: Callable[[ItemT], HasTokens]) -> list[list[ItemT]]:
    """Cuts items into batches of at most `size`, the longest first, so that batches hold little padding."""
    ordered = sorted(
        items, key=lambda item: (len(key(item).response_ids), len(key(item).prompt_ids)), reverse=True
    )
    return [list(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def _logits(policy: Policy, ids: Tensor, attended: Tensor, *, prompts: int) -> Tensor:
    """Returns the logits (B, T, V) that predict the response columns."""
    width = ids.shape[1] - prompts
    arguments: dict[str, Tensor | int] = {}
    # Padding on the right needs no mask, since attention is causal, and attention without one is faster.
    if not bool(attended[:, 0].all()):
        arguments["attention_mask"] = attended.to(policy.device)
        arguments["position_ids"] = (attended.cumsum(dim=1) - 1).clamp(min=0).to(policy.device)
    if policy.keeps_logits:
        arguments["logits_to_keep"] = width + 1
    output = policy.model(input_ids=ids.to(policy.device), use_cache=False, **arguments)
    logits: Tensor = output.logits[:, -(width + 1) : -1]
    return logits
