from __future__ import annotations

from pathlib import Path

import pytest

from hacrl_agents.errors import EvaluationFileError
from hacrl_agents.evaluation import (
    HeldOut,
    accuracy,
    exact_match,
    greedy_answers,
    load_scorer,
    read_held_out,
)
from hacrl_agents.policy import Policy
from hacrl_exchange.types import Message, Prompt


def test_accuracy_is_the_share_of_greedy_answers_that_score(
    qwen: Policy, prompts: tuple[Prompt, ...]
) -> None:
    answers = greedy_answers(qwen, prompts, max_tokens=8)
    right = [HeldOut(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    wrong = [HeldOut(prompt, "something else entirely") for prompt in prompts]

    assert accuracy(qwen, right, max_tokens=8) == 1.0
    assert accuracy(qwen, [*right[:2], *wrong[:6]], max_tokens=8) == 0.25


def test_partial_credit_does_not_count(qwen: Policy, prompts: tuple[Prompt, ...]) -> None:
    held_out = [HeldOut(prompt, None) for prompt in prompts]

    assert accuracy(qwen, held_out, max_tokens=4, scorer=lambda text, reference: 0.5) == 0.0


def test_an_accuracy_over_nothing_is_refused(qwen: Policy) -> None:
    with pytest.raises(ValueError, match=r"^There is no held-out prompt: "):
        accuracy(qwen, [], max_tokens=4)


@pytest.mark.parametrize(
    ("text", "score"),
    [("5", 1.0), (" 5\n", 1.0), ("1+4<answer>5</answer>", 1.0), ("<answer>4</answer>5", 0.0), ("15", 0.0)],
)
def test_exact_match_takes_the_answer_or_the_whole_text(text: str, score: float) -> None:
    assert exact_match(text, 5) == score


def test_held_out_prompts_are_the_lines_that_pools_take(tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    path.write_text(
        '{"id": "x", "prompt": "1+1?", "reference": "2"}\n\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],'
        ' "reference": 3}\n'
    )

    assert read_held_out(path) == [
        HeldOut(Prompt("x", (Message("user", "1+1?"),)), "2"),
        HeldOut(Prompt("line-3", (Message("system", "s"), Message("user", "u"))), 3),
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "no reference"}', '{"reference": 1}'])
def test_a_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    path.write_text(f'{{"prompt": "a", "reference": 1}}\n{line}\n')

    with pytest.raises(EvaluationFileError, match=r"^Line 2 of .*held-out\.jsonl is not like "):
        read_held_out(path)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationFileError, match=r"cannot be read"):
        read_held_out(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationFileError, match=r"holds no prompt: check --eval-file\.$"):
        read_held_out(tmp_path / "empty.jsonl")


def test_a_scorer_is_named_by_module_and_function() -> None:
    assert load_scorer("hacrl_agents.evaluation:exact_match") is exact_match
    with pytest.raises(EvaluationFileError, match=r"^The scorer nowhere:x cannot be imported "):
        load_scorer("nowhere:x")
