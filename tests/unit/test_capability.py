"""Rules of the capability window; numeric cases come from the shared vectors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hacrl_exchange.capability import CapabilityWindow, capability_ratio, success_rate

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "hacpo-vectors.json").read_text())
CASES = [case for case in VECTORS["cases"] if case["kind"] == "capability"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_window_agrees_with_the_vectors(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    rates = inputs["per_step_rate"]
    window = CapabilityWindow(
        rates,
        window=inputs["window"],
        floor=inputs["minimum"],
        ratio_min=inputs["ratio_clamp"][0],
        ratio_max=inputs["ratio_clamp"][1],
        warmup_steps=inputs["warmup_steps"],
    )
    for index, expected in enumerate(case["expected"]["per_step"]):
        window.record({agent: values[index] for agent, values in rates.items()})

        assert window.step == expected["step"]
        assert window.capabilities() == pytest.approx(expected["capability"], abs=1e-10)
        for pair, value in expected["ratio_source_to_target"].items():
            source, learner = pair.split("->")
            assert window.ratio(source, learner) == pytest.approx(value, abs=1e-10)


def test_an_agent_without_a_scored_rollout_keeps_its_window() -> None:
    window = CapabilityWindow(["a", "b"])
    window.record({"a": 0.5, "b": 0.25})
    window.record({"a": 0.7})

    assert window.capabilities() == pytest.approx({"a": 0.6, "b": 0.25})
    assert repr(window) == "<CapabilityWindow step 2 [a=0.600, b=0.250]>"


def test_without_history_there_is_no_capability_and_the_ratio_is_one() -> None:
    window = CapabilityWindow(["a", "b"])
    window.record({"a": 0.5})

    assert window.capabilities() == {"a": 0.5}
    assert window.capability("b") is None
    assert window.ratio("a", "b") == window.ratio("b", "a") == window.ratio("a", "unheard-of") == 1.0


def test_after_an_absence_rates_older_than_two_windows_are_dropped() -> None:
    window = CapabilityWindow(window=2)
    for rate in (0.2, 0.4):
        window.record({"a": rate, "b": 0.5})
    for _ in range(3):
        window.record({"b": 0.5})
    assert window.capability("a") == pytest.approx(0.3)  # absent: the window stays

    window.record({"a": 0.8, "b": 0.5})  # step 6: step 2 is four steps old and stays, step 1 goes
    assert window.capability("a") == pytest.approx(0.6)

    for _ in range(4):
        window.record({"b": 0.5})
    window.record({"a": 1.0, "b": 0.5})  # step 11: step 6 is five steps old
    assert window.capability("a") == 1.0


def test_ratios_are_clamped_and_say_so() -> None:
    window = CapabilityWindow()
    window.record({"a": 1.0, "b": 0.0, "c": 0.5})

    assert window.capability("b") == 1e-8
    assert window.ratio("a", "b") == 10.0
    assert window.ratio("b", "a") == 0.1
    assert window.is_clamped("a", "b")
    assert window.is_clamped("b", "a")
    assert not window.is_clamped("a", "c")


def test_nothing_is_clamped_in_warm_up() -> None:
    window = CapabilityWindow(warmup_steps=1)
    window.record({"a": 1.0, "b": 0.0})

    assert window.ratio("a", "b") == 1.0
    assert not window.is_clamped("a", "b")


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf])
def test_a_rate_outside_the_unit_interval_is_refused_and_nothing_recorded(rate: float) -> None:
    window = CapabilityWindow()
    with pytest.raises(ValueError, match=r"^The success rate .* of agent 'b' is not in \[0, 1\]\.$"):
        window.record({"a": 0.5, "b": rate})

    assert window.step == 0
    assert window.capabilities() == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0},
        {"floor": 0.0},
        {"floor": 2.0},
        {"ratio_min": 0.0},
        {"ratio_min": 1.5},
        {"ratio_max": 0.5},
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"window|floor|clamp"):
        CapabilityWindow(**settings)


def test_a_success_rate_needs_a_scored_rollout() -> None:
    assert success_rate(3, 4) == 0.75
    assert success_rate(0, 0) is None
    with pytest.raises(ValueError, match=r"^5 successes of 4 scored rollouts"):
        success_rate(5, 4)


def test_a_ratio_of_capabilities_needs_positive_numbers() -> None:
    with pytest.raises(ValueError, match="above 0"):
        capability_ratio(0.5, 0.0)
