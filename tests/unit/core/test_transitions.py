"""The tables of states: total, kept by evolve, and drawn in docs/lifecycle.md as they are."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from hacrl_exchange.broker.core import records as r
from hacrl_exchange.broker.core.transitions import GROUP, MEMBER, STEP, GroupPhase, moved
from hacrl_exchange.errors import CorruptLogError
from hacrl_exchange.types import MemberState, StepState

LIFECYCLE = Path(__file__).parents[3] / "docs" / "lifecycle.md"
TABLES: list[tuple[Mapping[enum.Enum | None, Mapping[type[r.RecordBody], enum.Enum]], type[enum.Enum]]] = [
    (MEMBER, MemberState),  # type: ignore[list-item]  # a Mapping is invariant in its keys
    (STEP, StepState),  # type: ignore[list-item]
    (GROUP, GroupPhase),  # type: ignore[list-item]
]


def diagram(table: Mapping[enum.Enum | None, Mapping[type[r.RecordBody], enum.Enum]]) -> str:
    """A table as a mermaid state diagram."""
    lines = ["```mermaid", "stateDiagram-v2"]
    for before, moves in table.items():
        name = before.name if before else "[*]"
        lines += [f"    {name} --> {after.name}: {record.__name__}" for record, after in moves.items()]
        if not moves:
            lines.append(f"    {name} --> [*]")
    return "\n".join([*lines, "```"])


@pytest.mark.parametrize(("table", "states"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_table_has_every_state_and_only_records_and_states(
    table: Mapping[enum.Enum | None, Mapping[type[r.RecordBody], enum.Enum]], states: type[enum.Enum]
) -> None:
    assert set(table) == {None, *states}
    for moves in table.values():
        assert set(moves) <= set(get_args(r.RecordBody))
        assert set(moves.values()) <= set(states)
    reached = {after for moves in table.values() for after in moves.values()}
    assert reached == set(states)


@pytest.mark.parametrize(("table", "states"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_diagrams_of_the_docs_are_the_tables(
    table: Mapping[enum.Enum | None, Mapping[type[r.RecordBody], enum.Enum]], states: type[enum.Enum]
) -> None:
    assert diagram(table) in LIFECYCLE.read_text(encoding="utf-8"), f"put this in:\n{diagram(table)}"


def test_a_move_that_is_not_in_the_table_is_a_corrupt_log() -> None:
    assert moved(MEMBER, MemberState.AWAY, r.MemberReturned("a")) is MemberState.ACTIVE
    with pytest.raises(
        CorruptLogError,
        match=r"^The log holds a MemberReturned for a thing that is LEFT: run hacrl audit, and restore "
        r"the data folder from a backup\.$",
    ):
        moved(MEMBER, MemberState.LEFT, r.MemberReturned("a"))
    with pytest.raises(CorruptLogError, match=r"^The log holds a MemberLeft for a thing that is nothing: "):
        moved(MEMBER, None, r.MemberLeft("a"))
