"""A pool driven by hand: time is a number, every record is kept, what is due happens when asked for.

A process of its own can load this file with runpy; so it imports nothing from pytest's side but fixtures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from hacrl_exchange.broker.core import timers
from hacrl_exchange.broker.core.pool import decide, evolve, record_time_us
from hacrl_exchange.broker.core.records import (
    CloseStep,
    Command,
    CreatePool,
    EndPublishing,
    Join,
    MemberJoined,
    OpenStep,
    PublishGroup,
    Record,
    RecordBody,
    RecordVerdicts,
    RetireSteps,
)
from hacrl_exchange.broker.core.schedule import epoch_order
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.types import (
    Lockstep,
    ModelSpec,
    PoolSpec,
    Scored,
    Unscored,
    UnscoredKind,
    Verdict,
    VerificationPlan,
    VerifierUse,
)

SECOND = 1_000_000
START_US = 1_700_000_000 * SECOND


def small_spec(*, group_size: int = 2, retained_steps: int = 0, **lockstep: float) -> PoolSpec:
    """Two prompts a step, groups of two, one minute to publish and half a minute to verify."""
    settings = Lockstep(prompts_per_step=2, publish_timeout_seconds=60.0, verify_timeout_seconds=30.0)
    return PoolSpec(
        prompt_set="sums",
        group_size=group_size,
        plan=VerificationPlan(verifiers=(VerifierUse("exact_match"),)),
        lockstep=replace(settings, **lockstep),  # type: ignore[arg-type]  # named and typed by Lockstep
        seed=7,
        retained_steps=retained_steps,
    )


class World:
    """One pool and its log."""

    def __init__(self, spec: PoolSpec | None = None, *, prompt_count: int = 6) -> None:
        self.now_us = START_US
        self.records: list[Record] = []
        self.maybe_state: PoolState | None = None
        self.prompt_ids = tuple(f"p{index}" for index in range(prompt_count))
        self.instances = 0
        self.send(CreatePool("sums", spec or small_spec(), prompt_count))

    @property
    def state(self) -> PoolState:
        """The state, which exists from the first record on."""
        assert self.maybe_state is not None
        return self.maybe_state

    def send(self, command: Command) -> RecordBody | None:
        """Decides and evolves; what was recorded."""
        now_us = record_time_us(self.maybe_state, now_us=self.now_us)
        body = decide(self.maybe_state, command, now_us=now_us)
        if body is not None:
            record = Record(now_us, body)
            self.maybe_state = evolve(self.maybe_state, record)
            self.records.append(record)
        return body

    def settle(self, *, verifier_alive: bool = True) -> list[RecordBody]:
        """Does what is due until nothing is."""
        done: list[RecordBody] = []
        while (due := timers.due(self.state, now_us=self.now_us)) is not None:
            body = self.send(self.command_for(due, verifier_alive=verifier_alive))
            assert body is not None
            done.append(body)
        return done

    def command_for(self, due: timers.Due, *, verifier_alive: bool) -> Command:
        """What the service sends for it."""
        match due:
            case timers.OpenDue():
                order = epoch_order(self.prompt_ids, seed=self.state.spec.seed, epoch=due.epoch)
                size = self.state.spec.lockstep.prompts_per_step
                return OpenStep(due.step, due.epoch, order[due.offset : due.offset + size])
            case timers.EndPublishingDue():
                return EndPublishing(due.step)
            case timers.CloseDue():
                return CloseStep(due.step, verifier_alive)
            case timers.RetireDue():
                return RetireSteps(due.through_step)

    def advance(self, seconds: float, *, verifier_alive: bool = True) -> None:
        """Lets time pass, waking up whenever the pool asks for it."""
        until_us = self.now_us + round(seconds * SECOND)
        self.settle(verifier_alive=verifier_alive)
        while (wake := timers.wake_us(self.state)) is not None and wake <= until_us:
            self.now_us = max(self.now_us, wake)
            self.settle(verifier_alive=verifier_alive)
        self.now_us = until_us
        self.settle(verifier_alive=verifier_alive)

    def join(self, agent: str, *, principal: str = "local", instance: str = "") -> int:
        """Joins, under a new instance if none is given, and settles; the session."""
        self.instances += 1
        name = instance or f"life-{self.instances}"
        body = self.send(Join(agent, principal, name, ModelSpec(model=f"model of {agent}")))
        self.settle()
        return body.session if isinstance(body, MemberJoined) else self.state.members[agent].session

    def publish_command(
        self, agent: str, prompt_index: int, *, step: int = 0, text: str = ""
    ) -> PublishGroup:
        """A group of the agent's newest session for a prompt of an open step (default: the newest)."""
        number = step or self.state.last_step
        return PublishGroup(
            agent=agent,
            session=self.state.members[agent].session,
            step=number,
            prompt_id=self.state.open_steps[number].prompt_ids[prompt_index],
            digest=f"{agent}/{number}/{prompt_index}/{text}".encode(),
            rollout_count=self.state.spec.group_size,
            envelope=b"envelope",
        )

    def publish(self, agent: str, *prompt_indices: int, step: int = 0) -> None:
        """Publishes groups; no index means all prompts."""
        number = step or self.state.last_step
        for index in prompt_indices or range(len(self.state.open_steps[number].prompt_ids)):
            self.send(self.publish_command(agent, index, step=number))
        self.settle()

    def judge(
        self, prompt_index: int, roster_index: int, *scores: float | None, step: int = 0
    ) -> RecordBody | None:
        """Records verdicts for a group; None is a verifier error."""
        number = step or min(self.state.open_steps)
        verdicts: tuple[Verdict, ...] = tuple(
            Unscored(UnscoredKind.VERIFIER_ERROR) if score is None else Scored(score) for score in scores
        )
        return self.send(RecordVerdicts(number, prompt_index, roster_index, 1, None, "worker", verdicts))

    def judge_all(self, *scores: float | None, step: int = 0) -> None:
        """Gives every pending group of a step the same verdicts (default: all 1.0) and settles."""
        number = step or min(self.state.open_steps)
        given = scores or (1.0,) * self.state.spec.group_size
        for (prompt_index, roster_index), group in sorted(self.state.open_steps[number].groups.items()):
            if not group.generation:
                self.judge(prompt_index, roster_index, *given, step=number)
        self.settle()


@pytest.fixture
def make_world() -> Callable[..., World]:
    """Makes pools: `make_world(spec, prompt_count=...)`."""
    return World


@pytest.fixture
def make_spec() -> Callable[..., PoolSpec]:
    """`small_spec`."""
    return small_spec


@pytest.fixture
def world() -> World:
    """A pool of two agents, a and b, whose first step is open."""
    pool = World()
    pool.join("a")
    pool.join("b")
    return pool
