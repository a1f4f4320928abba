from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hacrl_agents.hacpo import PAPER, HacpoConfig, cross_lower_bound, scale_cross_step
from hacrl_agents.minibatching import Minibatch, plan_minibatches, source_order

VECTORS = Path(__file__).parents[2] / "vectors" / "hacpo-vectors.json"
CASES = {case["name"]: case for case in json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]}


@dataclass(frozen=True)
class Sampled:
    source: str
    prompt_id: str
    index: int = 0


def plan(
    samples: list[Sampled], sources: list[str], *, prompts: int, per_cut: int, group_size: int = 1
) -> list[Minibatch[Sampled]]:
    return plan_minibatches(
        samples,
        source_of=lambda sample: sample.source,
        prompt_of=lambda sample: sample.prompt_id,
        prompt_ids=[f"p{i}" for i in range(prompts)],
        sources=sources,
        minibatch_prompts=per_cut,
        group_size=group_size,
    )


def everything(agents: list[str], *, prompts: int, n: int) -> list[Sampled]:
    return [Sampled(a, f"p{i}", j) for i in range(prompts) for a in agents for j in range(n)]


@pytest.mark.parametrize("agents", [2, 3])
def test_acct_02_own_block_first_then_the_others_with_rising_bounds(agents: int) -> None:
    case: dict[str, Any] = CASES["acct_02_self_first_minibatch_order"]
    given = case["inputs"]
    names = ["cross1", "self", "cross2"][:agents]
    samples = everything(names, prompts=given["prompts"], n=given["n"])
    planned = plan(
        samples,
        source_order(names, learner="self", step=2),
        prompts=given["prompts"],
        per_cut=given["mini_batch_prompts"],
        group_size=given["n"],
    )
    config = HacpoConfig(cross_delta=given["delta"], cross_step=given["step"])

    found = [
        {"m": m, "block": each.source, "cross_lower": cross_lower_bound(m, config=config)}
        for m, each in enumerate(planned)
    ]
    assert found == case["expected"]["order_by_num_agents"][str(agents)]


@pytest.mark.parametrize(("setting", "agents", "n", "per_cut"), [("GSPO", 1, 8, 64), ("GSPOx2", 1, 16, 32)])
def test_acct_01_updates_of_an_agent_alone(setting: str, agents: int, n: int, per_cut: int) -> None:
    check_accounting(setting, agents, n, per_cut)


@pytest.mark.parametrize(("setting", "agents"), [("HACPO_2agents", 2), ("HACPO_3agents", 3)])
def test_acct_01_updates_of_several_agents(setting: str, agents: int) -> None:
    check_accounting(setting, agents, 8, 64)


def check_accounting(setting: str, agents: int, n: int, per_cut: int) -> None:
    case: dict[str, Any] = CASES["acct_01_updates_per_step"]
    expected, prompts = case["expected"][setting], case["inputs"]["prompts"]
    names = [f"a{i}" for i in range(agents)]
    samples = everything(names, prompts=prompts, n=n)
    planned = plan(samples, names, prompts=prompts, per_cut=per_cut, group_size=n)

    assert expected == {
        "rollouts_generated_per_agent_step": prompts * n,
        "samples_trained_per_agent_step": sum(len(each.samples) for each in planned),
        "samples_per_update": planned[0].planned_samples,
        "updates_per_agent_step": len(planned),
    }


def test_minibatches_never_mix_agents_and_keep_the_manifests_order() -> None:
    samples = everything(["b", "a"], prompts=5, n=2)
    planned = plan(samples, ["a", "b"], prompts=5, per_cut=2, group_size=2)

    assert [(each.source, [s.prompt_id for s in each.samples]) for each in planned] == [
        (source, cut)
        for source in ("a", "b")
        for cut in (["p0", "p0", "p1", "p1"], ["p2", "p2", "p3", "p3"], ["p4", "p4"])
    ]
    assert [each.planned_samples for each in planned] == [4, 4, 2, 4, 4, 2]


def test_a_minibatch_without_samples_does_not_exist_and_the_others_keep_their_cuts() -> None:
    samples = [Sampled("a", "p0"), Sampled("b", "p2"), Sampled("b", "p3")]
    planned = plan(samples, ["a", "b"], prompts=4, per_cut=2)

    assert [(each.source, len(each.samples), each.planned_samples) for each in planned] == [
        ("a", 1, 2),
        ("b", 2, 2),
    ]


def test_several_peers_take_turns_in_being_first() -> None:
    roster = ["w", "me", "x", "y"]
    orders = [source_order(roster, learner="me", step=step) for step in range(1, 5)]

    assert orders == [
        ["me", "x", "y", "w"],
        ["me", "y", "w", "x"],
        ["me", "w", "x", "y"],
        ["me", "x", "y", "w"],
    ]
    assert all(sorted(first) == sorted(second) for first, second in pairwise(orders))


def test_a_single_peer_has_nothing_to_rotate() -> None:
    assert {tuple(source_order(["b", "a"], learner="a", step=step)) for step in range(5)} == {("a", "b")}


@pytest.mark.parametrize("planned_updates", [2, 3, 4, 10, 64])
def test_the_last_update_of_a_step_meets_the_papers_last_bound(planned_updates: int) -> None:
    config = scale_cross_step(PAPER, planned_updates=planned_updates)

    assert cross_lower_bound(planned_updates - 1, config=config) == pytest.approx(0.875)
