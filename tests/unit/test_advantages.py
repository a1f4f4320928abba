"""Rules of joint advantages that the shared vectors leave open."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hacrl_agents.hacpo import joint_advantages, joint_advantages_and_counts


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(actual: Tensor, expected: Any) -> None:
    close(actual, f64(expected))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-9)


def test_unscored_samples_are_left_out_and_never_count_as_failures() -> None:
    nan = math.nan
    capabilities = {"a": 0.5, "b": 0.5}
    with_gap, counts = joint_advantages_and_counts(
        f64([1, nan, 0, 1, nan, 1]),
        ["q"] * 6,
        ["a", "a", "a", "b", "b", "b"],
        learner="a",
        capabilities=capabilities,
    )
    without = joint_advantages(
        f64([1, 0, 1, 1]), ["q"] * 4, ["a", "a", "b", "b"], learner="a", capabilities=capabilities
    )

    close(with_gap[[0, 2, 3, 5]], without)
    assert with_gap[[1, 4]].tolist() == [0, 0]
    assert counts.unscored_samples == 2


def test_one_agent_is_a_plain_gspo_group_whatever_its_capability() -> None:
    rewards = f64([1, 0, 0, 1, 0.5, 0])
    advantages = joint_advantages(rewards, ["q"] * 6, ["a"] * 6, learner="a", capabilities={"a": 1e-8})

    close(advantages, (rewards - rewards.mean()) / (rewards.std() + 1e-6))


def test_without_history_the_ratio_is_one() -> None:
    ids, sources = ["q"] * 4, ["a", "a", "b", "b"]
    rewards = f64([1, 0, 0, 0])
    known = joint_advantages(rewards, ids, sources, learner="a", capabilities={"a": 0.5, "b": 0.5})

    assert joint_advantages(rewards, ids, sources, learner="a", capabilities={"a": 0.1}).equal(known)


def test_a_prompt_answered_by_others_only_teaches_nothing_unless_asked() -> None:
    ids, sources, rewards = ["q", "q"], ["b", "b"], f64([1, 0])
    zero, counts = joint_advantages_and_counts(rewards, ids, sources, learner="a", capabilities={})
    asked = joint_advantages(rewards, ids, sources, learner="a", capabilities={}, teach_foreign_only=True)

    assert zero.tolist() == [0, 0]
    assert counts.foreign_only == 1
    same(asked, [0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6)])


def test_a_foreign_only_baseline_above_one_falls_back_to_the_plain_mean() -> None:
    advantages = joint_advantages(
        f64([1, 0]),
        ["q", "q"],
        ["b", "b"],
        learner="a",
        capabilities={"a": 1, "b": 0.2},
        teach_foreign_only=True,
    )

    same(advantages.sum(), 0.0)


def test_one_sample_teaches_nothing() -> None:
    advantages, counts = joint_advantages_and_counts(
        f64([1, math.nan]), ["q", "q"], ["a", "b"], learner="a", capabilities={}
    )

    assert advantages.tolist() == [0, 0]
    assert counts.single == 1


def test_prompts_are_apart_and_need_not_be_neighbours() -> None:
    sources = ["a", "a", "b", "b"]
    capabilities = {"a": 0.6, "b": 0.3}
    first = joint_advantages(f64([1, 0, 0, 1]), ["p"] * 4, sources, learner="b", capabilities=capabilities)
    mixed = joint_advantages(
        f64([1, 1, 0, 1, 0, 1, 1, 1]),
        ["p", "q"] * 4,
        ["a", "a", "a", "a", "b", "b", "b", "b"],
        learner="b",
        capabilities=capabilities,
    )

    close(mixed[0::2], first)
    assert mixed[1::2].tolist() == [0, 0, 0, 0]


def test_advantages_of_graded_rewards_are_clamped_and_those_of_zero_and_one_are_not() -> None:
    ids, sources = ["q"] * 4, ["a", "a", "b", "b"]
    capabilities = {"a": 0.1, "b": 1.0}  # w(a, b) = 0.1
    near = f64([0.9, 0.9001, 0.9, 0.9001])

    advantages = joint_advantages(near, ids, sources, learner="a", capabilities=capabilities)

    assert advantages.tolist() == [10, 10, 10, 10]
    many = joint_advantages(
        f64([1] + [0] * 199), ["q"] * 200, ["a"] * 200, learner="a", capabilities=capabilities
    )
    assert float(many[0]) > 10


def test_clamped_ratios_and_guards_are_counted() -> None:
    _, counts = joint_advantages_and_counts(
        f64([1, 0, 1, 1, 1, 1, 0, 1]),
        ["p"] * 4 + ["q"] * 4,
        ["a", "a", "b", "b"] * 2,
        learner="a",
        capabilities={"a": 0.9, "b": 0.01},
    )

    assert (counts.prompts, counts.baseline_guarded, counts.clamped_ratios) == (2, 2, 1)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [([1.0], "give one of each per sample"), ([1.0, math.inf], "A reward is infinite")],
)
def test_rewards_that_do_not_fit_are_refused(rewards: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint_advantages(f64(rewards), ["q", "q"], ["a", "b"], learner="a", capabilities={})
