"""Batched decoding with a key-value cache, for evaluation: greedy, or sampled at temperature 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


def encode_prompts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns ids and mask (N, P), left-padded: one user message each, through the chat template."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in questions
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    *,
    prompt_mask: Tensor,
    eos_token_id: int,
    pad_token_id: int,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the new token ids (N, <= max_new_tokens), padded after the first EOS.

    Greedy without a generator, otherwise sampled at temperature 1 from the raw distribution. Rows stop
    costing nothing only when all have ended; the demo's answers have nearly the same length.
    """
    cache = DynamicCache()
    mask = prompt_mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    ids = prompt_ids
    running = torch.ones(len(ids), dtype=torch.bool)
    produced: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
        if generator is None:
            token = logits.argmax(dim=-1)
        else:
            token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        token = torch.where(running, token, torch.full_like(token, pad_token_id))
        produced.append(token)
        running = running & (token != eos_token_id)
        if not bool(running.any()):
            break
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(produced, dim=1)
