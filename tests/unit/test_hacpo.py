"""The functions of HACPO against the shared vectors, hand-computed cases and autograd."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hacrl_agents.hacpo import (
    HacpoConfig,
    cross_lower_bound,
    gspo_loss,
    hacpo_loss,
    joint_advantages,
    scale_cross_step,
    sequence_ratio,
    success_only_loss,
    summarize_metrics,
)
from hacrl_exchange.capability import CapabilityWindow

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "hacpo-vectors.json").read_text())
ANSWERED = {
    "advantage",
    "advantage_error",
    "capability",
    "sequence_ratio",
    "stepwise_bounds",
    "loss",
    "end_to_end",
}


def cases(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [case for case in VECTORS["cases"] if case["kind"] == kind], ids=lambda case: case["name"]
    )


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(actual: Tensor, expected: Any) -> None:
    close(actual.detach(), f64(expected))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-9)


def loss_config(values: dict[str, Any]) -> HacpoConfig:
    renamed = {"cross_clip_delta": "cross_delta", "cross_clip_step": "cross_step"}
    return HacpoConfig(**{renamed.get(name, name): value for name, value in values.items()})


def advantage_config(inputs: dict[str, Any]) -> HacpoConfig:
    return HacpoConfig(
        epsilon=inputs["epsilon"],
        normalize_by_std=inputs["normalize_by_std"],
        ratio_min=inputs["ratio_clamp"][0],
        ratio_max=inputs["ratio_clamp"][1],
        uniform_guard=inputs["uniform_guard"],
        baseline_guard=inputs["baseline_guard"],
    )


def advantages_of(inputs: dict[str, Any], config: HacpoConfig, *, strict: bool = True) -> Tensor:
    return joint_advantages(
        f64(inputs["rewards"]),
        inputs["prompt_ids"],
        inputs["source_agents"],
        learner=inputs["learner"],
        capabilities=inputs["capabilities"],
        config=config,
        strict=strict,
    )


def test_nineteen_cases_are_answered_here() -> None:
    assert sum(case["kind"] in ANSWERED for case in VECTORS["cases"]) == 19


@cases("advantage")
def test_advantages_agree_with_the_vectors(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    config = advantage_config(inputs)

    same(advantages_of(inputs, config), expected["advantages"])
    if "advantages_if_guards_off" in expected:
        unguarded = HacpoConfig(uniform_guard=False, baseline_guard=False)
        same(advantages_of(inputs, unguarded), expected["advantages_if_guards_off"])
    if "advantages_if_baseline_guard_off" in expected:
        unguarded = HacpoConfig(baseline_guard=False)
        same(advantages_of(inputs, unguarded), expected["advantages_if_baseline_guard_off"])


@cases("advantage_error")
def test_unequal_counts_are_an_error_only_when_strict(case: dict[str, Any]) -> None:
    message = r"^Prompt 'q0' has unequal counts of scored samples \(a 2, b 1\): "
    with pytest.raises(ValueError, match=message):
        advantages_of(case["inputs"], HacpoConfig(), strict=True)

    relaxed = advantages_of(case["inputs"], HacpoConfig(), strict=False)
    mean = (1.0 + 0.0 + 2.0 * 1.0) / 3  # w(a, b) = 0.5 / 0.25
    std = math.sqrt(1 / 3)
    same(relaxed, [(reward - mean) / (std + 1e-6) for reward in (1.0, 0.0, 1.0)])


@cases("sequence_ratio")
def test_sequence_ratios_agree_with_the_vectors(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    mask = f64(inputs["source_mask"])
    source_mean = (f64(inputs["source_log_probs"]) * mask).sum(1) / mask.sum(1)

    ratio = sequence_ratio(f64(inputs["target_log_probs"]), torch.tensor(inputs["target_mask"]), source_mean)

    same(ratio, case["expected"]["s"])


@cases("stepwise_bounds")
def test_the_stepwise_bound_agrees_with_the_vectors(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    config = HacpoConfig(cross_delta=inputs["delta"], cross_step=inputs["step"])

    lower = [cross_lower_bound(m, config=config) for m in inputs["m"]]

    assert lower == pytest.approx(case["expected"]["lower"], abs=1e-10)


@cases("loss")
def test_losses_and_gradients_agree_with_the_vectors(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    log_probs = f64(inputs["target_log_probs"]).requires_grad_()

    loss, metrics = hacpo_loss(
        log_probs,
        torch.tensor(inputs["target_mask"]),
        f64(inputs["source_mean_log_probs"]),
        f64(inputs["advantages"]),
        torch.tensor(inputs["is_self"]),
        f64(inputs["source_to_target_capability_ratio"]),
        minibatch_index=inputs["m"],
        config=loss_config(inputs["config"]),
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    same(loss, expected["loss"])
    assert log_probs.grad is not None
    same(log_probs.grad, expected["grad_target_log_probs"])
    same(metrics["objective"], expected["per_sample_objective"])
    same(metrics["ratio"], expected["sequence_ratio"])
    same(metrics["cross_lower"], expected["cross_lower"])


@cases("end_to_end")
def test_the_whole_chain_agrees_with_the_vectors(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    window = CapabilityWindow(inputs["per_step_rate"])
    for rates in zip(*inputs["per_step_rate"].values(), strict=True):
        window.record(dict(zip(inputs["per_step_rate"], rates, strict=True)))
    config = loss_config(inputs["config"])
    learner, sources = inputs["learner"], inputs["source_agents"]
    log_probs = f64(inputs["target_log_probs"]).requires_grad_()

    advantages = joint_advantages(
        f64(inputs["rewards"]),
        inputs["prompt_ids"],
        sources,
        learner=learner,
        capabilities=window.capabilities(),
        config=config,
        strict=True,
    )
    weights = f64([window.ratio(source, learner) for source in sources])
    is_self = torch.tensor([source == learner for source in sources])
    loss, metrics = hacpo_loss(
        log_probs,
        torch.tensor(inputs["target_mask"]),
        f64(inputs["source_mean_log_probs"]),
        advantages,
        is_self,
        weights,
        minibatch_index=inputs["m"],
        config=config,
    )
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    assert window.capabilities() == pytest.approx(expected["capabilities"], abs=1e-10)
    assert is_self.tolist() == expected["is_self"]
    same(advantages, expected["advantages"])
    same(weights, expected["source_to_target_capability_ratio"])
    same(loss, expected["loss"])
    assert log_probs.grad is not None
    same(log_probs.grad, expected["grad_target_log_probs"])
    same(metrics["objective"], expected["per_sample_objective"])


def test_one_prompt_computed_by_hand() -> None:
    """P_a 0.5, P_b 0.25, learner a: w(a, b) = 2.

    Rewards a 1, 0 and b 0, 1: mu = (1 + 0 + 0 + 2 * 1) / 4 = 0.75; std = sqrt(4 * 0.25 / 3) = 0.577350.
    A = 0.25 / std = 0.433012 for 1 and -0.75 / std = -1.299036 for 0 (epsilon 1e-6 takes 7.5e-7 and 2.3e-6).
    Foreign sample 3: mean log-prob -0.25 against -0.15, s = exp(-0.1) = 0.904837, inside [0.825, 1] at m = 1:
    objective = s * s * w(b, a) * A = 0.818731 * 0.5 * 0.433012 = 0.177260.
    """
    advantages = joint_advantages(
        f64([1, 0, 0, 1]), ["q"] * 4, ["a", "a", "b", "b"], learner="a", capabilities={"a": 0.5, "b": 0.25}
    )
    expected = f64([0.433012, -1.299036, -1.299036, 0.433012])
    torch.testing.assert_close(advantages, expected, atol=3e-6, rtol=0)

    loss, metrics = hacpo_loss(
        f64([[-0.3, -0.2]]),
        torch.ones(1, 2),
        f64([-0.15]),
        advantages[3:],
        torch.tensor([False]),
        f64([0.5]),
        minibatch_index=1,
    )

    assert float(loss) == pytest.approx(-0.177260, abs=1e-6)
    assert float(metrics["ratio"]) == pytest.approx(0.904837, abs=1e-6)
    assert not any(metrics[name] for name in ("cross_below", "cross_above", "own_clipped"))


def minibatch(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Own inside the wide clip, foreign inside the bounds, foreign below, foreign above."""
    log_probs = torch.tensor([[-0.2, -0.3], [-0.3, -0.4], [-2.0, -1.0], [-0.1, -0.1]], dtype=dtype)
    return {
        "target_log_probs": log_probs,
        "target_mask": torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]]),
        "source_mean_log_probs": torch.tensor([-0.25, -0.25, -0.25, -0.25], dtype=dtype),
        "advantages": torch.tensor([1.0, -0.5, 2.0, 1.5], dtype=dtype),
        "is_self": torch.tensor([True, False, False, False]),
        "capability_ratio": torch.tensor([1.0, 2.0, 2.0, 2.0], dtype=dtype),
    }


WIDE = HacpoConfig(self_clip_low=0.2, self_clip_high=0.2)


def hacpo(**inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return hacpo_loss(**inputs, minibatch_index=0, config=WIDE)


def success_only(**inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return success_only_loss(**inputs, config=WIDE)


LOSSES = pytest.mark.parametrize("loss_function", [hacpo, success_only])
LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]


@LOSSES
def test_masked_tokens_get_no_gradient_even_when_they_are_not_numbers(loss_function: LossFunction) -> None:
    inputs = minibatch()
    inputs["target_log_probs"][2, 1] = math.nan
    inputs["source_mean_log_probs"][2] = -2.0
    inputs["target_log_probs"].requires_grad_()

    loss, _ = loss_function(**inputs)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    gradient = inputs["target_log_probs"].grad
    assert gradient is not None
    assert gradient[2, 1] == 0
    assert gradient[2, 0] != 0
    assert bool(torch.isfinite(gradient).all())


@LOSSES
def test_only_the_log_probs_get_a_gradient(loss_function: LossFunction) -> None:
    inputs = minibatch()
    for name in ("target_log_probs", "advantages", "capability_ratio"):
        inputs[name].requires_grad_()

    loss, metrics = loss_function(**inputs)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    assert inputs["target_log_probs"].grad is not None
    assert inputs["advantages"].grad is None
    assert inputs["capability_ratio"].grad is None
    assert not any(value.requires_grad for value in metrics.values())


@LOSSES
def test_gradients_agree_with_finite_differences(loss_function: LossFunction) -> None:
    """Alpha 0, since finite differences would see through the stop-gradient of the exponent."""
    inputs = minibatch()
    log_probs = inputs.pop("target_log_probs").requires_grad_()

    def loss_of(values: Tensor) -> Tensor:
        if loss_function is hacpo:
            config = HacpoConfig(alpha=0.0, self_clip_low=0.2, self_clip_high=0.2)
            return hacpo_loss(values, **inputs, minibatch_index=0, config=config)[0]
        return loss_function(target_log_probs=values, **inputs)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs,))


def test_foreign_samples_outside_the_bounds_get_no_gradient_but_own_ones_do() -> None:
    inputs = minibatch()
    inputs["target_log_probs"].requires_grad_()

    loss, metrics = hacpo(**inputs)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    gradient = inputs["target_log_probs"].grad
    assert gradient is not None
    assert (gradient != 0).any(dim=1).tolist() == [True, True, False, False]
    assert metrics["cross_below"].tolist() == [False, False, True, False]
    assert metrics["cross_above"].tolist() == [False, False, False, True]


def test_success_only_takes_no_foreign_failures_and_has_no_lower_bound() -> None:
    inputs = minibatch()
    inputs["target_log_probs"].requires_grad_()

    loss, metrics = success_only(**inputs)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    s = math.exp(-2.0 + 0.25)
    same(metrics["objective"], [1.0, 0.0, s * 2.0 * 2.0, 1.0 * 2.0 * 1.5])
    same(loss, -(1.0 + 4.0 * s + 3.0) / 4)
    gradient = inputs["target_log_probs"].grad
    assert gradient is not None
    assert (gradient != 0).any(dim=1).tolist() == [True, False, True, False]


def test_gspo_is_the_own_part_alone() -> None:
    inputs = minibatch()
    own = {**inputs, "is_self": torch.ones(4, dtype=torch.bool)}
    loss, metrics = hacpo(**own)
    names = ("target_log_probs", "target_mask", "source_mean_log_probs", "advantages")

    alone, _ = gspo_loss(*(inputs[name] for name in names), config=WIDE)

    assert float(alone) == float(loss)
    assert metrics["own_clipped"].tolist() == [False, False, False, False]


def test_own_clipping_is_reported_only_where_it_stops_the_gradient() -> None:
    inputs = minibatch()
    inputs["is_self"] = torch.ones(4, dtype=torch.bool)
    _, metrics = hacpo_loss(**inputs, minibatch_index=0)

    # ratios 1, 0.90 with A < 0, 0.17 with A > 0, 1.16 with A > 0
    assert metrics["own_clipped"].tolist() == [False, True, False, True]


def test_micro_batches_add_up_to_the_planned_minibatch() -> None:
    inputs = minibatch()
    whole, _ = hacpo(**inputs)
    halves = [{name: values[part] for name, values in inputs.items()} for part in (slice(0, 2), slice(2, 4))]

    parts = [hacpo_loss(**half, minibatch_index=0, config=WIDE, planned_samples=4)[0] for half in halves]

    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_dtype_is_kept_and_low_precision_is_raised(given: torch.dtype, kept: torch.dtype) -> None:
    loss, metrics = hacpo(**minibatch(given))
    advantages = joint_advantages(
        torch.tensor([1, 0], dtype=given), ["q", "q"], ["a", "a"], learner="a", capabilities={}
    )

    assert loss.dtype == metrics["ratio"].dtype == advantages.dtype == kept


def test_log_ratios_are_clamped_with_gradient_zero_beyond() -> None:
    log_probs = f64([[-30.0]]).requires_grad_()
    ratio = sequence_ratio(log_probs, torch.ones(1, 1), f64([-1.0]))
    ratio.sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    same(ratio, [math.exp(-10)])
    assert log_probs.grad is not None
    same(log_probs.grad, [[0.0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_mask": torch.tensor([[1, 1], [1, 1], [0, 0], [1, 1]])}, "has no token"),
        ({"target_mask": torch.ones(4, 3)}, r"must both be \(B, T\)"),
        ({"source_mean_log_probs": torch.zeros(3)}, r"^Source means \(3,\)"),
        ({"advantages": torch.zeros(4, 1)}, r"^advantages has shape \(4, 1\)"),
        ({"is_self": torch.zeros(2)}, r"^is_self has shape"),
        ({"capability_ratio": torch.zeros(2)}, r"^capability_ratio has shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hacpo(**{**minibatch(), **changes})


def test_a_minibatch_without_samples_is_refused() -> None:
    empty = {name: values[:0] for name, values in minibatch().items()}
    with pytest.raises(ValueError, match=r"^A minibatch without samples has no loss: skip it\.$"):
        hacpo(**empty)


def test_the_step_of_the_bound_is_scaled_to_the_planned_updates() -> None:
    assert scale_cross_step(HacpoConfig(), planned_updates=4) == HacpoConfig()
    assert scale_cross_step(HacpoConfig(), planned_updates=1) == HacpoConfig()
    ten = scale_cross_step(HacpoConfig(), planned_updates=10)
    assert cross_lower_bound(9, config=ten) == pytest.approx(0.8 + 3 * 0.025)


def test_summaries_are_means_over_samples_and_skip_what_does_not_exist() -> None:
    _, metrics = hacpo(**minibatch())
    summary = summarize_metrics([metrics, metrics])

    assert (summary["own_samples"], summary["cross_samples"]) == (2, 6)
    assert summary["own_ratio"] == 1
    assert summary["cross_below"] == summary["cross_above"] == pytest.approx(1 / 3)
    assert summarize_metrics([]) == {"own_samples": 0.0, "cross_samples": 0.0}
    own_only = {name: value[:1] if value.ndim else value for name, value in metrics.items()}
    assert "cross_ratio" not in summarize_metrics([own_only])
