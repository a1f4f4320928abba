from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hacrl_agents.checkpoint import TrainerState, latest_checkpoint, read_state, restore
from hacrl_agents.hacpo import HacpoConfig
from hacrl_agents.metrics import StepLines, StepReport
from hacrl_agents.policy import Policy, load_policy
from hacrl_agents.settings import TrainerSettings
from hacrl_agents.trainer import Trainer
from hacrl_exchange.types import Group, PoolSpec, Prompt, VerifiedGroup

STEPS = 4
SETTINGS = TrainerSettings(
    hacpo=HacpoConfig(self_clip_low=0.05, self_clip_high=0.05),
    max_tokens=16,
    minibatch_prompts=2,
    micro_batch=4,
    learning_rate=1e-3,
    warmup_steps=2,
)


@pytest.fixture
def pool(
    new_pool: Callable[..., Any],
    spec: PoolSpec,
    prompts: tuple[Prompt, ...],
    judge: Callable[..., VerifiedGroup],
    foreign_group: Callable[..., Group],
) -> Callable[..., Any]:
    """A pool of agent "a" with a peer that answers every prompt with the same three texts."""

    def peers(step: int, chosen: Sequence[Prompt]) -> list[VerifiedGroup]:
        return [judge("b", foreign_group(p.prompt_id, [f"{step}", "no", "the man"])) for p in chosen]

    def build(**changes: Any) -> Any:
        plain = {"name": "a", "spec": spec, "prompts": prompts, "steps_left": STEPS, "peers": peers}
        return new_pool(**(plain | changes))

    return build


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start(policy: Policy, folder: Path | None = None, settings: TrainerSettings = SETTINGS) -> Trainer:
    return Trainer(policy, settings, state=TrainerState("math", "a"), checkpoints=folder)


def resume(folder: Path, settings: TrainerSettings = SETTINGS) -> Trainer:
    path = latest_checkpoint(folder)
    assert path is not None
    trainer = Trainer(load_policy(path), settings, state=read_state(path), checkpoints=folder)
    restore(path, trainer.policy, trainer.optimizer)
    return trainer


def test_a_run_trains_every_step_on_own_and_peers_rollouts(pool: Callable[..., Any], llama: Policy) -> None:
    before = weights(llama)
    reports: list[StepReport] = []
    state = start(llama).run(pool(), on_step=reports.append)

    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert [report.learning_rate for report in reports] == [0.5e-3, 1e-3, 1e-3, 1e-3]
    assert [report.updates for report in reports] == [4, 8, 12, 16]
    assert {report.peer_rollouts_used for report in reports} == {12}
    assert (state.step, state.steps_trained, state.updates) == (4, 4, 16)
    assert not same(before, weights(llama))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    pool: Callable[..., Any], new_policy: Callable[..., Policy]
) -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        policy = new_policy("llama")
        start(policy, settings=replace(SETTINGS, seed=seed)).run(pool())
        return weights(policy)

    assert same(trained(1), trained(1))
    assert not same(trained(1), trained(2))


@pytest.mark.parametrize("killed_in", [1, 2, 4])
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_killed_between_publishing_and_checkpoint_ends_with_the_same_bits(
    killed_in: int, every: int, pool: Callable[..., Any], new_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, checkpoint_every=every)
    whole = start(new_policy("llama"), tmp_path / "whole", settings)
    whole.run(pool())

    first = pool(crash_before_batch=killed_in)
    with pytest.raises(ConnectionAbortedError):
        start(new_policy("llama"), tmp_path / "cut", settings).run(first)
    again = resume(tmp_path / "cut", settings)
    second = pool(stored=first.stored, session=2, resume_after=again.state.step)
    again.run(second)

    assert again.state == whole.state
    assert same(weights(again.policy), weights(whole.policy))


def test_committed_groups_are_not_published_again(
    pool: Callable[..., Any], new_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    first = pool(crash_before_batch=2)
    with pytest.raises(ConnectionAbortedError):
        start(new_policy("llama"), tmp_path).run(first)
    missing = first.stored.pop((2, "p5"))
    second = pool(stored=first.stored, session=2, resume_after=1, steps_left=2)
    resume(tmp_path).run(second)

    (published,) = second.published
    assert replace(published, policy_start=missing.policy_start, policy_end=missing.policy_end) == missing
    assert published.policy_start == replace(missing.policy_start, session=2)


def test_a_replayed_step_that_closed_without_some_own_groups_is_learned_from_without_sampling(
    pool: Callable[..., Any], llama: Policy
) -> None:
    closed = pool(closed=frozenset({1}), steps_left=1)
    reports: list[StepReport] = []
    start(llama).run(closed, on_step=reports.append)

    assert closed.published == []
    assert reports[0].sources["a"].rollouts == 0
    assert reports[0].sources["b"].rollouts == 12


def test_gspo_trains_alone_in_a_pool_of_one(pool: Callable[..., Any], llama: Policy) -> None:
    reports: list[StepReport] = []
    alone = pool(peers=lambda step, prompts: [], agents=("a",))
    start(llama, settings=replace(SETTINGS, objective="gspo")).run(alone, on_step=reports.append)

    assert [len(report.losses) for report in reports] == [2, 2, 2, 2]
    assert {report.peer_rollouts_used for report in reports} == {0}


def test_steps_are_counted_and_end_the_run(pool: Callable[..., Any], llama: Policy) -> None:
    trainer = start(llama, settings=replace(SETTINGS, steps=2))
    trainer.run(pool())
    trainer.run(pool())

    assert trainer.state.steps_trained == 2


def test_a_step_without_quorum_is_skipped_on_request(pool: Callable[..., Any], llama: Policy) -> None:
    before = weights(llama)
    reports: list[StepReport] = []
    state = start(llama, settings=replace(SETTINGS, on_degraded="skip")).run(
        pool(quorum_met=False), on_step=reports.append
    )

    assert (state.step, state.steps_trained, state.updates) == (4, 0, 0)
    assert {report.trained for report in reports} == {False}
    assert same(before, weights(llama))


def test_the_pools_token_limit_binds_the_sampler(
    pool: Callable[..., Any], spec: PoolSpec, llama: Policy
) -> None:
    short = pool(spec=replace(spec, max_tokens=3), steps_left=1)
    start(llama).run(short)

    assert {group.sampling.max_tokens for group in short.published} == {3}
    assert max(rollout.token_count for group in short.published for rollout in group.rollouts) <= 3


def test_metrics_after_the_checkpoint_are_dropped_when_a_run_goes_on(
    pool: Callable[..., Any], llama: Policy, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = StepLines(path, resume_after=0)
    start(llama).run(pool(), on_step=lambda report: lines.append(report.as_line()))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "cut sh')
    again = StepLines(path, resume_after=2)

    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in kept] == [1, 2]
    assert kept[0]["sources"]["b"]["trained"] == 12
    assert (lines.steps, again.steps) == ({1, 2, 3, 4}, {1, 2})
