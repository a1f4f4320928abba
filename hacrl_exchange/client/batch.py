"""The joint batch of a closed step: waiting for the manifest, fetching what it lists, proving it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeAlias

import grpc

from hacrl_exchange._pb import exchange_service_pb2 as pb
from hacrl_exchange._pb import rollout_pb2, step_pb2
from hacrl_exchange.capability import CapabilityWindow, success_rate
from hacrl_exchange.client.retry import Patience
from hacrl_exchange.client.wire import Wire
from hacrl_exchange.codec import (
    decode_verified_group,
    duration_to_proto,
    enum_from_proto,
    group_name,
    model_spec_from_proto,
    pool_name,
    roster_entry_from_proto,
    wire_size,
)
from hacrl_exchange.errors import CountMismatchError, DigestMismatchError, InvalidRequestError
from hacrl_exchange.types import (
    ModelSpec,
    Prompt,
    RosterEntry,
    Slot,
    StepOutcome,
    VerifiedGroup,
)

Part: TypeAlias = Literal["text", "tokens", "logprobs", "meta"]
ALL_BUT_META: tuple[Part, ...] = ("text", "tokens", "logprobs")
_KINDS: Mapping[str, rollout_pb2.PartKind.ValueType] = {
    "text": rollout_pb2.PART_KIND_TEXT,
    "tokens": rollout_pb2.PART_KIND_TOKENS,
    "logprobs": rollout_pb2.PART_KIND_LOGPROBS,
    "meta": rollout_pb2.PART_KIND_META,
}


@dataclass(frozen=True, slots=True)
class JointBatch:
    """A closed step as one principal may see it: the same groups in the same order for all who see them all.

    `groups` are ordered by prompt, then roster; train only on rollouts whose verdict is `Scored`. `models`
    are in roster order. `capabilities` maps agents to P, the mean of their last success rates, this step
    included; an agent without a scored rollout in its window is absent. Groups that exist and are not here
    are counted: `unrevealed_count` for prompts that the reader did not answer, `withheld_count` for agents
    with too many unscored rollouts. `wire_bytes` is what fetching cost. Without membership prompts are known
    by id only; their messages are then empty.
    """

    pool: str
    step: int
    outcome: StepOutcome
    quorum_met: bool
    prompts: tuple[Prompt, ...]
    roster: tuple[RosterEntry, ...]
    models: tuple[ModelSpec, ...]
    groups: tuple[VerifiedGroup, ...]
    capabilities: Mapping[str, float]
    unrevealed_count: int
    withheld_count: int
    close_time: datetime
    wire_bytes: int

    def own(self, agent: str) -> tuple[VerifiedGroup, ...]:
        """The groups of this agent."""
        return tuple(group for group in self.groups if group.agent == agent)

    def peers(self, agent: str) -> tuple[VerifiedGroup, ...]:
        """The groups of everybody else."""
        return tuple(group for group in self.groups if group.agent != agent)


def part_kinds(parts: tuple[Part, ...]) -> list[rollout_pb2.PartKind.ValueType]:
    """The wire's kinds of the parts named.

    Raises:
        InvalidRequestError: there is none, or one is unknown.
    """
    unknown = [part for part in parts if part not in _KINDS]
    if unknown or not parts:
        raise InvalidRequestError(
            f"parts must name some of {', '.join(_KINDS)}, not {list(parts)}.", field="parts"
        )
    return [kind for part, kind in _KINDS.items() if part in parts]


def await_manifest(
    wire: Wire, *, pool: str, step: int, caller: pb.Caller | None, timeout_seconds: float | None
) -> step_pb2.Manifest:
    """Waits until a step is closed.

    Raises:
        TimeoutError: the caller's own limit passed first.
        ExchangeError: what the broker answers, e.g. StepNotFoundError, StepRetiredError.
    """

    def ask(wait: float, attempt_seconds: float, patience: Patience) -> step_pb2.Manifest | None:
        request = pb.AwaitManifestRequest(
            pool=pool_name(pool), caller=caller, step=step, wait=duration_to_proto(wait)
        )
        response = wire.call(
            wire.exchange.AwaitManifest, request, timeout_seconds=attempt_seconds, patience=patience
        )
        return response.manifest if response.HasField("manifest") else None

    return wire.wait_for(ask, timeout_seconds=timeout_seconds, what=f"The end of step {step} of pool {pool}")


def joint_batch(
    wire: Wire,
    manifest: step_pb2.Manifest,
    *,
    pool: str,
    caller: pb.Caller | None,
    prompts: Sequence[Prompt],
    parts: tuple[Part, ...],
    capability_window: int,
) -> JointBatch:
    """Fetches the groups of a manifest, each proven against it.

    Raises:
        DigestMismatchError, CountMismatchError: what came is not what the manifest lists.
        ExchangeError: a part does not decode, or the broker refuses.
    """
    roster = tuple(roster_entry_from_proto(entry) for entry in manifest.roster)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    download = _Download(wire, manifest, pool=pool, caller=caller, kinds=part_kinds(parts))
    groups = download.run()
    return JointBatch(
        pool=pool,
        step=manifest.step,
        outcome=enum_from_proto(StepOutcome, manifest.outcome),
        quorum_met=manifest.quorum_met,
        prompts=tuple(by_id.get(prompt_id) or Prompt(prompt_id, ()) for prompt_id in manifest.prompt_ids),
        roster=roster,
        models=tuple(model_spec_from_proto(model) for model in manifest.models),
        groups=tuple(groups),
        capabilities=capabilities(roster, window=capability_window),
        unrevealed_count=manifest.unrevealed_count,
        withheld_count=manifest.withheld_count,
        close_time=manifest.close_time.ToDatetime(tzinfo=UTC),
        wire_bytes=download.wire_bytes,
    )


def capabilities(roster: Sequence[RosterEntry], *, window: int) -> dict[str, float]:
    """P of every agent that has one, from the integer counts in a manifest's roster."""
    rates: dict[int, dict[str, float]] = {}
    for entry in roster:
        for counts in entry.counts:
            rate = success_rate(counts.success_count, counts.scored_count)
            if rate is not None:
                rates.setdefault(counts.step, {})[entry.agent] = rate
    found = CapabilityWindow(window=window)
    # Steps without any rate are recorded too: the window counts absences in steps.
    for step in range(min(rates, default=1), max(rates, default=0) + 1):
        found.record(rates.get(step, {}))
    return found.capabilities()


class _Download:
    """One stream of groups that, broken, goes on at the entry after the last one received."""

    def __init__(
        self,
        wire: Wire,
        manifest: step_pb2.Manifest,
        *,
        pool: str,
        caller: pb.Caller | None,
        kinds: Sequence[rollout_pb2.PartKind.ValueType],
    ) -> None:
        self._wire = wire
        self._manifest = manifest
        self._pool = pool
        self._caller = caller
        self._kinds = kinds
        self._groups: list[VerifiedGroup] = []
        self.wire_bytes = manifest.ByteSize()

    def run(self) -> list[VerifiedGroup]:
        """Every group of the manifest, in its order."""
        wire, patience = self._wire, self._wire.patience()
        wanted = len(self._manifest.entries)
        while len(self._groups) < wanted:
            request = pb.StreamGroupsRequest(
                pool=pool_name(self._pool),
                caller=self._caller,
                step=self._manifest.step,
                start_entry=len(self._groups),
                part_kinds=self._kinds,
            )
            before, began = len(self._groups), time.monotonic()
            try:
                with closing(wire.stream(wire.exchange.StreamGroups, request)) as messages:
                    for message in messages:
                        self._take(message)
                        patience.progress()
            except (grpc.RpcError, ValueError) as error:
                wire.pause_after(error, patience, began=began if before == len(self._groups) else None)
                continue
            if len(self._groups) < wanted and before == len(self._groups):
                raise CountMismatchError(
                    f"Step {self._manifest.step} of pool {self._pool} lists {wanted} groups; the broker "
                    f"delivered {before} of them and no more.",
                    step=self._manifest.step,
                )
        return self._groups

    def _take(self, message: pb.StreamGroupsResponse) -> None:
        for delivered in message.groups:
            self.wire_bytes += wire_size(delivered.group) + delivered.verdict.ByteSize()
            number = len(self._groups)
            if delivered.entry != number or number >= len(self._manifest.entries):
                raise CountMismatchError(
                    f"The broker delivered entry {delivered.entry} of step {self._manifest.step} "
                    f"where {number} of {len(self._manifest.entries)} was due.",
                    entry=delivered.entry,
                )
            self._groups.append(self._proven(delivered, self._manifest.entries[number]))

    def _proven(self, delivered: pb.DeliveredGroup, entry: step_pb2.ManifestEntry) -> VerifiedGroup:
        prompt_id = self._manifest.prompt_ids[entry.prompt_index]
        agent = self._manifest.roster[entry.roster_index].agent
        slot = Slot(step=self._manifest.step, prompt_id=prompt_id, agent=agent)
        group = decode_verified_group(delivered)
        if (
            delivered.group.name != group_name(self._pool, slot)
            or group.digest != entry.digest
            or group.generation != entry.generation
        ):
            raise DigestMismatchError(
                f"The broker delivered another group than entry {delivered.entry} of the manifest of step "
                f"{slot.step}: agent {agent}, prompt {prompt_id}.",
                step=slot.step,
                entry=delivered.entry,
            )
        return group
