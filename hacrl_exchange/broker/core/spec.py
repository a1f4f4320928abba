"""What a pool may be: checks its settings once, when it is created, and fills in defaults for zeros."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from hacrl_exchange.broker.core.json_text import strict_json
from hacrl_exchange.errors import InvalidPoolError
from hacrl_exchange.types import Lockstep, PoolSpec, VerificationPlan

NAME = re.compile(r"[a-z0-9-]{1,63}")
MAX_MEMBERS = 1024
"""Agents that may ever join one pool: rosters, manifests and snapshots stay bounded."""

MAX_TIMEOUT_SECONDS = 30 * 24 * 3600.0
MAX_ITEM_TIMEOUT_SECONDS = 3600.0
_INT64 = 2**63
_MAX_CONFIG_SIZE = 64 << 10
"""It travels with every group that is leased."""


def checked_spec(spec: PoolSpec, *, prompt_count: int) -> PoolSpec:
    """The spec with defaults for zeros and durations in whole microseconds.

    Raises:
        InvalidPoolError: a setting is out of its range or contradicts the prompt set.
    """
    if not NAME.fullmatch(spec.prompt_set):
        _refuse("prompt_set", spec.prompt_set, "a name of 1 to 63 characters a-z, 0-9 and '-'")
    _check_range("group_size", spec.group_size, 1, 256)
    _check_range("seed", spec.seed, -_INT64, _INT64 - 1)
    _check_range("max_tokens", spec.max_tokens, 0, 2**31 - 1)
    _check_range("retained_steps", spec.retained_steps, 0, 2**31 - 1)
    window = spec.capability_window or 5
    _check_range("capability_window", window, 1, 1000)
    return replace(
        spec,
        plan=_checked_plan(spec.plan),
        lockstep=_checked_lockstep(spec.lockstep, prompt_count=prompt_count),
        capability_window=window,
    )


def _checked_plan(plan: VerificationPlan) -> VerificationPlan:
    if len(plan.verifiers) != 1:
        _refuse("plan.verifiers", len(plan.verifiers), "exactly one verifier")
    use = plan.verifiers[0]
    if not 1 <= len(use.verifier) <= 128:
        _refuse("plan.verifiers[0].verifier", use.verifier, "a name of 1 to 128 characters")
    config_json = use.config_json or "{}"
    try:
        config = strict_json(config_json)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        _refuse("plan.verifiers[0].config_json", config_json[:100], "a JSON object")
    if len(config_json.encode()) > _MAX_CONFIG_SIZE:
        _refuse("plan.verifiers[0].config_json", f"{config_json[:20]}...", "of at most 64 KiB")
    if not math.isfinite(plan.success_threshold):
        _refuse("plan.success_threshold", plan.success_threshold, "a finite number")
    if not 0 <= plan.max_unscored_share <= 1:
        _refuse("plan.max_unscored_share", plan.max_unscored_share, "a share from 0 to 1")
    max_attempts = plan.max_attempts or 3
    _check_range("plan.max_attempts", max_attempts, 1, 100)
    return replace(
        plan,
        verifiers=(replace(use, config_json=config_json),),
        item_timeout_seconds=_checked_seconds(
            "plan.item_timeout", plan.item_timeout_seconds or 10.0, most=MAX_ITEM_TIMEOUT_SECONDS
        ),
        max_attempts=max_attempts,
    )


def _checked_lockstep(lockstep: Lockstep, *, prompt_count: int) -> Lockstep:
    _check_range("lockstep.prompts_per_step", lockstep.prompts_per_step, 1, 4096)
    if lockstep.prompts_per_step > prompt_count:
        _refuse(
            "lockstep.prompts_per_step",
            lockstep.prompts_per_step,
            f"at most the set's {prompt_count} prompts",
        )
    min_members = lockstep.min_members or 2
    max_open_steps = lockstep.max_open_steps or 1
    _check_range("lockstep.min_members", min_members, 1, MAX_MEMBERS)
    _check_range("lockstep.max_open_steps", max_open_steps, 1, 64)
    _check_range("lockstep.max_steps", lockstep.max_steps, 0, _INT64 - 1)
    return replace(
        lockstep,
        min_members=min_members,
        max_open_steps=max_open_steps,
        publish_timeout_seconds=_checked_seconds(
            "lockstep.publish_timeout", lockstep.publish_timeout_seconds or 600.0, most=MAX_TIMEOUT_SECONDS
        ),
        verify_timeout_seconds=_checked_seconds(
            "lockstep.verify_timeout", lockstep.verify_timeout_seconds or 300.0, most=MAX_TIMEOUT_SECONDS
        ),
    )


def _checked_seconds(field: str, seconds: float, *, most: float) -> float:
    """Rounds to whole microseconds, the unit of records."""
    if not (math.isfinite(seconds) and 0.001 <= seconds <= most):
        _refuse(field, seconds, f"0.001 to {most:g} seconds")
    return round(seconds * 1_000_000) / 1_000_000


def _check_range(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        _refuse(field, value, f"{least} to {most}")


def _refuse(field: str, value: object, allowed: str) -> None:
    raise InvalidPoolError(
        f"The pool's {field} is {value!r}, but must be {allowed}.", field=field, value=value, allowed=allowed
    )
