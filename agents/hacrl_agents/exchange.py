"""What the trainer needs of the exchange: the part of the SDK's surface that it calls, as protocols.

`hacrl_exchange.client` satisfies them; so do the fakes of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

from hacrl_exchange.types import (
    Group,
    ModelSpec,
    PoolSpec,
    Prompt,
    RosterEntry,
    StepOutcome,
    VerifiedGroup,
)


class JointBatch(Protocol):
    """A closed step as one agent may see it. Groups are ordered by prompt, then roster."""

    @property
    def step(self) -> int: ...
    @property
    def outcome(self) -> StepOutcome: ...
    @property
    def quorum_met(self) -> bool: ...
    @property
    def prompts(self) -> tuple[Prompt, ...]: ...
    @property
    def roster(self) -> tuple[RosterEntry, ...]: ...
    @property
    def models(self) -> tuple[ModelSpec, ...]: ...
    @property
    def groups(self) -> tuple[VerifiedGroup, ...]: ...
    @property
    def capabilities(self) -> Mapping[str, float]: ...
    @property
    def unrevealed_count(self) -> int: ...
    @property
    def withheld_count(self) -> int: ...


class Step(Protocol):
    """A step to take part in. `committed` holds this agent's stored groups by prompt id, new ones too."""

    @property
    def number(self) -> int: ...
    @property
    def prompts(self) -> tuple[Prompt, ...]: ...
    @property
    def closed(self) -> bool: ...
    @property
    def committed(self) -> Mapping[str, Group]: ...
    def joint_batch(self, *, parts: tuple[Literal["text", "tokens", "logprobs", "meta"], ...]) -> JointBatch:
        """Waits until the step closes."""
        ...


class Published(Protocol):
    """What became of published groups."""

    @property
    def late(self) -> tuple[str, ...]:
        """Prompts whose group came after publishing had ended."""
        ...


class Agent(Protocol):
    """One membership in one pool."""

    @property
    def name(self) -> str: ...
    @property
    def session(self) -> int: ...
    @property
    def spec(self) -> PoolSpec: ...
    def steps(self) -> Iterator[Step]:
        """Yields steps in order, from the one after `resume_after` on; ends when the pool does."""
        ...

    def publish(self, groups: Sequence[Group]) -> Published:
        """Returns when all groups are durable or late."""
        ...
