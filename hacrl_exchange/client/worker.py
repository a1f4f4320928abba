"""What a worker calls. One attempt per call: a worker is a loop that tries again by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from hacrl_exchange._pb import rollout_pb2
from hacrl_exchange._pb import verification_service_pb2 as pb
from hacrl_exchange.client.wire import CALL_SECONDS, Wire
from hacrl_exchange.codec import (
    decode_group,
    duration_from_proto,
    duration_to_proto,
    prompt_entry_from_proto,
    verdict_to_proto,
    verifier_identity_to_proto,
)
from hacrl_exchange.errors import ExchangeError, InternalError
from hacrl_exchange.status import from_status
from hacrl_exchange.types import PromptEntry, Rollout, Verdict, VerifierIdentity

WORKER_KEY = "hacrl-worker-key"
"""Metadata key under which a worker shows its key."""


@dataclass(frozen=True, slots=True)
class OfferedVerifier:
    """A verifier that a worker can run."""

    verifier: str
    version: str
    needs_tokens: bool = False


@dataclass(frozen=True, slots=True)
class WorkerRegistration:
    """The broker's answer to a registration: the worker's id, and how long a lease lives unrenewed."""

    worker: str
    lease_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class LeasedGroup:
    """One group to verify. Rollouts have text, and token ids if the verifier asked for them.

    `problem` says why the group could not be decoded here; it has no rollouts then, and is to be reported.
    """

    name: str
    generation: int
    verifier: str
    config_json: str
    item_timeout_seconds: float
    prompt: PromptEntry
    rollout_count: int
    rollouts: tuple[Rollout, ...]
    problem: ExchangeError | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Groups lent to a worker."""

    lease: str
    groups: tuple[LeasedGroup, ...]


@dataclass(frozen=True, slots=True)
class VerdictReport:
    """The verdicts of one group, one per rollout. `details`: none, or one text per rollout for operators."""

    group: str
    generation: int
    verifier: VerifierIdentity
    verdicts: tuple[Verdict, ...]
    details: tuple[str, ...] = ()


class WorkerClient:
    """A worker's connection to a broker. Threads may share it."""

    def __init__(self, target: str, *, key: str | None = None, timeout_seconds: float = CALL_SECONDS) -> None:
        """Opens nothing yet. `key` is the one that a broker gives to the workers it spawns."""
        metadata = () if key is None else ((WORKER_KEY, key),)
        self._wire = Wire(target, identity="worker", metadata=metadata, patience_seconds=0.0)
        self._timeout_seconds = timeout_seconds

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls under way raise UnreachableError."""
        self._wire.close()

    def register(self, identity: str, *, offered: Sequence[OfferedVerifier]) -> WorkerRegistration:
        """Introduces the worker and what it offers. A repeat registers anew.

        Raises:
            UnreachableError: no answer.
            PermissionDeniedError: the key is not (or no longer) the broker's.
            InvalidRequestError: the offer is malformed.
        """
        request = pb.RegisterWorkerRequest(
            identity=identity,
            verifiers=[
                pb.OfferedVerifier(verifier=one.verifier, version=one.version, needs_tokens=one.needs_tokens)
                for one in offered
            ],
        )
        response = self._wire.call(
            self._wire.verification.RegisterWorker, request, timeout_seconds=self._timeout_seconds
        )
        return WorkerRegistration(response.worker, duration_from_proto(response.lease_timeout))

    def acquire(self, worker: str, *, max_groups: int = 1, wait_seconds: float = 0.0) -> Lease | None:
        """Waits for groups to verify; None if none came in time. A lost answer is safe: the lease runs out.

        Raises:
            WorkerNotFoundError: register again.
            UnreachableError: no answer.
        """
        response = self._wire.call(
            self._wire.verification.AcquireLease,
            pb.AcquireLeaseRequest(
                worker=worker, max_groups=max_groups, wait=duration_to_proto(wait_seconds)
            ),
            timeout_seconds=wait_seconds + self._timeout_seconds,
        )
        if not response.lease:
            return None
        return Lease(response.lease, tuple(_leased_group(group) for group in response.groups))

    def renew(self, worker: str, *, lease: str) -> float:
        """Extends a lease; returns the seconds it lives from now.

        Raises:
            LeaseExpiredError: stop working on it.
            WorkerNotFoundError, UnreachableError: as `acquire`.
        """
        response = self._wire.call(
            self._wire.verification.RenewLease,
            pb.RenewLeaseRequest(worker=worker, lease=lease),
            timeout_seconds=self._timeout_seconds,
        )
        return duration_from_proto(response.lease_timeout)

    def report(
        self, worker: str, *, lease: str, reports: Sequence[VerdictReport]
    ) -> tuple[ExchangeError | None, ...]:
        """Reports verdicts; durable when it returns. One answer per report, in order: None, or the refusal.

        AlreadyVerifiedError and StepClosedError among them mean that the verdicts are no longer needed.

        Raises:
            WorkerNotFoundError, UnreachableError: as `acquire`; nothing is known of any report.
        """
        request = pb.ReportVerdictsRequest(
            worker=worker,
            lease=lease,
            reports=[
                pb.VerdictReport(
                    group=report.group,
                    generation=report.generation,
                    verifier=verifier_identity_to_proto(report.verifier),
                    verdicts=[verdict_to_proto(verdict) for verdict in report.verdicts],
                    details=report.details,
                )
                for report in reports
            ],
        )
        response = self._wire.call(
            self._wire.verification.ReportVerdicts, request, timeout_seconds=self._timeout_seconds
        )
        if len(response.results) != len(reports):
            raise InternalError(
                f"The broker answered {len(response.results)} results to {len(reports)} reports."
            )
        return tuple(
            from_status(result.error) if result.HasField("error") and result.error.code else None
            for result in response.results
        )


def _leased_group(leased: pb.LeasedGroup) -> LeasedGroup:
    rollouts: tuple[Rollout, ...] = ()
    problem: ExchangeError | None = None
    try:
        group = rollout_pb2.Group(
            name=leased.group, envelope=leased.envelope, parts=leased.parts, part_kinds=leased.part_kinds
        )
        rollouts = decode_group(group).rollouts
    except ExchangeError as error:
        problem = error
    return LeasedGroup(
        name=leased.group,
        generation=leased.generation,
        verifier=leased.verifier,
        config_json=leased.config_json or "{}",
        item_timeout_seconds=duration_from_proto(leased.item_timeout),
        prompt=prompt_entry_from_proto(leased.prompt),
        rollout_count=len(leased.envelope.rollouts),
        rollouts=rollouts,
        problem=problem,
    )
