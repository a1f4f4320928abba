"""Sampling from any causal language model of transformers: batched, with a key-value cache.

A prompt's random numbers come from its own seed, so its texts don't depend on what is decoded beside them: an
agent that restarts in the middle of a step samples only what is missing, and gets the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from hacrl_agents.errors import PromptTooLongError
from hacrl_agents.policy import Policy

_COMPACT_BELOW = 0.8
"""Ended rows are dropped from the cache once at most this share of the rows still runs."""


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """One prompt to be answered `count` times."""

    prompt_ids: tuple[int, ...]
    count: int
    seed: int = 0
    """Of this request's random numbers, in [0, 2**63)."""


@dataclass(frozen=True, slots=True)
class SampledResponse:
    """One response: its ids without the end token, and the end token, or None at the token limit."""

    token_ids: tuple[int, ...]
    end_id: int | None


def sampling_seed(seed: int, *, agent: str, step: int, prompt_id: str) -> int:
    """Returns the seed of one prompt's responses: the same in every life of the agent, others for others."""
    digest = hashlib.sha256(f"{seed}/{agent}/{step}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@torch.no_grad()
def sample(
    policy: Policy,
    requests: Sequence[SamplingRequest],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_rows: int = 512,
) -> list[list[SampledResponse]]:
    """Returns the responses of every request, in order. Temperature 0 is greedy.

    Args:
        policy: in evaluation mode.
        requests: prompts by their token ids.
        max_tokens: limit per response, the end token included; less where the model's context ends.
        temperature: divides the logits.
        top_p: the smallest set of likeliest tokens with at least this mass is kept.
        batch_rows: responses decoded together, rounded to whole requests.

    Raises:
        PromptTooLongError: if a prompt fills the model's context.
    """
    answers: list[list[SampledResponse]] = []
    for part in _parts(requests, batch_rows):
        rows = _decode(policy, part, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
        responses = iter(rows)
        answers += [[next(responses) for _ in range(request.count)] for request in part]
    return answers


def _parts(requests: Sequence[SamplingRequest], batch_rows: int) -> Iterator[list[SamplingRequest]]:
    part: list[SamplingRequest] = []
    rows = 0
    for request in requests:
        if part and rows + request.count > batch_rows:
            yield part
            part, rows = [], 0
        part.append(request)
        rows += request.count
    if part:
        yield part


def _decode(
    policy: Policy, requests: Sequence[SamplingRequest], *, max_tokens: int, temperature: float, top_p: float
) -> list[SampledResponse]:
    """Decodes one batch. Prompts are read once each; their cache rows are then repeated."""
    device = policy.device
    lengths = [len(request.prompt_ids) for request in requests]
    limits = [min(max_tokens, policy.max_positions - length) for length in lengths]
    if min(limits) < 1:
        raise PromptTooLongError(
            f"A prompt of {max(lengths)} tokens leaves no room in a context of {policy.max_positions}: "
            "join a pool with shorter prompts, or use a model with a longer context."
        )
    source = torch.tensor([index for index, request in enumerate(requests) for _ in range(request.count)])
    noise = _noise(requests, max(limits)).to(device)
    limit = torch.tensor(limits)[source].to(device)
    ends = torch.tensor(sorted(policy.end_ids), device=device)
    batch = _Batch(policy, requests)
    logits = batch.read_prompts()
    source = source.to(device)
    batch.keep(source)
    logits = logits[source]
    produced = torch.full((len(source), max(limits)), -1, dtype=torch.long, device=device)
    rows = torch.arange(len(source), device=device)
    running = torch.ones(len(source), dtype=torch.bool, device=device)
    for position in range(max(limits)):
        token = _pick(logits, noise[rows, position], temperature=temperature, top_p=top_p)
        produced[rows[running], position] = token[running]
        running = running & ~torch.isin(token, ends) & (limit[rows] > position + 1)
        left = int(running.sum())
        if left == 0:
            break
        if left <= _COMPACT_BELOW * len(rows):
            kept = running.nonzero()[:, 0]
            batch.keep(kept)
            rows, token, running = rows[kept], token[kept], running[kept]
        logits = batch.read_tokens(token)
    return [_response(policy, ids) for ids in produced.tolist()]


class _Batch:
    """The rows being decoded: their cache, and mask and positions where prompts are padded on the left."""

    def __init__(self, policy: Policy, requests: Sequence[SamplingRequest]) -> None:
        lengths = torch.tensor([len(request.prompt_ids) for request in requests])
        width = int(lengths.max())
        ids = torch.full((len(requests), width), policy.pad_id)
        for row, request in enumerate(requests):
            ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        self._policy = policy
        self._ids = ids.to(policy.device)
        self._next = lengths.to(policy.device)
        padded = bool((lengths < width).any())
        columns = torch.arange(width)[None, :]
        # Rows of equal length need no mask, and attention without one is faster.
        self._mask = (columns >= width - lengths[:, None]).long().to(policy.device) if padded else None
        self._cache = DynamicCache(config=policy.model.config)

    def read_prompts(self) -> Tensor:
        """Returns the logits (prompts, V) of every prompt's first answer token."""
        width = self._ids.shape[1]
        columns = torch.arange(width, device=self._ids.device)[None, :]
        positions = (columns - width + self._next[:, None]).clamp(min=0)
        return self._forward(self._ids, positions)

    def read_tokens(self, token: Tensor) -> Tensor:
        """Appends a token (B,) to every row and returns the next logits (B, V)."""
        positions = self._next[:, None]
        self._next = self._next + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], dim=1)
        return self._forward(token[:, None], positions)

    def keep(self, index: Tensor) -> None:
        """Replaces the rows by those at the index, which may repeat."""
        self._cache.reorder_cache(index)
        self._next = self._next[index]
        if self._mask is not None:
            self._mask = self._mask[index]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra = {"logits_to_keep": 1} if self._policy.keeps_logits else {}
        output = self._policy.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **extra,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def _noise(requests: Sequence[SamplingRequest], width: int) -> Tensor:
    """Returns uniform numbers in [0, 1), float64 (rows, width), from one generator per request."""
    generator = torch.Generator()
    blocks = []
    for request in requests:
        generator.manual_seed(request.seed)
        # One row at a time: a row's numbers then don't depend on how many rows there are.
        blocks += [torch.rand(width, generator=generator, dtype=torch.float64) for _ in range(request.count)]
    return torch.stack(blocks)


def _pick(logits: Tensor, noise: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Returns one token per row of logits (B, V) by inverting the distribution at noise (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    # Float64: in float32 the sums over a large vocabulary lose its rare tokens.
    summed = probabilities.double().cumsum(dim=-1)
    wanted = noise * summed[:, -1]
    token = torch.searchsorted(summed, wanted[:, None], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


def _response(policy: Policy, ids: Sequence[int]) -> SampledResponse:
    """Splits a row, padded with -1, into response and end token."""
    produced = [token for token in ids if token >= 0]
    if produced[-1] in policy.end_ids:
        return SampledResponse(tuple(produced[:-1]), produced[-1])
    return SampledResponse(tuple(produced), None)
