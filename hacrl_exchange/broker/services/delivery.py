"""Manifests and the groups behind them, as one caller may see them.

The reveal rule is asked right before delivery. Bodies are read a message ahead of the wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from hacrl_exchange import codec
from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import records_pb2, rollout_pb2, step_pb2, verdict_pb2
from hacrl_exchange.broker.broker import Pool
from hacrl_exchange.broker.core.records import ExpiredGroup, ManifestEntry
from hacrl_exchange.broker.core.reveal import Visibility, visible
from hacrl_exchange.broker.history import ClosedStep, GroupAt
from hacrl_exchange.broker.limits import Limits
from hacrl_exchange.errors import InvalidRequestError
from hacrl_exchange.types import ModelSpec, Slot, Unscored, UnscoredKind, VerdictReason

_DEFAULT_KINDS = (rollout_pb2.PART_KIND_TEXT, rollout_pb2.PART_KIND_TOKENS, rollout_pb2.PART_KIND_LOGPROBS)
_EXPIRY_REASONS = {
    UnscoredKind.TIMEOUT: VerdictReason.VERIFY_DEADLINE,
    UnscoredKind.UNSUPPORTED: VerdictReason.NO_WORKER,
}
FIRST_GENERATION = 1
_ROLLOUT_SIZE = 16
"""What a verdict takes beside its own bytes, or an expired one in all, at most."""


async def manifest(pool: Pool, step: int, *, caller: pb.Caller, principal: str) -> step_pb2.Manifest:
    """The manifest of a closed step for one caller."""
    history = await pool.history.closed(step)
    shown = _visibility(pool, history, caller=caller, principal=principal)
    closed = history.closed
    members = pool.runtime.state.members
    return step_pb2.Manifest(
        name=f"pools/{pool.runtime.name}/steps/{step}/manifest",
        step=step,
        outcome=step_pb2.StepOutcome.ValueType(closed.outcome.value),
        quorum_met=closed.quorum_met,
        prompt_ids=history.opened.prompt_ids,
        roster=[codec.roster_entry_to_proto(entry) for entry in closed.roster],
        entries=[
            step_pb2.ManifestEntry(
                prompt_index=entry.prompt_index,
                roster_index=entry.roster_index,
                digest=entry.digest,
                generation=entry.generation,
            )
            for entry in (closed.entries[index] for index in shown.entries)
        ],
        unrevealed_count=shown.unrevealed_count,
        withheld_count=shown.withheld_count,
        close_time=codec.timestamp_to_proto(history.close_time_us),
        models=[
            codec.model_spec_to_proto(members[entry.agent].model if entry.agent in members else ModelSpec())
            for entry in closed.roster
        ],
    )


async def groups(
    pool: Pool, request: pb.StreamGroupsRequest, *, principal: str, limits: Limits
) -> AsyncIterator[pb.StreamGroupsResponse]:
    """The groups of a closed step, from an entry on, in messages of bounded size.

    Raises:
        InvalidRequestError: the entry does not exist.
    """
    history = await pool.history.closed(request.step)
    shown = _visibility(pool, history, caller=request.caller, principal=principal)
    if not 0 <= request.start_entry <= len(shown.entries):
        raise InvalidRequestError(
            f"start_entry must be 0 to {len(shown.entries)}; it is {request.start_entry}.",
            field="start_entry",
        )
    expired = {(group.prompt_index, group.roster_index): group for group in history.closed.expired}
    wanted = [history.closed.entries[index] for index in shown.entries[request.start_entry :]]
    picked = [
        _pick(history.groups[slot], request.part_kinds, extra_size=_verdict_size(history.verdicts.get(slot)))
        for slot in ((entry.prompt_index, entry.roster_index) for entry in wanted)
    ]
    number = request.start_entry
    async for part in _read_ahead(pool, picked, limits=limits):
        message = pb.StreamGroupsResponse()
        for choice, bodies in part:
            entry = wanted[number - request.start_entry]
            delivered = message.groups.add(entry=number)
            _fill(delivered.group, pool, history.opened.prompt_ids, history.opened.roster, choice, bodies)
            _fill_verdict(delivered.verdict, history, entry, expired)
            number += 1
        yield message


async def own_groups(
    pool: Pool, request: pb.StreamOwnGroupsRequest, *, limits: Limits
) -> AsyncIterator[pb.StreamOwnGroupsResponse]:
    """An agent's own groups of a step, open or closed."""
    step = pool.runtime.state.open_steps.get(request.step)
    opened = step if step is not None else await pool.history.opened(request.step)
    if request.caller.agent not in opened.roster:
        return
    me = opened.roster.index(request.caller.agent)
    stored = await pool.history.groups(request.step)
    own = [stored[slot] for slot in sorted(stored) if slot[1] == me]
    picked = [_pick(group, request.part_kinds) for group in own]
    async for part in _read_ahead(pool, picked, limits=limits):
        message = pb.StreamOwnGroupsResponse()
        for choice, bodies in part:
            _fill(message.groups.add(), pool, opened.prompt_ids, opened.roster, choice, bodies)
        yield message


async def closed_step_message(pool: Pool, number: int, *, agent: str) -> step_pb2.Step:
    """A closed step as one agent sees it."""
    history = await pool.history.closed(number)
    opened = history.opened
    me = opened.roster.index(agent)
    return step_pb2.Step(
        name=f"pools/{pool.runtime.name}/steps/{number}",
        number=number,
        state=step_pb2.STEP_STATE_CLOSED,
        prompts=[pool.prompts.prompt(prompt_id) for prompt_id in opened.prompt_ids],
        roster=opened.roster,
        committed_prompt_ids=[
            prompt_id for index, prompt_id in enumerate(opened.prompt_ids) if (index, me) in history.groups
        ],
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """A group with the indices and kinds of its parts to send, and their size."""

    at: GroupAt
    envelope: rollout_pb2.Envelope
    indices: tuple[int, ...]
    size: int


def _visibility(pool: Pool, history: ClosedStep, *, caller: pb.Caller, principal: str) -> Visibility:
    rule = pool.runtime.state.spec.reveal
    return visible(history.closed, principal=principal, agent=caller.agent, rule=rule)


def _verdict_size(recorded: records_pb2.VerdictsRecorded | None) -> int:
    """What the verdicts of a group take in a message. A group without any has expired; that fits in what is
    allowed for every rollout."""
    if recorded is None:
        return 0
    return recorded.verifier.ByteSize() + sum(verdict.ByteSize() for verdict in recorded.verdicts)


def _pick(at: GroupAt, kinds: Sequence[int], *, extra_size: int = 0) -> _Choice:
    envelope = rollout_pb2.Envelope.FromString(at.record.envelope)
    wanted = set(kinds or _DEFAULT_KINDS)
    indices = tuple(index for index, info in enumerate(envelope.parts) if info.kind in wanted)
    size = len(at.record.envelope) + sum(envelope.parts[index].stored_size for index in indices)
    size += extra_size + 512 + _ROLLOUT_SIZE * at.record.rollout_count
    return _Choice(at, envelope, indices, size)


async def _read_ahead(
    pool: Pool, choices: Sequence[_Choice], *, limits: Limits
) -> AsyncIterator[list[tuple[_Choice, tuple[bytes, ...]]]]:
    """Message-sized runs of groups with their bodies; the next run is read while one is sent."""
    pending: asyncio.Task[list[tuple[_Choice, tuple[bytes, ...]]]] | None = None
    try:
        for run in _runs(choices, limits.delivery_message_size):
            following = asyncio.create_task(_read(pool, run))
            if pending is not None:
                done, pending = pending, following
                yield await done
            pending = following
        if pending is not None:
            yield await pending
    finally:
        if pending is not None:
            pending.cancel()


def _runs(choices: Sequence[_Choice], limit: int) -> list[list[_Choice]]:
    runs: list[list[_Choice]] = []
    size = limit
    for choice in choices:
        if size + choice.size > limit:
            runs.append([])
            size = 0
        runs[-1].append(choice)
        size += choice.size
    return runs


async def _read(pool: Pool, run: Sequence[_Choice]) -> list[tuple[_Choice, tuple[bytes, ...]]]:
    bodies = await pool.history.bodies([(choice.at.position, choice.indices) for choice in run])
    return list(zip(run, bodies, strict=True))


def _fill(
    message: rollout_pb2.Group,
    pool: Pool,
    prompt_ids: Sequence[str],
    roster: Sequence[str],
    choice: _Choice,
    bodies: tuple[bytes, ...],
) -> None:
    record = choice.at.record
    slot = Slot(record.step, prompt_ids[record.prompt_index], roster[record.roster_index])
    message.name = codec.group_name(pool.runtime.name, slot)
    message.envelope.CopyFrom(choice.envelope)
    message.parts.extend(bodies)
    message.part_kinds.extend(choice.envelope.parts[index].kind for index in choice.indices)


def _fill_verdict(
    message: verdict_pb2.GroupVerdict,
    history: ClosedStep,
    entry: ManifestEntry,
    expired: dict[tuple[int, int], ExpiredGroup],
) -> None:
    message.generation = entry.generation
    slot = (entry.prompt_index, entry.roster_index)
    if slot in expired:
        kind = expired[slot].kind
        verdict = codec.verdict_to_proto(Unscored(kind, _EXPIRY_REASONS[kind]))
        message.verdicts.extend([verdict] * history.groups[slot].record.rollout_count)
        return
    recorded = history.verdicts[slot]
    if recorded.HasField("verifier"):
        message.verifier.CopyFrom(recorded.verifier)
    message.verdicts.extend(recorded.verdicts)
