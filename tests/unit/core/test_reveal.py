"""Who sees which groups of a closed step."""

from __future__ import annotations

import pytest

from hacrl_exchange.broker.core.records import ManifestEntry, StepClosed
from hacrl_exchange.broker.core.reveal import Visibility, visible
from hacrl_exchange.types import RevealRule, RosterEntry, RosterState, StepOutcome


def closed_step(
    owners: dict[str, str], slots: list[tuple[int, str]], *, withheld: tuple[str, ...] = ()
) -> StepClosed:
    """A closed step: agents with their principals, accepted (prompt index, agent) in manifest order."""
    agents = list(owners)
    return StepClosed(
        step=1,
        outcome=StepOutcome.QUORUM,
        quorum_met=True,
        roster=tuple(
            RosterEntry(agent, owners[agent], RosterState.LATE, (), withheld=agent in withheld)
            for agent in agents
        ),
        entries=tuple(ManifestEntry(prompt, agents.index(agent), b"", 1) for prompt, agent in slots),
        expired=(),
    )


SLOTS = [(0, "a1"), (0, "b"), (1, "a2"), (1, "b"), (2, "b"), (2, "c")]
OWNERS = {"a1": "alice", "a2": "alice", "b": "bob", "c": "carol"}
STEP = closed_step(OWNERS, SLOTS)
LOCAL = closed_step(dict.fromkeys(OWNERS, "local"), SLOTS)


@pytest.mark.parametrize(
    ("principal", "agent", "entries", "unrevealed"),
    [
        ("alice", "", (0, 1, 2, 3), 2),
        ("alice", "a1", (0, 1, 2, 3), 2),
        ("bob", "b", (0, 1, 2, 3, 4, 5), 0),
        ("carol", "c", (4, 5), 4),
        ("mallory", "", (), 6),
    ],
)
def test_a_principal_gets_what_it_gave_for(
    principal: str, agent: str, entries: tuple[int, ...], unrevealed: int
) -> None:
    found = visible(STEP, principal=principal, agent=agent, rule=RevealRule.GIVE_TO_GET)
    assert found == Visibility(entries, unrevealed, 0)


@pytest.mark.parametrize(
    ("agent", "entries"),
    [("a1", (0, 1)), ("a2", (2, 3)), ("c", (4, 5)), ("", (0, 1, 2, 3, 4, 5)), ("joined-later", ())],
)
def test_on_a_broker_without_keys_every_agent_gives_for_itself(agent: str, entries: tuple[int, ...]) -> None:
    found = visible(LOCAL, principal="local", agent=agent, rule=RevealRule.GIVE_TO_GET)
    assert found == Visibility(entries, len(SLOTS) - len(entries), 0)


def test_an_open_pool_shows_everything_to_everybody() -> None:
    found = visible(STEP, principal="mallory", rule=RevealRule.OPEN)
    assert found == Visibility((0, 1, 2, 3, 4, 5), 0, 0)


@pytest.mark.parametrize("rule", list(RevealRule))
@pytest.mark.parametrize(
    ("principal", "agent", "withheld_count"),
    [("alice", "a1", 0), ("alice", "a2", 1), ("alice", "", 0), ("bob", "b", 1), ("bob", "", 1)],
)
def test_withheld_groups_are_seen_by_their_agent_alone(
    rule: RevealRule, principal: str, agent: str, withheld_count: int
) -> None:
    step = closed_step(OWNERS, SLOTS, withheld=("a1",))
    found = visible(step, principal=principal, agent=agent, rule=rule)
    assert found.withheld_count == withheld_count
    assert (0 in found.entries) is not bool(withheld_count)


def test_withheld_groups_of_a_local_agent_are_not_for_the_other_local_agents() -> None:
    step = closed_step(dict.fromkeys(OWNERS, "local"), SLOTS, withheld=("b",))
    found = visible(step, principal="local", agent="a1", rule=RevealRule.GIVE_TO_GET)
    assert found == Visibility((0,), 2, 3)
    own = visible(step, principal="local", agent="b", rule=RevealRule.GIVE_TO_GET)
    assert own == Visibility((0, 1, 2, 3, 4, 5), 0, 0)


def test_every_group_is_seen_or_counted() -> None:
    for principal in ("alice", "bob", "carol", "mallory"):
        found = visible(
            closed_step(OWNERS, SLOTS, withheld=("b",)), principal=principal, rule=RevealRule.GIVE_TO_GET
        )
        assert len(found.entries) + found.unrevealed_count + found.withheld_count == len(SLOTS)
