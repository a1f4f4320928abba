"""What goes in and out of the verification queue: groups to verify, leases, what failed leases leave."""

from __future__ import annotations

from dataclasses import dataclass

from hacrl_exchange.broker.core.state import PoolState


@dataclass(frozen=True, slots=True)
class GroupRef:
    """A group to verify, and how many failed leases of it alone end it."""

    pool: str
    step: int
    prompt_index: int
    roster_index: int
    generation: int
    verifier: str
    max_attempts: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Groups given to a worker until a time."""

    lease_id: str
    worker_id: str
    expires_at: float
    items: tuple[GroupRef, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """What failed leases left: groups that wait again, groups that ran out of attempts (they are no longer
    in the queue: record VERIFIER_ERROR for them), and workers that were dropped."""

    returned: tuple[GroupRef, ...] = ()
    exhausted: tuple[GroupRef, ...] = ()
    dropped_workers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A registered worker."""

    worker_id: str
    identity: str
    principal: str
    verifiers: tuple[str, ...]
    leased_group_count: int
    needs_tokens: frozenset[str] = frozenset()
    """The verifiers that want token ids beside the text."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sizes of the queue."""

    waiting_count: int
    leased_count: int
    lease_count: int
    worker_count: int


def pending_groups(state: PoolState) -> tuple[GroupRef, ...]:
    """What a pool needs verified: the groups of its open steps that have no verdicts, in manifest order."""
    plan = state.spec.plan
    return tuple(
        GroupRef(
            pool=state.pool,
            step=step.step,
            prompt_index=prompt_index,
            roster_index=roster_index,
            generation=1,
            verifier=plan.verifiers[0].verifier,
            max_attempts=plan.max_attempts,
        )
        for step in state.steps_in_order()
        for prompt_index, roster_index in sorted(step.groups)
        if not step.groups[prompt_index, roster_index].generation
    )
