"""Which record moves a member, a step or a group from where to where: the tables, and nothing else.

Two rules. A record that a table does not list cannot happen to that thing: evolve takes it for a corrupt
log. And the diagrams of docs/lifecycle.md are these tables; a test draws them and compares.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, TypeAlias, TypeVar

from hacrl_exchange.broker.core.records import (
    GroupAccepted,
    MemberJoined,
    MemberLeft,
    MemberReturned,
    PublishingEnded,
    RecordBody,
    StepClosed,
    StepOpened,
    VerdictsRecorded,
)
from hacrl_exchange.errors import CorruptLogError
from hacrl_exchange.types import MemberState, StepState

StateT = TypeVar("StateT", bound=enum.Enum)
# None stands for "does not exist yet".
Table: TypeAlias = Mapping[StateT | None, Mapping[type[RecordBody], StateT]]


class GroupPhase(enum.Enum):
    """Where an accepted group stands. A slot without a group has no state."""

    PENDING = 1
    JUDGED = 2
    EXPIRED = 3


# PublishingEnded moves only the members it judges LATE.
MEMBER: Final[Table[MemberState]] = {
    None: {MemberJoined: MemberState.ACTIVE},
    MemberState.ACTIVE: {
        MemberJoined: MemberState.ACTIVE,
        MemberLeft: MemberState.LEFT,
        PublishingEnded: MemberState.AWAY,
    },
    MemberState.AWAY: {
        MemberJoined: MemberState.ACTIVE,
        MemberReturned: MemberState.ACTIVE,
        MemberLeft: MemberState.LEFT,
        PublishingEnded: MemberState.AWAY,
    },
    MemberState.LEFT: {
        MemberJoined: MemberState.ACTIVE,
        PublishingEnded: MemberState.LEFT,
    },
}

STEP: Final[Table[StepState]] = {
    None: {StepOpened: StepState.PUBLISHING},
    StepState.PUBLISHING: {PublishingEnded: StepState.VERIFYING},
    StepState.VERIFYING: {StepClosed: StepState.CLOSED},
    StepState.CLOSED: {},
}

# StepClosed expires only the groups it lists as expired.
GROUP: Final[Table[GroupPhase]] = {
    None: {GroupAccepted: GroupPhase.PENDING},
    GroupPhase.PENDING: {VerdictsRecorded: GroupPhase.JUDGED, StepClosed: GroupPhase.EXPIRED},
    GroupPhase.JUDGED: {},
    GroupPhase.EXPIRED: {},
}


def moved(table: Table[StateT], state: StateT | None, body: RecordBody) -> StateT:
    """The state after a record.

    Raises:
        CorruptLogError: the table has no such transition.
    """
    after = table[state].get(type(body))
    if after is None:
        was = state.name if state is not None else "nothing"
        raise CorruptLogError(
            f"The log holds a {type(body).__name__} for a thing that is {was}: "
            "run hacrl audit, and restore the data folder from a backup.",
            record=type(body).__name__,
            state=was,
        )
    return after
