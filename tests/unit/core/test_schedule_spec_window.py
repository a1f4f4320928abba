"""Pure functions of the core: which prompts, which settings, which counts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import pytest

from hacrl_exchange.broker.core.schedule import epoch_order, step_position
from hacrl_exchange.broker.core.spec import checked_spec
from hacrl_exchange.broker.core.window import extended_window, is_withheld, scored_steps
from hacrl_exchange.capability import CapabilityWindow
from hacrl_exchange.errors import InvalidPoolError
from hacrl_exchange.types import Lockstep, PoolSpec, StepCounts, VerificationPlan, VerifierUse

SPEC = PoolSpec(
    prompt_set="sums",
    group_size=8,
    plan=VerificationPlan(verifiers=(VerifierUse("math"),)),
    lockstep=Lockstep(prompts_per_step=4),
)


def test_an_epoch_leaves_out_its_remainder() -> None:
    positions = [step_position(step, prompt_count=10, prompts_per_step=4) for step in (1, 2, 3, 4, 5)]
    assert positions == [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0)]


@pytest.mark.parametrize(("step", "size"), [(0, 4), (1, 0), (1, 11)])
def test_a_position_that_cannot_be_is_an_error(step: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"^Step {step} of {size} prompts out of 10 does not exist\\.$"):
        step_position(step, prompt_count=10, prompts_per_step=size)


def test_the_order_of_an_epoch_is_by_hash_of_seed_epoch_and_prompt() -> None:
    prompts = ["p0", "p1", "p2", "p3"]
    expected = sorted(prompts, key=lambda prompt: hashlib.sha256(f"7/1/{prompt}".encode()).hexdigest())
    assert list(epoch_order(prompts, seed=7, epoch=1)) == expected
    assert epoch_order(reversed(prompts), seed=7, epoch=1) == tuple(expected)
    assert len({epoch_order(prompts, seed=7, epoch=epoch) for epoch in range(20)}) > 5


def test_zeros_become_defaults_and_durations_whole_microseconds() -> None:
    spec = checked_spec(
        PoolSpec(
            prompt_set="sums",
            group_size=8,
            plan=VerificationPlan(
                verifiers=(VerifierUse("math", ""),), item_timeout_seconds=0.0, max_attempts=0
            ),
            lockstep=Lockstep(
                prompts_per_step=4,
                min_members=0,
                publish_timeout_seconds=0.0,
                verify_timeout_seconds=1.23456789,
                max_open_steps=0,
            ),
            capability_window=0,
        ),
        prompt_count=4,
    )
    expected = replace(SPEC, lockstep=replace(SPEC.lockstep, verify_timeout_seconds=1.234568))
    assert spec == expected
    assert checked_spec(spec, prompt_count=4) == spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            replace(SPEC, prompt_set="Sums"),
            "The pool's prompt_set is 'Sums', but must be a name of 1 to 63 characters a-z, 0-9 and '-'.",
        ),
        (replace(SPEC, group_size=0), "The pool's group_size is 0, but must be 1 to 256."),
        (replace(SPEC, capability_window=-1), "The pool's capability_window is -1, but must be 1 to 1000."),
        (replace(SPEC, retained_steps=-1), "The pool's retained_steps is -1, but must be 0 to 2147483647."),
        (
            replace(SPEC, lockstep=Lockstep(prompts_per_step=0)),
            "The pool's lockstep.prompts_per_step is 0, but must be 1 to 4096.",
        ),
        (
            replace(SPEC, lockstep=Lockstep(prompts_per_step=11)),
            "The pool's lockstep.prompts_per_step is 11, but must be at most the set's 10 prompts.",
        ),
        (
            replace(SPEC, lockstep=Lockstep(prompts_per_step=4, publish_timeout_seconds=float("inf"))),
            "The pool's lockstep.publish_timeout is inf, but must be 0.001 to 2.592e+06 seconds.",
        ),
        (
            replace(SPEC, lockstep=Lockstep(prompts_per_step=4, verify_timeout_seconds=-1.0)),
            "The pool's lockstep.verify_timeout is -1.0, but must be 0.001 to 2.592e+06 seconds.",
        ),
        (
            replace(SPEC, plan=VerificationPlan(verifiers=())),
            "The pool's plan.verifiers is 0, but must be exactly one verifier.",
        ),
        (
            replace(SPEC, plan=VerificationPlan(verifiers=(VerifierUse(""),))),
            "The pool's plan.verifiers[0].verifier is '', but must be a name of 1 to 128 characters.",
        ),
        (
            replace(SPEC, plan=VerificationPlan(verifiers=(VerifierUse("math", "[1]"),))),
            "The pool's plan.verifiers[0].config_json is '[1]', but must be a JSON object.",
        ),
        (
            replace(SPEC, plan=VerificationPlan(verifiers=(VerifierUse("math", "{"),))),
            "The pool's plan.verifiers[0].config_json is '{', but must be a JSON object.",
        ),
        (
            replace(SPEC, plan=replace(SPEC.plan, success_threshold=float("nan"))),
            "The pool's plan.success_threshold is nan, but must be a finite number.",
        ),
        (
            replace(SPEC, plan=replace(SPEC.plan, max_unscored_share=1.5)),
            "The pool's plan.max_unscored_share is 1.5, but must be a share from 0 to 1.",
        ),
        (
            replace(SPEC, plan=replace(SPEC.plan, item_timeout_seconds=3601.0)),
            "The pool's plan.item_timeout is 3601.0, but must be 0.001 to 3600 seconds.",
        ),
    ],
    ids=lambda value: value.split("'s ")[1].split(" is")[0] if isinstance(value, str) else "",
)
def test_a_pool_out_of_range_is_refused(spec: PoolSpec, message: str) -> None:
    with pytest.raises(InvalidPoolError, match=f"^{re.escape(message)}$"):
        checked_spec(spec, prompt_count=10)


def test_a_configuration_has_room_in_every_lease() -> None:
    def with_config(size: int) -> PoolSpec:
        config = '{"a":"' + "x" * (size - 8) + '"}'
        return replace(SPEC, plan=replace(SPEC.plan, verifiers=(VerifierUse("math", config),)))

    checked_spec(with_config(64 << 10), prompt_count=10)
    with pytest.raises(InvalidPoolError, match="must be of at most 64 KiB"):
        checked_spec(with_config((64 << 10) + 1), prompt_count=10)


def test_the_window_is_the_last_scored_steps_and_forgets_old_ones() -> None:
    kept: tuple[StepCounts, ...] = ()
    for step in range(1, 5):
        kept = scored_steps(extended_window(kept, StepCounts(step, 1, 2, 2), window=3))
    assert [counts.step for counts in kept] == [2, 3, 4]
    unscored = extended_window(kept, StepCounts(20, 0, 0, 2), window=3)
    assert [counts.step for counts in unscored] == [2, 3, 4, 20]
    assert scored_steps(unscored) == kept
    after_absence = extended_window(kept, StepCounts(9, 1, 2, 2), window=3)
    assert [counts.step for counts in after_absence] == [3, 4, 9]
    assert [counts.step for counts in extended_window(kept, StepCounts(30, 1, 2, 2), window=3)] == [30]


def test_the_window_agrees_with_the_capability_window_of_the_learners() -> None:
    rates = {1: 1, 2: 3, 3: None, 4: 0, 5: 4, 6: 2, 7: 1, 14: 3, 17: 2, 18: None, 40: 1}
    reference = CapabilityWindow(["a"], window=3, floor=1e-8)
    kept: tuple[StepCounts, ...] = ()
    for step in range(1, 41):
        successes = rates.get(step)
        reference.record({} if successes is None else {"a": successes / 4})
        counts = StepCounts(step, successes or 0, 0 if successes is None else 4, 4)
        kept = scored_steps(extended_window(kept, counts, window=3))
        mine = [max(entry.success_count / entry.scored_count, 1e-8) for entry in kept]
        assert reference.capability("a") == (sum(mine) / len(mine) if mine else None)


@pytest.mark.parametrize(
    ("scored", "total", "share", "withheld"),
    [
        (90, 100, 0.1, False),
        (89, 100, 0.1, True),
        (7, 10, 0.3, False),
        (6, 10, 0.3, True),
        (0, 0, 0.0, False),
        (7, 8, 0.0, True),
        (0, 8, 1.0, False),
    ],
)
def test_a_share_is_compared_exactly(scored: int, total: int, share: float, withheld: bool) -> None:
    assert is_withheld(StepCounts(1, 0, scored, total), max_unscored_share=share) is withheld
