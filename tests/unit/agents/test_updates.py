from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hacrl_agents.errors import TrainingDivergedError
from hacrl_agents.hacpo import PAPER, HacpoConfig, hacpo_loss
from hacrl_agents.lessons import Sample
from hacrl_agents.logprobs import Row, all_log_probs, response_log_probs
from hacrl_agents.minibatching import Minibatch
from hacrl_agents.objectives import OBJECTIVES, LossInputs
from hacrl_agents.policy import Policy
from hacrl_agents.updates import accumulate_gradient, make_optimizer, run_updates

VECTORS = Path(__file__).parents[2] / "vectors" / "hacpo-vectors.json"
CASES = {case["name"]: case for case in json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]}
HACPO = OBJECTIVES["hacpo"]
ROWS = (
    Row((3, 20, 4), (40, 41, 42, 1)),
    Row((3, 20, 4), (50, 1)),
    Row((3, 21, 22, 23, 4), (60, 61, 62)),
    Row((3, 21, 22, 23, 4), (70, 71, 72, 73, 74)),
)


def sample(policy: Policy, row: Row, *, own: bool, advantage: float, shift: float = 0.0) -> Sample:
    (log_probs,) = all_log_probs(policy, [row], micro_batch=1)
    return Sample(
        source="a" if own else "b",
        prompt_id=str(row.prompt_ids),
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        source_mean=float(log_probs.double().mean()) + shift,
        advantage=advantage,
        is_self=own,
        capability_ratio=1.0 if own else 1.3,
    )


@pytest.fixture
def minibatch(llama: Policy) -> Minibatch[Sample]:
    own = (True, False, False, True)
    advantages = (0.5, -0.6, 0.7, -0.8)
    shifts = (0.0, 0.1, 0.05, 0.0)
    return Minibatch(
        "a",
        tuple(
            sample(llama, row, own=is_own, advantage=advantage, shift=shift)
            for row, is_own, advantage, shift in zip(ROWS, own, advantages, shifts, strict=True)
        ),
        planned_samples=6,
    )


def gradient(policy: Policy, minibatch: Minibatch[Sample], **changes: Any) -> tuple[float, list[Tensor]]:
    policy.model.zero_grad(set_to_none=True)
    settings: dict[str, Any] = {"index": 2, "objective": HACPO, "config": PAPER, "micro_batch": 8}
    loss, _ = accumulate_gradient(policy, minibatch, **(settings | changes))
    return loss, [
        parameter.grad.clone() for parameter in policy.model.parameters() if parameter.grad is not None
    ]


def test_the_gradient_is_that_of_the_hacpo_loss(llama: Policy, minibatch: Minibatch[Sample]) -> None:
    loss, found = gradient(llama, minibatch)

    llama.model.zero_grad(set_to_none=True)
    samples = minibatch.samples
    log_probs, mask = response_log_probs(llama, samples)
    expected, _ = hacpo_loss(
        log_probs,
        mask,
        torch.tensor([each.source_mean for each in samples], dtype=torch.float64),
        torch.tensor([each.advantage for each in samples]),
        torch.tensor([each.is_self for each in samples]),
        torch.tensor([each.capability_ratio for each in samples]),
        minibatch_index=2,
        planned_samples=6,
    )
    expected.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    wanted = [parameter.grad for parameter in llama.model.parameters() if parameter.grad is not None]

    assert loss == pytest.approx(float(expected.detach()), abs=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    assert any(float(one.abs().max()) > 1e-3 for one in found)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_only_accumulate(micro_batch: int, llama: Policy, minibatch: Minibatch[Sample]) -> None:
    whole_loss, whole = gradient(llama, minibatch, micro_batch=4)
    loss, parts = gradient(llama, minibatch, micro_batch=micro_batch)

    assert loss == pytest.approx(whole_loss, abs=1e-6)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_loss_08_micro_batches_add_up_to_the_minibatch_mean() -> None:
    case: dict[str, Any] = CASES["loss_08_microbatch_accumulation"]
    given, expected = case["inputs"], case["expected"]
    names = ("self_clip_low", "self_clip_high", "alpha", "max_abs_log_ratio")
    config = HacpoConfig(
        cross_delta=given["config"]["cross_clip_delta"],
        cross_step=given["config"]["cross_clip_step"],
        **{name: given["config"][name] for name in names},
    )
    log_probs = torch.tensor(given["target_log_probs"], dtype=torch.float64, requires_grad=True)
    total = 0.0
    for start, end in given["split"]:
        inputs = LossInputs(
            target_log_probs=log_probs[start:end],
            target_mask=torch.tensor(given["target_mask"])[start:end],
            source_mean_log_probs=torch.tensor(given["source_mean_log_probs"], dtype=torch.float64)[
                start:end
            ],
            advantages=torch.tensor(given["advantages"], dtype=torch.float64)[start:end],
            is_self=torch.tensor(given["is_self"])[start:end],
            capability_ratio=torch.tensor(given["source_to_target_capability_ratio"])[start:end].double(),
        )
        loss, _ = HACPO.loss(inputs, given["m"], config, len(given["advantages"]))
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        total += float(loss.detach())

    assert total == pytest.approx(expected["accumulated_loss"], abs=1e-6)
    assert log_probs.grad is not None
    torch.testing.assert_close(
        log_probs.grad, torch.tensor(expected["accumulated_grad"], dtype=torch.float64), atol=1e-7, rtol=1e-6
    )


def test_length_norm_source_compares_sums_over_the_sources_tokens(llama: Policy) -> None:
    row = ROWS[2]
    (log_probs,) = all_log_probs(llama, [row], micro_batch=1)
    scaled = replace(
        sample(llama, row, own=False, advantage=1.0),
        source_mean=float(log_probs.sum()) / 6,
        length_scale=3 / 6,
    )
    _, (metrics,) = accumulate_gradient(
        llama, Minibatch("b", (scaled,), 1), index=0, objective=HACPO, config=PAPER, micro_batch=1
    )

    assert float(metrics["ratio"]) == pytest.approx(1.0, abs=1e-5)


def update(policy: Policy, plan: list[Minibatch[Sample]], **changes: Any) -> Any:
    optimizer = make_optimizer(policy, learning_rate=1.0, betas=(0.9, 0.99), weight_decay=0.0)
    settings: dict[str, Any] = {
        "objective": HACPO,
        "config": PAPER,
        "learning_rate": 1e-3,
        "micro_batch": 2,
        "max_grad_norm": 1.0,
    }
    return run_updates(policy, optimizer, plan, **(settings | changes))


def test_every_minibatch_is_one_update_and_the_index_is_m(
    new_policy: Callable[..., Policy], minibatch: Minibatch[Sample]
) -> None:
    seen = []

    def spy(inputs: LossInputs, index: int, config: HacpoConfig, planned: int) -> Any:
        seen.append((index, len(inputs.advantages), planned))
        return HACPO.loss(inputs, index, config, planned)

    report = update(new_policy("llama"), [minibatch, minibatch], objective=replace(HACPO, loss=spy))

    assert report.updates == len(report.losses) == len(report.gradient_norms) == 2
    assert seen == [(0, 2, 6), (0, 2, 6), (1, 2, 6), (1, 2, 6)]


def test_updates_lower_the_loss_of_what_they_train_on(llama: Policy, minibatch: Minibatch[Sample]) -> None:
    own = replace(minibatch, samples=tuple(s for s in minibatch.samples if s.is_self), planned_samples=2)
    wide = HacpoConfig(self_clip_low=10.0, self_clip_high=10.0)
    report = update(llama, [own] * 4, config=wide)

    assert report.losses[0] == pytest.approx(0.15, abs=1e-5)
    assert list(report.losses) == sorted(report.losses, reverse=True)


def test_the_first_own_minibatch_has_ratio_one(llama: Policy, minibatch: Minibatch[Sample]) -> None:
    own = replace(minibatch, samples=tuple(s for s in minibatch.samples if s.is_self))
    report = update(llama, [own])

    assert report.ratios["own_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert report.ratios["own_clipped"] == 0.0


def test_a_gradient_that_is_not_finite_stops_the_training_before_the_update(
    llama: Policy, minibatch: Minibatch[Sample]
) -> None:
    broken = replace(minibatch, samples=(replace(minibatch.samples[0], advantage=float("inf")),))
    before = [parameter.detach().clone() for parameter in llama.model.parameters()]

    with pytest.raises(
        TrainingDivergedError, match=r"^The gradient of update 1 of the step is (nan|inf): go on "
    ):
        update(llama, [broken])
    assert all(torch.equal(a, b) for a, b in zip(before, llama.model.parameters(), strict=True))
