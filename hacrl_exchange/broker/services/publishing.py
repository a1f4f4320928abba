"""PublishGroups: gate off the event loop, then the core, then the log; one result per group."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from google.rpc import status_pb2

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import rollout_pb2
from hacrl_exchange.broker.broker import Pool
from hacrl_exchange.broker.core.records import PublishGroup, StoredGroup
from hacrl_exchange.broker.gate import CheckedGroup, check_group
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.codec import group_name, parse_group_name
from hacrl_exchange.errors import (
    ExchangeError,
    ForeignSlotError,
    InvalidEnvelopeError,
    InvalidRequestError,
    LogFailedError,
    OverloadedError,
)
from hacrl_exchange.status import to_status
from hacrl_exchange.types import PoolSpec, Slot

_Checked: TypeAlias = tuple[Slot, CheckedGroup] | status_pb2.Status
"""What the gate made of a group: fit to enter, or the answer to its sender."""


class Publishing:
    """Takes groups in. Bounds what is being checked at once."""

    def __init__(self, *, limits: Limits, threads: ThreadPoolExecutor) -> None:
        self._limits = limits
        self._threads = threads
        self._under_way = 0

    async def publish(self, pool: Pool, request: pb.PublishGroupsRequest) -> pb.PublishGroupsResponse:
        """Answers once every accepted group is durable.

        Raises:
            InvalidRequestError: no groups, or more than a call may carry.
            OverloadedError: too much is being checked already.
            LogFailedError: nothing of the call is stored.
        """
        limit = self._limits.max_groups_per_publish
        if not 1 <= len(request.groups) <= limit:
            raise InvalidRequestError(
                f"A call publishes 1 to {limit} groups; this one has {len(request.groups)}.", field="groups"
            )
        size = _cost(request, max_part=self._limits.max_part_decoded_size)
        if size > self._limits.max_call_decoded_size:
            raise InvalidRequestError(
                f"The groups of the call decode to {size} bytes; the limit is "
                f"{self._limits.max_call_decoded_size}. Publish them in several calls.",
                field="groups",
            )
        if self._under_way and self._under_way + size > self._limits.max_publishing_size:
            raise OverloadedError(
                "The broker is checking as much as it can hold; retry shortly.", retry_seconds=0.2
            )
        self._under_way += size
        try:
            checked = await asyncio.get_running_loop().run_in_executor(
                self._threads, self._check_all, pool.runtime.state.spec, pool.runtime.name, request
            )
        finally:
            self._under_way -= size
        stored = [await _stored(pool, outcome) for outcome in checked]
        # From here to `durable` there is no await: a receipt must not outlive a log that failed meanwhile.
        results = [
            _accept(pool, request.caller, outcome, found)
            for outcome, found in zip(checked, stored, strict=True)
        ]
        await pool.runtime.durable()
        return pb.PublishGroupsResponse(results=results)

    def _check_all(self, spec: PoolSpec, pool_name: str, request: pb.PublishGroupsRequest) -> list[_Checked]:
        """In a gate thread: what each group is, or why it is refused."""
        outcomes: list[_Checked] = []
        for group in request.groups:
            try:
                slot = _own_slot(group, pool_name=pool_name, caller=request.caller)
                checked = check_group(
                    group, group_size=spec.group_size, max_tokens=spec.max_tokens, limits=self._limits
                )
                outcomes.append((slot, checked))
            except ExchangeError as error:
                # Not the error itself: its traceback holds the frames that hold the decoded parts.
                outcomes.append(to_status(error))
        return outcomes


async def _stored(pool: Pool, outcome: _Checked) -> StoredGroup | None:
    """What the log holds in the slot of a group whose step is not open any more."""
    if isinstance(outcome, status_pb2.Status):
        return None
    step = outcome[0].step
    state = pool.runtime.state
    if step in state.open_steps or not 1 <= step <= state.last_step:
        return None
    await pool.runtime.durable()  # it may have closed in memory and not yet on disk
    return await pool.history.stored_group(step, agent=outcome[0].agent, prompt_id=outcome[0].prompt_id)


def _accept(pool: Pool, caller: pb.Caller, outcome: _Checked, stored: StoredGroup | None) -> pb.PublishResult:
    if isinstance(outcome, status_pb2.Status):
        return pb.PublishResult(error=outcome)
    try:
        return pb.PublishResult(receipt=_put(pool, caller, outcome, stored))
    except LogFailedError:
        raise
    except ExchangeError as error:
        return pb.PublishResult(error=to_status(error))


def _put(
    pool: Pool, caller: pb.Caller, outcome: tuple[Slot, CheckedGroup], stored: StoredGroup | None
) -> rollout_pb2.Receipt:
    """Puts a group into its slot; durable later. Answers the first receipt to a repeat."""
    slot, checked = outcome
    runtime = pool.runtime
    runtime.apply(
        PublishGroup(
            agent=slot.agent,
            session=caller.session,
            step=slot.step,
            prompt_id=slot.prompt_id,
            digest=checked.digest,
            rollout_count=checked.rollout_count,
            envelope=checked.envelope,
            stored=stored,
        ),
        bodies=checked.parts,
    )
    step = runtime.state.open_steps.get(slot.step)
    if step is not None:
        session = step.groups[step.prompt_index[slot.prompt_id], step.roster_index[slot.agent]].session
    else:
        session = stored.session if stored is not None else caller.session
    return rollout_pb2.Receipt(
        group=group_name(runtime.name, slot),
        digest=checked.digest,
        session=session,
        rollout_count=checked.rollout_count,
    )


def _cost(request: pb.PublishGroupsRequest, *, max_part: int) -> int:
    """What checking the call may allocate beyond its own size: its bodies as large as they claim to be.

    A part that claims more than one may is refused alone, before it is decoded.
    """
    return sum(
        info.decoded_size
        for group in request.groups
        for info in group.envelope.parts
        if 0 < info.decoded_size <= max_part
    )


def _own_slot(group: rollout_pb2.Group, *, pool_name: str, caller: pb.Caller) -> Slot:
    pool, slot = parse_group_name(group.name)
    if pool != pool_name or slot.agent != caller.agent:
        raise ForeignSlotError(
            f"Group {group.name} is not of agent {caller.agent} in pool {pool_name}; publish your own.",
            group=group.name,
        )
    stated = group.envelope.policy_end.session
    if stated > caller.session:
        raise InvalidEnvelopeError(f"policy_end states session {stated}; the caller's is {caller.session}.")
    return slot
