"""Every way the exchange says no: one class per reason.

An error has a stable `reason`, a canonical gRPC status code by name, metadata (every variable part of the
message) and a message that is a sentence: what happened, what to do. status.py turns errors into
google.rpc.Status and back; nothing here imports grpc. Clients branch on the class or the reason, never on
the text.
"""

from __future__ import annotations

from typing import ClassVar

DOMAIN = "hacrl.exchange"


class ExchangeError(Exception):
    """Base of all errors of the exchange. Never raised itself; catch it to catch them all."""

    code: ClassVar[str] = "UNKNOWN"
    reason: ClassVar[str] = ""

    def __init__(self, message: str, *, retry_seconds: float | None = None, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.retry_seconds = retry_seconds
        self.metadata: dict[str, str] = {key: str(value) for key, value in metadata.items()}

    def __str__(self) -> str:
        return self.message


# requests and resources


class InvalidRequestError(ExchangeError):
    """A field is missing or malformed. Mend the request; a retry gets the same answer."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"


class PermissionDeniedError(ExchangeError):
    """The caller may not do this with the key it uses."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class PoolNotFoundError(ExchangeError):
    """No such pool. `hacrl pool list` names those that exist."""

    code = "NOT_FOUND"
    reason = "POOL_NOT_FOUND"


class PoolExistsError(ExchangeError):
    """A pool of that name exists with another spec. Pools are immutable: choose another name."""

    code = "ALREADY_EXISTS"
    reason = "POOL_EXISTS"


class InvalidPoolError(ExchangeError):
    """The pool's spec contradicts itself or a limit."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_POOL"


class PoolEndedError(ExchangeError):
    """The pool reached its last step: no further step will open."""

    code = "OUT_OF_RANGE"
    reason = "POOL_ENDED"


class PromptSetNotFoundError(ExchangeError):
    """No such prompt set. `hacrl prompts add` stores one."""

    code = "NOT_FOUND"
    reason = "PROMPT_SET_NOT_FOUND"


class PromptSetExistsError(ExchangeError):
    """A prompt set of that name exists with other content. Sets are immutable: choose another name."""

    code = "ALREADY_EXISTS"
    reason = "PROMPT_SET_EXISTS"


class InvalidPromptSetError(ExchangeError):
    """A prompt of the set is malformed, repeated or too large, or some did not come. Nothing was stored."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_PROMPT_SET"


# members and sessions


class AgentTakenError(ExchangeError):
    """Another principal owns the agent's name in this pool. Choose another name."""

    code = "PERMISSION_DENIED"
    reason = "AGENT_TAKEN"


class NotJoinedError(ExchangeError):
    """The agent has no session in this pool. Join first."""

    code = "FAILED_PRECONDITION"
    reason = "NOT_JOINED"


class PoolFullError(ExchangeError):
    """The pool has as many members as it may ever have. Join as one of them, or make another pool."""

    code = "FAILED_PRECONDITION"
    reason = "POOL_FULL"


class SessionSupersededError(ExchangeError):
    """A newer process of the same agent joined. This one must stop."""

    code = "FAILED_PRECONDITION"
    reason = "SESSION_SUPERSEDED"


# steps


class StepNotFoundError(ExchangeError):
    """The step has not been opened."""

    code = "NOT_FOUND"
    reason = "STEP_NOT_FOUND"


class StepRetiredError(ExchangeError):
    """The step's bodies were deleted by the pool's retention."""

    code = "NOT_FOUND"
    reason = "STEP_RETIRED"


class StepClosedError(ExchangeError):
    """Publishing for the step has ended. Go on with the next step."""

    code = "FAILED_PRECONDITION"
    reason = "STEP_CLOSED"


class NotOnRosterError(ExchangeError):
    """The agent joined after the step opened. It takes part from the next step."""

    code = "FAILED_PRECONDITION"
    reason = "NOT_ON_ROSTER"


# one group


class UnknownPromptError(ExchangeError):
    """The prompt does not belong to the step."""

    code = "NOT_FOUND"
    reason = "UNKNOWN_PROMPT"


class ForeignSlotError(ExchangeError):
    """A group's name names another agent or pool than the caller's."""

    code = "PERMISSION_DENIED"
    reason = "FOREIGN_SLOT"


class SlotTakenError(ExchangeError):
    """The slot already holds another group. Fetch the stored one and go on with it."""

    code = "ALREADY_EXISTS"
    reason = "SLOT_TAKEN"


class WrongGroupSizeError(ExchangeError):
    """The group does not hold the pool's number of rollouts."""

    code = "INVALID_ARGUMENT"
    reason = "WRONG_GROUP_SIZE"


class InvalidEnvelopeError(ExchangeError):
    """The envelope lacks a field or states an impossible value."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_ENVELOPE"


class UnsupportedEncodingError(ExchangeError):
    """A part's kind, compression or element type is not one this server reads."""

    code = "UNIMPLEMENTED"
    reason = "UNSUPPORTED_ENCODING"


class PartTooLargeError(ExchangeError):
    """A part, stored or decoded, is larger than the server allows."""

    code = "INVALID_ARGUMENT"
    reason = "PART_TOO_LARGE"


class DigestMismatchError(ExchangeError):
    """A part's bytes do not have the sha256 that the envelope states."""

    code = "INVALID_ARGUMENT"
    reason = "DIGEST_MISMATCH"


class SizeMismatchError(ExchangeError):
    """A part's stored or decoded size is not what the envelope states."""

    code = "INVALID_ARGUMENT"
    reason = "SIZE_MISMATCH"


class PartUndecodableError(ExchangeError):
    """A part does not decompress, parse or hold valid UTF-8."""

    code = "INVALID_ARGUMENT"
    reason = "PART_UNDECODABLE"


class CountMismatchError(ExchangeError):
    """A count in the envelope contradicts the body."""

    code = "INVALID_ARGUMENT"
    reason = "COUNT_MISMATCH"


class SumMismatchError(ExchangeError):
    """A rollout's log-probs do not add up to the envelope's sum."""

    code = "INVALID_ARGUMENT"
    reason = "SUM_MISMATCH"


class InvalidLogprobError(ExchangeError):
    """A log-prob is NaN, infinite or positive."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_LOGPROB"


class TooManyTokensError(ExchangeError):
    """A response is longer than the pool or the server allows."""

    code = "INVALID_ARGUMENT"
    reason = "TOO_MANY_TOKENS"


# workers


class WorkerNotFoundError(ExchangeError):
    """The broker does not know the worker (it restarted, or heard nothing for long). Register again."""

    code = "NOT_FOUND"
    reason = "WORKER_NOT_FOUND"


class LeaseExpiredError(ExchangeError):
    """The lease ran out and its groups went elsewhere. Stop working on it."""

    code = "FAILED_PRECONDITION"
    reason = "LEASE_EXPIRED"


class GroupNotFoundError(ExchangeError):
    """No such group."""

    code = "NOT_FOUND"
    reason = "GROUP_NOT_FOUND"


class AlreadyVerifiedError(ExchangeError):
    """The group already has final verdicts in this generation. Drop the report."""

    code = "ALREADY_EXISTS"
    reason = "ALREADY_VERIFIED"


class InvalidVerdictError(ExchangeError):
    """A report is malformed: a score that is not finite, or not one verdict per rollout."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_VERDICT"


# the broker and the way to it


class BrokerStoppingError(ExchangeError):
    """The broker is shutting down. Retry; it may be back soon."""

    code = "UNAVAILABLE"
    reason = "BROKER_STOPPING"


class LogFailedError(ExchangeError):
    """The broker could not write its log: nothing was accepted. Retry; the operator must check the disk."""

    code = "UNAVAILABLE"
    reason = "LOG_FAILED"


class OverloadedError(ExchangeError):
    """Too much is under way. Retry after the delay given."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"


class InternalError(ExchangeError):
    """The broker has a bug. Its log holds the traceback."""

    code = "INTERNAL"
    reason = "INTERNAL"


class UnreachableError(ExchangeError):
    """No answer from the broker within the deadline. Raised by the client."""

    code = "UNAVAILABLE"
    reason = "UNREACHABLE"


class DatabaseTooNewError(ExchangeError):
    """The data folder was written by a newer version. Upgrade, or use another folder."""

    code = "FAILED_PRECONDITION"
    reason = "DATABASE_TOO_NEW"


class DatabaseInUseError(ExchangeError):
    """Another broker has the data folder open."""

    code = "FAILED_PRECONDITION"
    reason = "DATABASE_IN_USE"


class CorruptLogError(ExchangeError):
    """A record or body on disk does not match its digest or order."""

    code = "DATA_LOSS"
    reason = "CORRUPT_LOG"


def all_errors() -> tuple[type[ExchangeError], ...]:
    """Every error class, in order of definition: for docs, tests and decoding."""
    return tuple(ExchangeError.__subclasses__())
