"""Warm starts: each agent imitates worked answers, mostly of its own half of the numbers, and is annealed.

The learning rate falls to a tenth at the end. Without that, cooling alone would raise accuracy later and pass
for learning from peers.

On one torch thread of one kind of processor a warm start is a function of the design. Other kinds round
differently, and a tiny model's progress is sudden: so it watches how many sums it solves, cools down earlier
if it learns faster than planned, and heats up once more if the cooled model can do too little.
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
from hacrl_agents.demo.task import (
    any_warm_start_pair,
    draw_warm_start_pair,
    extract_answer,
    question,
    worked_answer,
)
from hacrl_agents.policy import Policy, make_policy
from hacrl_agents.samplers.transformers import SamplingRequest, sample

PEAK_LEARNING_RATE = 3e-3
ANNEALED_TO = 0.1
BATCH = 32
PROBE_EVERY = 20
"""Updates between looks at how many sums are solved."""
RIPE = 0.12
"""Share of sums solved greedily at the peak rate from which on cooling begins; cooling multiplies it."""
ABLE = 0.45
"""Share of sums solved by sampled answers that an annealed agent must reach."""
REHEATED = 60
"""Updates at the peak rate before a model that is not able cools down again."""
MOST_COOLDOWNS = 3

_FIRST_PROBE = 160
_PROBE_SUMS = 200
_MAX_TOKENS = 34
_RISE = 30
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
    policy = make_policy(model, tokenizer)
    rng = Random(f"{design.name}/{design.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.0)
    cooling_from = design.iterations - design.cooldown
    step = cooldowns = 0
    while True:
        if step == cooling_from + design.cooldown:
            cooldowns += 1
            if cooldowns == MOST_COOLDOWNS or solved_share(policy, temperature=1.0) >= ABLE:
                break
            cooling_from = step + REHEATED
        rate = learning_rate_factor(step, cooling_from=cooling_from, cooldown=design.cooldown)
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * rate
        ids, labels = _examples(tokenizer, rng, design=design)
        loss = _imitation_loss(model, ids, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % PROBE_EVERY == 0:
            if on_progress is not None:
                on_progress(step, float(loss.detach()))
            if _FIRST_PROBE <= step < cooling_from and solved_share(policy, temperature=0.0) >= RIPE:
                cooling_from = step
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def learning_rate_factor(step: int, *, cooling_from: int, cooldown: int) -> float:
    """Returns the learning rate at an update, as a share of the peak: up, flat, down to a tenth."""
    rising = (step + 1) / _RISE
    cooled = max(0.0, (step + 1 - cooling_from) / cooldown)
    return min(rising, 1.0 - (1.0 - ANNEALED_TO) * cooled)


def solved_share(policy: Policy, *, temperature: float) -> float:
    """Returns the share of some sums of the warm starts' world that an answer each solves; 0 is greedy."""
    rng = Random("probe")
    pairs = [any_warm_start_pair(rng) for _ in range(_PROBE_SUMS)]
    encoded = policy.tokenizer([f"{question(*pair)} " for pair in pairs], add_special_tokens=False)[
        "input_ids"
    ]
    requests = [SamplingRequest(tuple(ids), 1, seed=seed) for seed, ids in enumerate(encoded)]
    answers = sample(policy, requests, max_tokens=_MAX_TOKENS, temperature=temperature)
    texts = [policy.tokenizer.decode(list(answer.token_ids)) for (answer,) in answers]
    solved = [extract_answer(text) == str(sum(pair)) for text, pair in zip(texts, pairs, strict=True)]
    return sum(solved) / len(solved)


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
