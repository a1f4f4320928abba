"""The verifiers that come with the exchange."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hacrl_exchange.types import Prompt, Scored
from hacrl_verifiers.builtin._answers import last_boxed, last_tagged, reference_text
from hacrl_verifiers.builtin.boxed import boxed, normalised
from hacrl_verifiers.builtin.exact_match import exact_match
from hacrl_verifiers.isolation import Job, Pool, Responses
from hacrl_verifiers.registry import installed


def test_the_built_ins_are_registered_like_any_other() -> None:
    points = installed()

    assert {name: point.value for name, point in points.items()} == {
        "boxed": "hacrl_verifiers.builtin.boxed:boxed",
        "exact_match": "hacrl_verifiers.builtin.exact_match:exact_match",
        "math": "hacrl_verifiers.builtin.math:math",
        "reasoning_gym": "hacrl_verifiers.builtin.reasoning_gym:reasoning_gym",
    }


# answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 4 </answer>", "4"),
        ("<answer>3</answer> no, <answer>4</answer> done", "4"),
        ("<answer>3</answer> then <answer>4", "3"),
        ("<answer><answer>4</answer>", "4"),
        ("<answer></answer>", ""),
        ("the answer is 4", None),
        ("</answer>4<answer>", None),
    ],
)
def test_the_last_complete_tag_counts(text: str, answer: str | None) -> None:
    assert last_tagged(text, "answer") == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed{3} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} or \fbox{5}", "5"),
        (r"$\boxed 7$ is it", "7"),
        (r"\boxed{3} and \boxed{4", None),
        (r"\boxedx", None),
        ("4", None),
        (r"\boxed{" * 100_000, None),
    ],
)
def test_the_last_box_counts(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


def test_a_reference_is_a_text_a_number_or_has_an_answer() -> None:
    assert [reference_text(given) for given in ("a", 3, 0.5, {"answer": "b"})] == ["a", "3", "0.5", "b"]
    for broken in (None, True, ["a"], {"question": "?"}):
        with pytest.raises(ValueError, match=r"The reference must be a text, a number or have an "):
            reference_text(broken)


# boxed


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\frac{1}2 ", r"\frac{1}2"),
        ("1/2", r"\frac{1}{2}"),
        ("-3/4", r"\frac{-3}{4}"),
        ("0.5", r"\frac{1}{2}"),
        (".5", r"\frac{1}{2}"),
        ("x = 5", "5"),
        ("f(x) = 5", "f(x)=5"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"\sqrt{3}", r"\sqrt{3}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"\$12.50", "12.50"),
        (r"40\%", "40"),
        (r"10\text{ cm}", "10"),
        (r"1,\!000", "1,000"),
        ("a/b", "a/b"),
    ],
)
def test_typesetting_is_normalised(text: str, same: str) -> None:
    assert normalised(text) == same


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        (r"Thus \boxed{\dfrac12}", "1/2", 1.0),
        (r"\boxed{3}", 3, 1.0),
        (r"\boxed{3}", r"We get $\boxed{3}$.", 1.0),
        (r"\boxed{4}", "3", 0.0),
        (r"\boxed{2/4}", "1/2", 0.0),
        ("3", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_boxed_scores_one_or_zero(response: str, reference: Any, score: float) -> None:
    assert boxed(response, reference) == score


# exact_match


def test_exact_match_ignores_surrounding_space_and_case_on_request() -> None:
    assert exact_match(" Paris\n", "Paris") == 1.0
    assert exact_match("paris", "Paris") == 0.0
    assert exact_match("paris", "Paris", case_sensitive=False) == 1.0
    assert exact_match("4", 4) == 1.0


# math


@pytest.fixture(scope="module")
def math() -> Any:
    return pytest.importorskip("hacrl_verifiers.builtin.math", exc_type=ImportError).math


@pytest.mark.parametrize(
    ("response", "reference", "score"),
    [
        (r"so \boxed{0.5}", "1/2", 1.0),
        ("The answer is $x^2+2x+1$.", "(x+1)^2", 1.0),
        (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}", 1.0),
        ("I get 7", 7, 1.0),
        ("I get 8", 7, 0.0),
        ("no idea", r"\frac{1}{2}", 0.0),
        ("", "3", 0.0),
        (r"\boxed{3}", "whole solution: $x = 3$", 1.0),
    ],
)
def test_math_compares_values(math: Any, response: str, reference: Any, score: float) -> None:
    assert math(response, reference) == score


def test_math_raises_when_the_reference_does_not_parse(math: Any) -> None:
    with pytest.raises(ValueError, match="holds nothing that math-verify can parse"):
        math("3", "")


def test_math_uses_no_alarm(math: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("alarms belong to nobody: the worker kills")

    monkeypatch.setattr("signal.alarm", refuse)

    assert math(r"\boxed{3}", "3") == 1.0


# reasoning_gym


@pytest.fixture(scope="module")
def reasoning_gym() -> Any:
    return pytest.importorskip("hacrl_verifiers.builtin.reasoning_gym", exc_type=ImportError).reasoning_gym


def _entry(family: str) -> Any:
    import reasoning_gym as library

    return json.loads(json.dumps(library.create_dataset(family, size=1, seed=7)[0]))


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting", "basic_arithmetic", "sudoku"])
def test_only_the_tagged_answer_counts(reasoning_gym: Any, family: str) -> None:
    entry = _entry(family)
    answer = entry["answer"]

    assert reasoning_gym(f"I think <answer>{answer}</answer>", entry) == 1.0
    assert reasoning_gym(f"It is {answer}.", entry) == 0.0
    assert reasoning_gym(f"{answer} <answer>surely wrong</answer>", entry) < 0.1
    assert reasoning_gym(f"<final>{answer}</final>", entry, answer_tag="final") == 1.0


def test_a_reference_without_family_raises(reasoning_gym: Any) -> None:
    broken: list[Any] = [None, "4", {"answer": "4"}, {"metadata": {}}]
    for reference in broken:
        with pytest.raises(ValueError, match="metadata names its source_dataset"):
            reasoning_gym("<answer>4</answer>", reference)


def test_an_unknown_family_raises(reasoning_gym: Any) -> None:
    with pytest.raises(ValueError, match="not registered"):
        reasoning_gym("<answer>4</answer>", {"metadata": {"source_dataset": "no such family"}})


# all of them, as a worker runs them


@pytest.mark.slow
def test_every_built_in_runs_in_a_child_under_its_limits(reasoning_gym: Any, math: Any) -> None:
    entry = _entry("chain_sum")
    cases = {
        "boxed": (r"\boxed{4}", "4"),
        "exact_match": ("4", "4"),
        "math": (r"\boxed{\frac{8}{2}}", "4"),
        "reasoning_gym": (f"<answer>{entry['answer']}</answer>", entry),
    }
    with Pool() as pool:
        assert [offered.name for offered in pool.offered] == sorted(cases)
        for name, (response, reference) in cases.items():
            responses = Responses(Prompt("p", ()), json.dumps(reference), (response, "no"))
            judgements = pool.slots[0].run(Job(name, "{}", 30.0, (responses,)))
            assert [judgement.verdict for judgement in judgements] == [Scored(1.0), Scored(0.0)]
