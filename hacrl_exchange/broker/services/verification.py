"""VerificationService: what workers call."""

from __future__ import annotations

import math

from hacrl_exchange import codec
from hacrl_exchange._pb import prompt_pb2, rollout_pb2, verdict_pb2, verification_service_pb2_grpc
from hacrl_exchange._pb import verification_service_pb2 as pb
from hacrl_exchange.broker.broker import Broker
from hacrl_exchange.broker.core.records import RecordVerdicts
from hacrl_exchange.broker.core.state import GroupState
from hacrl_exchange.broker.core.verification import GroupRef
from hacrl_exchange.broker.desk import LeasedWork
from hacrl_exchange.broker.history import GroupAt
from hacrl_exchange.broker.interceptors import Context, Identities
from hacrl_exchange.broker.services.requests import wait_seconds
from hacrl_exchange.errors import (
    ExchangeError,
    GroupNotFoundError,
    InvalidRequestError,
    InvalidVerdictError,
    LogFailedError,
    StepClosedError,
    UnknownPromptError,
)
from hacrl_exchange.status import to_status
from hacrl_exchange.types import Slot

_FIELD_SIZE = 8
"""Bytes before a field's content, at most, in messages of this size."""
_REASONS = frozenset(verdict_pb2.VerdictReason.values())


class VerificationService(verification_service_pb2_grpc.VerificationServiceServicer):
    """Leases groups to workers and records their verdicts."""

    def __init__(self, broker: Broker, identities: Identities) -> None:
        self._broker = broker
        self._identities = identities

    async def RegisterWorker(
        self, request: pb.RegisterWorkerRequest, context: Context
    ) -> pb.RegisterWorkerResponse:
        limits = self._broker.limits
        longest = limits.max_name_size
        if not _is_name(request.identity, longest):
            raise InvalidRequestError(f"identity must be 1 to {longest} bytes.", field="identity")
        if not 1 <= len(request.verifiers) <= limits.max_offers_per_worker or not all(
            _is_name(offer.verifier, longest) and _is_name(offer.version, longest)
            for offer in request.verifiers
        ):
            raise InvalidRequestError(
                f"verifiers must name 1 to {limits.max_offers_per_worker}, each with a name and a version "
                f"of 1 to {longest} bytes.",
                field="verifiers",
            )
        principal = self._identities.principal(context)
        worker = self._broker.desk.register(
            identity=request.identity,
            verifiers=[offer.verifier for offer in request.verifiers],
            principal=principal,
            needs_tokens=[offer.verifier for offer in request.verifiers if offer.needs_tokens],
        )
        return pb.RegisterWorkerResponse(
            worker=worker, lease_timeout=codec.duration_to_proto(self._broker.limits.lease_timeout_seconds)
        )

    async def AcquireLease(
        self, request: pb.AcquireLeaseRequest, context: Context
    ) -> pb.AcquireLeaseResponse:
        limits = self._broker.limits
        if not 0 <= request.max_groups <= limits.max_groups_per_lease:
            raise InvalidRequestError(
                f"max_groups must be 0 to {limits.max_groups_per_lease}; it is {request.max_groups}.",
                field="max_groups",
            )
        self._broker.desk.touch(request.worker)
        work = await self._broker.desk.acquire(
            request.worker,
            max_groups=request.max_groups or 1,
            wait_seconds=wait_seconds(request.wait, limit=limits.max_wait_seconds),
        )
        if work is None:
            return pb.AcquireLeaseResponse()
        try:
            return await self._lease_message(request.worker, work)
        except BaseException:
            # Nobody gets these groups, most often because the caller went away: they were never worked on.
            self._broker.desk.put_back([ref for ref, _ in work.groups], lease_id=work.lease_id)
            raise

    async def RenewLease(self, request: pb.RenewLeaseRequest, context: Context) -> pb.RenewLeaseResponse:
        self._broker.desk.renew(request.worker, request.lease)
        return pb.RenewLeaseResponse(
            lease_timeout=codec.duration_to_proto(self._broker.limits.lease_timeout_seconds)
        )

    async def ReportVerdicts(
        self, request: pb.ReportVerdictsRequest, context: Context
    ) -> pb.ReportVerdictsResponse:
        desk = self._broker.desk
        if not request.reports or not request.lease:
            raise InvalidRequestError(
                "reports must hold at least one report, and lease the id it was acquired under.",
                field="reports",
            )
        if len(request.reports) > self._broker.limits.max_groups_per_lease:
            raise InvalidRequestError(
                f"A call carries at most {self._broker.limits.max_groups_per_lease} reports, as a lease does "
                "groups; split it.",
                field="reports",
            )
        desk.touch(request.worker)
        identity = desk.identity(request.worker)
        response = pb.ReportVerdictsResponse()
        touched = {}
        for report in request.reports:
            result = response.results.add()
            try:
                pool = await self._record(report, identity)
                touched[pool] = self._broker.pool(pool).runtime
            except LogFailedError:
                raise
            except ExchangeError as error:
                result.error.CopyFrom(to_status(error))
        for runtime in touched.values():
            await runtime.durable()
        return response

    async def _record(self, report: pb.VerdictReport, identity: str) -> str:
        pool_name, slot = codec.parse_group_name(report.group)
        pool = self._broker.pool(pool_name)
        step = pool.runtime.state.open_steps.get(slot.step)
        if step is None:
            raise StepClosedError(
                f"Step {slot.step} of pool {pool_name} is not open; its verdicts are final.",
                pool=pool_name,
                step=slot.step,
            )
        prompt_index = step.prompt_index.get(slot.prompt_id)
        roster_index = step.roster_index.get(slot.agent)
        group = None
        if prompt_index is not None and roster_index is not None:
            group = step.groups.get((prompt_index, roster_index))
        if prompt_index is None or roster_index is None or group is None:
            raise GroupNotFoundError(f"There is no group {report.group}.", group=report.group)
        self._check_report(report, group)
        verdicts = tuple(codec.verdict_from_proto(verdict) for verdict in report.verdicts)
        command = RecordVerdicts(
            step=slot.step,
            prompt_index=prompt_index,
            roster_index=roster_index,
            generation=report.generation,
            verifier=codec.verifier_identity_from_proto(report.verifier),
            worker=identity,
            verdicts=verdicts,
            details=tuple(report.details),
        )
        try:
            pool.runtime.apply(command)
        finally:
            known = step.groups.get((prompt_index, roster_index))
            if known is not None and known.generation:
                self._broker.desk.finish(command, pool=pool_name)
        return pool_name

    def _check_report(self, report: pb.VerdictReport, group: GroupState) -> None:
        """Refuses a malformed report. Its length comes first: nothing grows with what a caller sends."""
        limits = self._broker.limits
        identity = report.verifier
        problem = ""
        if len(report.verdicts) != group.rollout_count:
            problem = f"it has {len(report.verdicts)} verdicts for {group.rollout_count} rollouts"
        elif (
            not _is_name(identity.verifier, limits.max_name_size)
            or not _is_name(identity.version, limits.max_name_size)
            or len(identity.config_digest) != 32
        ):
            problem = (
                f"verifier needs a name and a version of 1 to {limits.max_name_size} bytes and a config "
                "digest of 32 bytes"
            )
        elif report.generation < 1:
            problem = "generation must be at least 1"
        elif report.details and len(report.details) != len(report.verdicts):
            problem = "details must be empty or one per verdict"
        elif any(len(detail.encode()) > limits.max_detail_size for detail in report.details):
            problem = f"a detail is longer than {limits.max_detail_size} bytes"
        else:
            problem = next(filter(None, (self._problem(verdict) for verdict in report.verdicts)), "")
        if problem:
            raise InvalidVerdictError(
                f"The report for {report.group} is invalid: {problem}.", group=report.group
            )

    def _problem(self, verdict: verdict_pb2.Verdict) -> str:
        """What is wrong with a verdict; empty if nothing is."""
        limits = self._broker.limits
        outcome = verdict.WhichOneof("outcome")
        if outcome is None:
            return "a verdict states no outcome"
        if verdict.reason not in _REASONS:
            return f"this broker does not know the reason {verdict.reason}"
        if outcome != "scored" or not verdict.scored.components:
            return ""
        components = verdict.scored.components
        if len(components) > limits.max_components or not all(
            _is_name(name, limits.max_component_name_size) and math.isfinite(value)
            for name, value in components.items()
        ):
            return (
                f"components must be finite and at most {limits.max_components}, with names of 1 to "
                f"{limits.max_component_name_size} bytes"
            )
        return ""

    async def _lease_message(self, worker: str, work: LeasedWork) -> pb.AcquireLeaseResponse:
        """The groups of a lease with their texts, as many as fit into a message; the rest goes back."""
        message = pb.AcquireLeaseResponse(lease=work.lease_id)
        needs_tokens = self._broker.desk.needs_tokens(worker)
        size = 0
        for number, (ref, at) in enumerate(work.groups):
            leased = await self._leased_group(ref, at, tokens=ref.verifier in needs_tokens)
            size += leased.ByteSize() + sum(
                info.stored_size + _FIELD_SIZE
                for info in leased.envelope.parts
                if info.kind in leased.part_kinds
            )
            if number and size > self._broker.limits.lease_message_size:
                rest = [other for other, _ in work.groups[number:]]
                self._broker.desk.put_back(rest, lease_id=work.lease_id)
                break
            message.groups.append(leased)
        await self._add_bodies(message, work)
        return message

    async def _leased_group(self, ref: GroupRef, at: GroupAt, *, tokens: bool) -> pb.LeasedGroup:
        """A group as a worker gets it, still without the bytes of its parts."""
        pool = self._broker.pool(ref.pool)
        step = pool.runtime.state.open_steps.get(ref.step)
        opened = step if step is not None else await pool.history.opened(ref.step)
        envelope = rollout_pb2.Envelope.FromString(at.record.envelope)
        kinds = {rollout_pb2.PART_KIND_TEXT}
        if tokens:
            kinds.add(rollout_pb2.PART_KIND_TOKENS)
        plan = pool.runtime.state.spec.plan
        prompt_id = opened.prompt_ids[ref.prompt_index]
        return pb.LeasedGroup(
            group=codec.group_name(ref.pool, Slot(ref.step, prompt_id, opened.roster[ref.roster_index])),
            generation=ref.generation,
            verifier=ref.verifier,
            config_json=plan.verifiers[0].config_json,
            item_timeout=codec.duration_to_proto(plan.item_timeout_seconds),
            prompt=self._prompt(ref.pool, prompt_id),
            envelope=envelope,
            part_kinds=[info.kind for info in envelope.parts if info.kind in kinds],
        )

    async def _add_bodies(self, message: pb.AcquireLeaseResponse, work: LeasedWork) -> None:
        """Reads the parts of all groups at once, pool by pool."""
        by_pool: dict[str, list[tuple[pb.LeasedGroup, int, list[int]]]] = {}
        for leased, (ref, at) in zip(message.groups, work.groups, strict=False):
            indices = [
                index for index, info in enumerate(leased.envelope.parts) if info.kind in leased.part_kinds
            ]
            by_pool.setdefault(ref.pool, []).append((leased, at.position, indices))
        for pool, wanted in by_pool.items():
            bodies = await self._broker.pool(pool).history.bodies(
                [(position, indices) for _, position, indices in wanted]
            )
            for (leased, _, _), parts in zip(wanted, bodies, strict=True):
                leased.parts.extend(parts)

    def _prompt(self, pool: str, prompt_id: str) -> prompt_pb2.PromptEntry:
        entry = self._broker.pool(pool).prompts.entries.get(prompt_id)
        if entry is None:
            raise UnknownPromptError(
                f"Pool {pool} has no prompt {prompt_id}.", pool=pool, prompt_id=prompt_id
            )
        return entry


def _is_name(text: str, longest: int) -> bool:
    return 1 <= len(text.encode()) <= longest
