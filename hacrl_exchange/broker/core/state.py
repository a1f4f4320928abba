"""What a pool's log folds to: members, open steps and counts. Only what is open; a closed step is on disk.

These objects are changed by evolve and by nobody else. Everything that a snapshot keeps is an argument of a
constructor; what can be derived from it (indices, counts per member) is built by `__post_init__` and
maintained by evolve, so that publishing a group costs the same in a large step as in a small one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hacrl_exchange.broker.core.transitions import GroupPhase
from hacrl_exchange.types import MemberState, ModelSpec, PoolSpec, RosterState, StepCounts, StepState


@dataclass(slots=True)
class Member:
    """An agent that ever joined. `counts` is its capability window: steps with a scored rollout, oldest
    first. `acked_step` 0 means none."""

    agent: str
    principal: str
    session: int
    instance: str
    model: ModelSpec
    state: MemberState
    acked_step: int = 0
    counts: tuple[StepCounts, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupState:
    """An accepted group of an open step. `generation` 0 means that it has no verdicts yet."""

    session: int
    digest: bytes
    rollout_count: int
    generation: int = 0
    success_count: int = 0
    scored_count: int = 0

    @property
    def phase(self) -> GroupPhase:
        """PENDING or JUDGED; an EXPIRED group is in no open step."""
        return GroupPhase.JUDGED if self.generation else GroupPhase.PENDING


@dataclass(slots=True)
class OpenStep:
    """A step that is not closed.

    `roster_states` has one entry per roster entry, always. None: the member may still publish. COMPLETE:
    all its groups are accepted. LEFT: it left before that and forfeited the rest for good. LATE appears
    when publishing ends, and then no entry is None. In a snapshot None is the enum's UNSPECIFIED.
    `groups` is keyed by (prompt index, roster index), in order of arrival; sort before showing.
    """

    step: int
    epoch: int
    prompt_ids: tuple[str, ...]
    roster: tuple[str, ...]
    open_time_us: int
    publishing_end_time_us: int = 0
    roster_states: tuple[RosterState | None, ...] = ()
    groups: dict[tuple[int, int], GroupState] = field(default_factory=dict)
    prompt_index: dict[str, int] = field(init=False, repr=False, compare=False)
    roster_index: dict[str, int] = field(init=False, repr=False, compare=False)
    accepted_by_member: list[int] = field(init=False, repr=False, compare=False)
    pending_group_count: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.roster_states = self.roster_states or (None,) * len(self.roster)
        self.prompt_index = {prompt_id: index for index, prompt_id in enumerate(self.prompt_ids)}
        self.roster_index = {agent: index for index, agent in enumerate(self.roster)}
        self.accepted_by_member = [0] * len(self.roster)
        self.pending_group_count = 0
        for (_, roster_index), group in self.groups.items():
            self.accepted_by_member[roster_index] += 1
            self.pending_group_count += group.generation == 0

    @property
    def state(self) -> StepState:
        """PUBLISHING or VERIFYING; a closed step is no OpenStep."""
        return StepState.VERIFYING if self.publishing_end_time_us else StepState.PUBLISHING

    @property
    def is_decided(self) -> bool:
        """Nobody can publish any more: every member is complete, or left."""
        return None not in self.roster_states

    def judged_roster(self) -> tuple[RosterState, ...]:
        """The states that the end of publishing gives: whoever could still publish is LATE."""
        return tuple(RosterState.LATE if state is None else state for state in self.roster_states)

    def committed(self, agent: str) -> tuple[str, ...]:
        """Ids of the prompts for which the agent has a group, in manifest order."""
        roster_index = self.roster_index.get(agent)
        if roster_index is None:
            return ()
        return tuple(
            prompt_id
            for index, prompt_id in enumerate(self.prompt_ids)
            if (index, roster_index) in self.groups
        )


@dataclass(slots=True)
class PoolState:
    """A pool. Counts are of rollouts; accepted = scored + unscored + pending, always."""

    pool: str
    spec: PoolSpec
    prompt_count: int
    create_time_us: int
    last_time_us: int
    members: dict[str, Member] = field(default_factory=dict)
    open_steps: dict[int, OpenStep] = field(default_factory=dict)
    last_step: int = 0
    retired_through: int = 0
    accepted_count: int = 0
    scored_count: int = 0
    unscored_count: int = 0

    @property
    def pending_count(self) -> int:
        """Accepted rollouts that are not judged yet."""
        return self.accepted_count - self.scored_count - self.unscored_count

    @property
    def closed_through(self) -> int:
        """The newest closed step. Steps open and close in order, so all steps up to it are closed."""
        return min(self.open_steps) - 1 if self.open_steps else self.last_step

    @property
    def has_ended(self) -> bool:
        """The last step was opened: no further one will be."""
        return 0 < self.spec.lockstep.max_steps <= self.last_step

    def active_agents(self) -> tuple[str, ...]:
        """Ids of the ACTIVE members in roster order: the roster, if a step opened now."""
        active = (agent for agent, member in self.members.items() if member.state is MemberState.ACTIVE)
        return tuple(sorted(active))

    def steps_in_order(self) -> Iterator[OpenStep]:
        """The open steps by number."""
        for number in sorted(self.open_steps):
            yield self.open_steps[number]
