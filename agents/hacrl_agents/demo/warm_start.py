"""Warm starts: each agent imitates worked answers, mostly of its own half of the numbers, and is annealed.

The learning rate falls to a tenth at the end. Without that, cooling alone would raise accuracy later and pass
for learning from peers. A warm start is a function of the design, on one torch thread.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hacrl_agents.demo.models import AgentDesign, build_agent
from hacrl_agents.demo.task import draw_warm_start_pair, question, worked_answer

PEAK_LEARNING_RATE = 3e-3
ANNEALED_TO = 0.1
BATCH = 32

_WARMUP = 30
_IGNORED = -100


def warm_start(
    design: AgentDesign,
    directory: Path,
    *,
    on_progress: Callable[[int, float], None] | None = None,
) -> Path:
    """Trains the agent and saves model and tokenizer into the directory, which `AutoModelForCausalLM` loads.

    Args:
        design: what to build and how long to train it.
        directory: made if missing.
        on_progress: called with the updates made and the loss, every 20 updates.
    """
    model, tokenizer = build_agent(design)
    rng = Random(f"{design.name}/{design.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(design, step))
    model.train()
    for iteration in range(design.iterations):
        ids, labels = _examples(tokenizer, rng, design=design)
        loss = _imitation_loss(model, ids, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_progress is not None and (iteration + 1) % 20 == 0:
            on_progress(iteration + 1, float(loss.detach()))
    model.eval()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def learning_rate_factor(design: AgentDesign, step: int) -> float:
    """Returns the learning rate at an update, as a share of the peak: up, flat, then down to a tenth."""
    rising = (step + 1) / _WARMUP
    left = (design.iterations - step) / design.cooldown
    return min(1.0, rising, ANNEALED_TO + (1 - ANNEALED_TO) * left)


def _examples(
    tokenizer: PreTrainedTokenizerFast, rng: Random, *, design: AgentDesign
) -> tuple[Tensor, Tensor]:
    """Returns ids and labels (B, T), right-padded; only the answer and its EOS are labelled.

    Prompt and answer are encoded apart, as in training from rollouts, so no token spans both.
    """
    pairs = [
        draw_warm_start_pair(rng, parity=design.parity, own_share=design.own_share) for _ in range(BATCH)
    ]
    prompts = tokenizer([f"{question(first, second)} " for first, second in pairs], add_special_tokens=False)[
        "input_ids"
    ]
    answers = tokenizer([worked_answer(first, second) for first, second in pairs], add_special_tokens=False)
    rows = [
        (prompt, [*answer, tokenizer.eos_token_id])
        for prompt, answer in zip(prompts, answers["input_ids"], strict=True)
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((BATCH, width), tokenizer.pad_token_id)
    labels = torch.full((BATCH, width), _IGNORED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def _imitation_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the labelled tokens. Padding on the right needs no mask."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
