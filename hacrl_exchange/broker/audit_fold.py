"""A second, independent count of a pool: straightforward, and deliberately not the broker's fold.

A sum that the same fold keeps and checks cannot fail. So this counts rollout by rollout from the records,
holds what is needed to cross-check steps that are not closed yet, and reports sentences, never raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from hacrl_exchange.broker.core.records import (
    GroupAccepted,
    MemberJoined,
    PoolCreated,
    PublishingEnded,
    Record,
    StepClosed,
    StepOpened,
    StepsRetired,
    VerdictsRecorded,
)
from hacrl_exchange.types import RosterState, Scored, Unscored, UnscoredKind, Verdict, VerdictReason

Slot = tuple[int, int]
"""Prompt index and roster index."""

_EXPIRED_REASONS = {
    UnscoredKind.TIMEOUT: VerdictReason.VERIFY_DEADLINE,
    UnscoredKind.UNSUPPORTED: VerdictReason.NO_WORKER,
}


@dataclass(slots=True)
class _Judged:
    """What the verdicts of a group add up to."""

    success: int
    scored: int


@dataclass(slots=True)
class _Step:
    """A step that is open."""

    opened: StepOpened
    groups: dict[Slot, GroupAccepted] = field(default_factory=dict)
    judged: dict[Slot, dict[int, _Judged]] = field(default_factory=dict)


class PoolCount:
    """Counts one pool's records as they come. `problem` is told every contradiction."""

    def __init__(self, pool: str, *, problem: Callable[[str], None]) -> None:
        self.accepted = 0
        self.scored = 0
        self.unscored = 0
        self.outcomes: Counter[str] = Counter()
        self.retired_through = 0
        self._pool = pool
        self._tell = problem
        self._created: PoolCreated | None = None
        self._sessions: dict[str, int] = {}
        self._last_time_us = 0
        self._last_step = 0
        self._open: dict[int, _Step] = {}

    @property
    def pending(self) -> int:
        """Rollouts accepted and neither judged nor expired, counted group by group."""
        return sum(
            group.rollout_count
            for step in self._open.values()
            for slot, group in step.groups.items()
            if slot not in step.judged
        )

    def add(self, position: int, record: Record) -> None:
        """Counts the next record."""
        if record.time_us < self._last_time_us:
            self._problem(f"record {position} is older than the one before it")
        self._last_time_us = record.time_us
        body = record.body
        if (position == 1) != isinstance(body, PoolCreated):
            self._problem(f"record {position} is a {type(body).__name__}; the first record creates the pool")
        match body:
            case PoolCreated():
                self._created = body
                if body.pool != self._pool:
                    self._problem(f"its stream holds pool {body.pool}")
            case MemberJoined():
                if body.session <= self._sessions.get(body.agent, 0):
                    self._problem(f"session {body.session} of {body.agent} is not newer than the one before")
                self._sessions[body.agent] = body.session
            case StepOpened():
                self._opened(body)
            case GroupAccepted():
                self._accepted(body)
            case PublishingEnded():
                self._publishing_ended(body)
            case VerdictsRecorded():
                self._verdicts(body)
            case StepClosed():
                self._closed(body)
            case StepsRetired():
                self.retired_through = max(self.retired_through, body.through_step)
            case _:
                pass  # members that come, go and acknowledge count nothing

    # --- the records that count ----------------------------------------------------------------

    def _opened(self, body: StepOpened) -> None:
        if body.step != self._last_step + 1:
            self._problem(f"step {body.step} opened after step {self._last_step}")
        if len(set(body.prompt_ids)) != len(body.prompt_ids) or len(set(body.roster)) != len(body.roster):
            self._problem(f"step {body.step} names a prompt or an agent twice")
        self._last_step = max(self._last_step, body.step)
        self._open[body.step] = _Step(body)

    def _accepted(self, body: GroupAccepted) -> None:
        self.accepted += body.rollout_count
        slot = (body.prompt_index, body.roster_index)
        where = _where(body.step, slot)
        if self._created is not None and body.rollout_count != self._created.spec.group_size:
            self._problem(f"{where} has {body.rollout_count} rollouts, not the pool's group size")
        step = self._open.get(body.step)
        if step is None:
            self._problem(f"{where} was accepted while its step was not open")
            return
        if not (0 <= slot[0] < len(step.opened.prompt_ids) and 0 <= slot[1] < len(step.opened.roster)):
            self._problem(f"{where} is no slot of its step")
        elif not 0 < body.session <= self._sessions.get(step.opened.roster[slot[1]], 0):
            self._problem(f"{where} was published in session {body.session}, which its agent never had")
        if slot in step.groups:
            self._problem(f"{where} holds two groups")
            return
        step.groups[slot] = body

    def _publishing_ended(self, body: PublishingEnded) -> None:
        step = self._open.get(body.step)
        if step is None or len(body.roster_states) != len(step.opened.roster):
            self._problem(f"publishing of step {body.step} ended without a state for each member")
            return
        published = Counter(roster_index for _, roster_index in step.groups)
        for index, state in enumerate(body.roster_states):
            everything = published[index] == len(step.opened.prompt_ids)
            if everything != (state is RosterState.COMPLETE) and state is not RosterState.LEFT:
                agent = step.opened.roster[index]
                self._problem(
                    f"step {body.step} calls {agent} {state.name}, but it has {published[index]} groups"
                )

    def _verdicts(self, body: VerdictsRecorded) -> None:
        slot = (body.prompt_index, body.roster_index)
        where = _where(body.step, slot)
        step = self._open.get(body.step)
        group = step.groups.get(slot) if step else None
        if step is None or group is None:
            self._problem(f"{where} was judged, but holds no group of an open step")
            return
        generations = step.judged.setdefault(slot, {})
        if body.generation in generations or body.generation < 1:
            self._problem(f"{where} was judged twice in generation {body.generation}")
            return
        if len(body.verdicts) != group.rollout_count:
            self._problem(f"{where} has {len(body.verdicts)} verdicts for {group.rollout_count} rollouts")
        threshold = self._created.spec.plan.success_threshold if self._created else 1.0
        scores = [verdict.score for verdict in body.verdicts if isinstance(verdict, Scored)]
        judged = _Judged(sum(score >= threshold for score in scores), len(scores))
        if (judged.success, judged.scored) != (body.success_count, body.scored_count):
            self._problem(
                f"{where} states {body.success_count} successes of {body.scored_count}, "
                f"its verdicts make {judged.success} of {judged.scored}"
            )
        if not generations:  # a later generation judges the same rollouts again
            self._outcomes(body.verdicts)
        generations[body.generation] = judged

    def _closed(self, body: StepClosed) -> None:
        step = self._open.pop(body.step, None)
        if step is None:
            self._problem(f"step {body.step} closed while it was not open")
            return
        entries = {(entry.prompt_index, entry.roster_index): entry for entry in body.entries}
        if list(entries) != sorted(entries) or len(entries) != len(body.entries):
            self._problem(f"the manifest of step {body.step} is not in order, or names a slot twice")
        expired = {(group.prompt_index, group.roster_index): group.kind for group in body.expired}
        if len(expired) != len(body.expired):
            self._problem(f"step {body.step} closed with a group that expired twice")
        for slot in sorted(entries.keys() - step.groups.keys()):
            self._problem(f"{_where(body.step, slot)} is in the manifest, but holds no group")
        for slot in sorted(expired.keys() - step.groups.keys()):
            self._problem(f"{_where(body.step, slot)} expired, but holds no group")
        for slot, group in sorted(step.groups.items()):
            where = _where(body.step, slot)
            entry = entries.get(slot)
            judged = step.judged.get(slot, {})
            if entry is None:
                self._problem(f"{where} was accepted, but is not in the manifest")
            elif entry.digest != group.digest:
                self._problem(f"{where} has another digest in the manifest than in its record")
            elif judged and entry.generation not in judged:
                self._problem(f"{where} pins generation {entry.generation}, which has no verdicts")
            if slot in expired and judged:
                self._problem(f"{where} was judged and yet expired")
            elif slot in expired:
                kind = expired[slot]
                lost = Unscored(kind, _EXPIRED_REASONS.get(kind, VerdictReason.UNSPECIFIED))
                self._outcomes((lost,) * group.rollout_count)
            elif not judged:
                self._problem(f"{where} has no outcome, but its step is closed")
        self._compare_counts(step, body)

    def _compare_counts(self, step: _Step, body: StepClosed) -> None:
        """The counts that the closing states for each agent, against its verdicts."""
        if tuple(entry.agent for entry in body.roster) != step.opened.roster:
            self._problem(f"step {body.step} closed with another roster than it opened with")
            return
        for index, entry in enumerate(body.roster):
            stated = next((counts for counts in entry.counts if counts.step == body.step), None)
            if stated is None:
                continue
            mine = {slot: group for slot, group in step.groups.items() if slot[1] == index}
            judged = [step.judged[slot][min(step.judged[slot])] for slot in mine if step.judged.get(slot)]
            counted = (
                sum(one.success for one in judged),
                sum(one.scored for one in judged),
                sum(group.rollout_count for group in mine.values()),
            )
            if counted != (stated.success_count, stated.scored_count, stated.total_count):
                self._problem(
                    f"the counts of {entry.agent} in step {body.step} are not those of its verdicts"
                )

    # --- small things --------------------------------------------------------------------------

    def _outcomes(self, verdicts: tuple[Verdict, ...]) -> None:
        for verdict in verdicts:
            if isinstance(verdict, Scored):
                self.scored += 1
                self.outcomes["scored"] += 1
            else:
                self.unscored += 1
                self.outcomes[f"{verdict.kind.value}/{verdict.reason.name.lower()}"] += 1

    def _problem(self, what: str) -> None:
        self._tell(f"Pool {self._pool}: {what}.")


def _where(step: int, slot: Slot) -> str:
    return f"slot (step {step}, prompt {slot[0]}, member {slot[1]})"
