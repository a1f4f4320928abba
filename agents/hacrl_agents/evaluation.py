"""Held-out accuracy: greedy answers to prompts with known references, judged by a scorer."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacrl_agents.errors import EvaluationFileError
from hacrl_agents.policy import Policy
from hacrl_agents.samplers.transformers import SamplingRequest, sample
from hacrl_agents.tokens import encode_prompt
from hacrl_exchange.types import Message, Prompt

Scorer = Callable[[str, Any], float]
"""(response text, reference) -> a score, at most 1."""


@dataclass(frozen=True)
class HeldOut:
    """A prompt that is never trained on, with its reference."""

    prompt: Prompt
    reference: Any


def exact_match(text: str, reference: Any) -> float:
    """Returns 1 if the text, or what stands in its last <answer> tags, is the reference; else 0."""
    _, opened, rest = text.rpartition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    given = answer if opened and closed else text
    return float(given.strip() == str(reference).strip())


def greedy_answers(
    policy: Policy, prompts: Iterable[Prompt], *, max_tokens: int, batch_rows: int = 256
) -> list[str]:
    """Returns the likeliest answer to every prompt, without special tokens."""
    requests = [SamplingRequest(encode_prompt(policy.tokenizer, prompt), 1) for prompt in prompts]
    answers = sample(policy, requests, max_tokens=max_tokens, temperature=0, batch_rows=batch_rows)
    return [
        policy.tokenizer.decode(
            list(response.token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for (response,) in answers
    ]


def accuracy(
    policy: Policy,
    held_out: Sequence[HeldOut],
    *,
    max_tokens: int,
    scorer: Scorer = exact_match,
    threshold: float = 0.999,
) -> float:
    """Returns the share of prompts whose greedy answer scores at least the threshold.

    Raises:
        ValueError: if there is no prompt.
    """
    if not held_out:
        raise ValueError("There is no held-out prompt: an accuracy over nothing has no value.")
    texts = greedy_answers(policy, (each.prompt for each in held_out), max_tokens=max_tokens)
    solved = sum(
        scorer(text, each.reference) >= threshold for text, each in zip(texts, held_out, strict=True)
    )
    return solved / len(held_out)


def read_held_out(path: Path) -> list[HeldOut]:
    """Reads the JSON lines that `hacrl prompts add` reads, too: prompt (or messages) and reference.

    Raises:
        EvaluationFileError: naming the line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationFileError(f"The file {path} cannot be read ({error}): check --eval-file.") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_held_out(json.loads(line), f"line-{number}"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EvaluationFileError(
                f'Line {number} of {path} is not like {{"prompt": "1 + 1?", "reference": "2"}} ({error!r}): '
                "mend or remove it."
            ) from error
    if not found:
        raise EvaluationFileError(f"The file {path} holds no prompt: check --eval-file.")
    return found


def load_scorer(name: str) -> Scorer:
    """Returns the function "module:function".

    Raises:
        EvaluationFileError: if there is none.
    """
    module, _, function = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise EvaluationFileError(
            f"The scorer {name} cannot be imported ({error}): name it module:function."
        ) from error
    found: Scorer = scorer
    return found


def _held_out(line: dict[str, Any], default_id: str) -> HeldOut:
    messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
    prompt = Prompt(
        prompt_id=str(line.get("id", default_id)),
        messages=tuple(Message(str(each["role"]), str(each["content"])) for each in messages),
    )
    return HeldOut(prompt, line["reference"])
