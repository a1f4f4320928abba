"""Held-out accuracy of a model on the demo's task: greedy for the report, sampled for the start's quality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hacrl_agents.demo.decoding import decode, encode_prompts
from hacrl_agents.demo.task import Problem, accuracy

MAX_NEW_TOKENS = 34
"""The longest worked answer has 31 characters and an EOS."""
_BATCH = 256


def greedy_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, problems: Sequence[Problem]
) -> float:
    """Returns the share of problems solved by the most likely answer."""
    return accuracy(problems, answers(model, tokenizer, problems=problems))


def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, problems: Sequence[Problem], seed: int
) -> float:
    """Returns the share of problems solved by one answer sampled at temperature 1."""
    return accuracy(problems, answers(model, tokenizer, problems=problems, seed=seed))


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    problems: Sequence[Problem],
    seed: int | None = None,
) -> list[str]:
    """Returns one answer per problem: the greedy one, or with a seed a sampled one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    texts: list[str] = []
    for start in range(0, len(problems), _BATCH):
        part = problems[start : start + _BATCH]
        ids, mask = encode_prompts(tokenizer, [problem.question for problem in part])
        tokens = decode(
            model,
            ids,
            prompt_mask=mask,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_new_tokens=MAX_NEW_TOKENS,
            generator=generator,
        )
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    model.train(was_training)
    return texts
