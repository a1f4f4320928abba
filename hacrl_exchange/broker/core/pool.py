"""A pool as one machine: `decide` answers a command with a record, `evolve` applies it.

`decide` only reads: a refusal leaves the state as it was, and None means that things already are as the
command asks. One command makes at most one record. The rules live in members.py, groups.py and steps.py.
"""

from __future__ import annotations

from hacrl_exchange.broker.core.fold import evolve
from hacrl_exchange.broker.core.groups import decide_publish, decide_verdicts
from hacrl_exchange.broker.core.members import decide_ack, decide_join, decide_leave, decide_touch
from hacrl_exchange.broker.core.records import (
    Ack,
    CloseStep,
    Command,
    CreatePool,
    EndPublishing,
    Join,
    Leave,
    OpenStep,
    PoolCreated,
    PublishGroup,
    RecordBody,
    RecordVerdicts,
    RetireSteps,
    Touch,
)
from hacrl_exchange.broker.core.spec import checked_spec
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.core.steps import decide_close, decide_end_publishing, decide_open, decide_retire
from hacrl_exchange.errors import PoolExistsError, PoolNotFoundError

__all__ = ["decide", "evolve", "record_time_us"]


def record_time_us(state: PoolState | None, *, now_us: int) -> int:
    """The time that a record taken now carries: never before the last record."""
    return now_us if state is None else max(state.last_time_us, now_us)


def decide(state: PoolState | None, command: Command, *, now_us: int) -> RecordBody | None:
    """What to record for a command, or None if there is nothing to record.

    `now_us` earlier than the last record counts as the time of the last record.

    Raises:
        ExchangeError: a refusal, by the class that says why.
    """
    if isinstance(command, CreatePool):
        return _decide_create(state, command)
    if state is None:
        raise PoolNotFoundError("The pool does not exist: hacrl pool list names those that do.")
    now_us = record_time_us(state, now_us=now_us)
    match command:
        case PublishGroup():
            return decide_publish(state, command, now_us=now_us)
        case RecordVerdicts():
            return decide_verdicts(state, command)
        case Touch():
            return decide_touch(state, command)
        case Join():
            return decide_join(state, command)
        case Leave():
            return decide_leave(state, command)
        case Ack():
            return decide_ack(state, command)
        case OpenStep():
            return decide_open(state, command)
        case EndPublishing():
            return decide_end_publishing(state, command, now_us=now_us)
        case CloseStep():
            return decide_close(state, command, now_us=now_us)
        case RetireSteps():
            return decide_retire(state, command)


def _decide_create(state: PoolState | None, command: CreatePool) -> PoolCreated | None:
    spec = checked_spec(command.spec, prompt_count=command.prompt_count)
    if state is None:
        return PoolCreated(command.pool, spec, command.prompt_count)
    if state.spec != spec:
        raise PoolExistsError(
            f"Pool {command.pool} exists with another spec: pools are immutable, choose another name.",
            pool=command.pool,
        )
    return None
