"""Decisions about members: join, call, leave, ack. Reads only."""

from __future__ import annotations

from hacrl_exchange.broker.core.records import (
    Ack,
    Join,
    Leave,
    MemberJoined,
    MemberLeft,
    MemberReturned,
    StepAcked,
    Touch,
)
from hacrl_exchange.broker.core.spec import MAX_MEMBERS, NAME
from hacrl_exchange.broker.core.state import Member, PoolState
from hacrl_exchange.errors import (
    AgentTakenError,
    InvalidRequestError,
    NotJoinedError,
    PoolFullError,
    SessionSupersededError,
)
from hacrl_exchange.types import MemberState


def decide_join(state: PoolState, command: Join) -> MemberJoined | MemberReturned | None:
    """A session for the agent: the one of this instance again, or the next one.

    A member that left has no session to find again; its next one counts on.

    Raises:
        AgentTakenError: another principal owns the agent.
        PoolFullError: the agent is new and the pool takes no more.
        InvalidRequestError: the agent's or the instance's name is malformed.
    """
    if not NAME.fullmatch(command.agent):
        raise InvalidRequestError(
            f"The agent id {command.agent[:80]!r} is not 1 to 63 characters a-z, 0-9 and '-': "
            "choose another.",
            field="agent",
        )
    if not 1 <= len(command.instance) <= 128:
        raise InvalidRequestError(
            "The instance must be 1 to 128 characters: use a random UUID per process.", field="instance"
        )
    member = state.members.get(command.agent)
    if member is None:
        if len(state.members) >= MAX_MEMBERS:
            raise PoolFullError(
                f"Pool {state.pool} has {MAX_MEMBERS} members, the most a pool may ever have: "
                "join as one of them, or make another pool.",
                pool=state.pool,
                limit=MAX_MEMBERS,
            )
        return MemberJoined(command.agent, command.principal, 1, command.instance, command.model)
    if member.principal != command.principal:
        raise AgentTakenError(
            f"The agent {command.agent} of pool {state.pool} belongs to another principal: "
            "choose another name.",
            agent=command.agent,
            pool=state.pool,
        )
    if member.state is not MemberState.LEFT and member.instance == command.instance:
        return MemberReturned(command.agent) if member.state is MemberState.AWAY else None
    return MemberJoined(command.agent, command.principal, member.session + 1, command.instance, command.model)


def decide_touch(state: PoolState, command: Touch) -> MemberReturned | None:
    """Checks a session; an AWAY member is back.

    Raises:
        NotJoinedError, SessionSupersededError: as `checked_member`.
    """
    member = checked_member(state, command.agent, session=command.session)
    return MemberReturned(command.agent) if member.state is MemberState.AWAY else None


def decide_leave(state: PoolState, command: Leave) -> MemberLeft | None:
    """Ends a session; a repeat by the session that left finds it so.

    Raises:
        NotJoinedError, SessionSupersededError: as `checked_member`.
    """
    member = state.members.get(command.agent)
    if member is not None and member.state is MemberState.LEFT and member.session == command.session:
        return None
    checked_member(state, command.agent, session=command.session)
    return MemberLeft(command.agent)


def decide_ack(state: PoolState, command: Ack) -> StepAcked | None:
    """Acknowledges every step up to a closed one; an older ack is covered already.

    Raises:
        InvalidRequestError: the step is not closed yet.
        NotJoinedError, SessionSupersededError: as `checked_member`.
    """
    member = checked_member(state, command.agent, session=command.session)
    if command.step <= member.acked_step:
        return None
    if command.step > state.closed_through:
        raise InvalidRequestError(
            f"Step {command.step} is not closed: only closed steps can be acknowledged, "
            f"and the newest is {state.closed_through}.",
            field="step",
            step=command.step,
            closed_through=state.closed_through,
        )
    return StepAcked(command.agent, command.step)


def checked_member(state: PoolState, agent: str, *, session: int) -> Member:
    """The member that a call speaks for.

    Raises:
        NotJoinedError: the agent has no such session, or has left.
        SessionSupersededError: a newer session of the agent exists.
    """
    member = state.members.get(agent)
    if member is not None and member.session == session and member.state is not MemberState.LEFT:
        return member
    if member is not None and 1 <= session < member.session:
        raise SessionSupersededError(
            f"Session {session} of agent {agent} was superseded by session {member.session}: "
            "stop this process.",
            agent=agent,
            pool=state.pool,
            session=session,
            newest_session=member.session,
        )
    raise NotJoinedError(
        f"Agent {agent} has no session {session} in pool {state.pool}: join the pool first.",
        agent=agent,
        pool=state.pool,
        session=session,
    )
