"""The decisions a pool's log holds, and the commands that ask for them.

A record says what was decided, so that a fold never decides again. One command makes at most one record.
Times are integer microseconds since the epoch; indices count from 0, steps and sessions from 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from hacrl_exchange.types import (
    ModelSpec,
    PoolSpec,
    RosterEntry,
    RosterState,
    StepOutcome,
    UnscoredKind,
    Verdict,
    VerifierIdentity,
)

# --- records ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolCreated:
    """The first record of a pool's stream."""

    pool: str
    spec: PoolSpec
    prompt_count: int


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A session began; it supersedes older sessions of the agent and makes the member ACTIVE."""

    agent: str
    principal: str
    session: int
    instance: str
    model: ModelSpec


@dataclass(frozen=True, slots=True)
class MemberReturned:
    """An AWAY member called again and is ACTIVE."""

    agent: str


@dataclass(frozen=True, slots=True)
class MemberLeft:
    """A member left by its own word; its open slots are forfeited."""

    agent: str


@dataclass(frozen=True, slots=True)
class StepOpened:
    """A step began: its prompts in manifest order, its roster in roster order (agent ids, sorted)."""

    step: int
    epoch: int
    prompt_ids: tuple[str, ...]
    roster: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupAccepted:
    """A group is in its slot. `envelope` is the exchange.v1 Envelope as received; parts are its bodies."""

    step: int
    prompt_index: int
    roster_index: int
    session: int
    digest: bytes
    rollout_count: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class PublishingEnded:
    """Members of a step are judged: one state per roster entry. LATE members are AWAY from now on."""

    step: int
    roster_states: tuple[RosterState, ...]


@dataclass(frozen=True, slots=True)
class VerdictsRecorded:
    """A worker's verdicts for a group are final. `details` is for operators: one per rollout, or empty."""

    step: int
    prompt_index: int
    roster_index: int
    generation: int
    verifier: VerifierIdentity | None
    worker: str
    verdicts: tuple[Verdict, ...]
    details: tuple[str, ...]
    success_count: int
    scored_count: int


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """A group of a manifest, with the generation of the verdicts it pins."""

    prompt_index: int
    roster_index: int
    digest: bytes
    generation: int


@dataclass(frozen=True, slots=True)
class ExpiredGroup:
    """A group that had no outcome at closing: every rollout gets this one (TIMEOUT or UNSUPPORTED)."""

    prompt_index: int
    roster_index: int
    kind: UnscoredKind


@dataclass(frozen=True, slots=True)
class StepClosed:
    """A step is its manifest from now on. Entries are ordered by prompt index, then roster index."""

    step: int
    outcome: StepOutcome
    quorum_met: bool
    roster: tuple[RosterEntry, ...]
    entries: tuple[ManifestEntry, ...]
    expired: tuple[ExpiredGroup, ...]


@dataclass(frozen=True, slots=True)
class StepAcked:
    """An agent is done with every step up to this one."""

    agent: str
    step: int


@dataclass(frozen=True, slots=True)
class StepsRetired:
    """Bodies of all steps up to this one may be deleted."""

    through_step: int


RecordBody: TypeAlias = (
    PoolCreated
    | MemberJoined
    | MemberReturned
    | MemberLeft
    | StepOpened
    | GroupAccepted
    | PublishingEnded
    | VerdictsRecorded
    | StepClosed
    | StepAcked
    | StepsRetired
)


@dataclass(frozen=True, slots=True)
class Record:
    """A decision and when it was taken: microseconds since the epoch, never before the record before it."""

    time_us: int
    body: RecordBody


# --- commands --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CreatePool:
    """Makes the pool. Only on an empty state."""

    pool: str
    spec: PoolSpec
    prompt_count: int


@dataclass(frozen=True, slots=True)
class Join:
    """Starts a session, or finds the one of this instance again."""

    agent: str
    principal: str
    instance: str
    model: ModelSpec


@dataclass(frozen=True, slots=True)
class Touch:
    """Any call of a session: checks it, and brings an AWAY member back."""

    agent: str
    session: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Ends a session by the agent's own word."""

    agent: str
    session: int


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """What the log's index knows of a slot of a step that is no longer open."""

    digest: bytes
    session: int
    rollout_count: int


@dataclass(frozen=True, slots=True)
class PublishGroup:
    """Puts a group into its slot. `stored`: the lookup for a step that is not open (None: empty slot)."""

    agent: str
    session: int
    step: int
    prompt_id: str
    digest: bytes
    rollout_count: int
    envelope: bytes
    stored: StoredGroup | None = None


@dataclass(frozen=True, slots=True)
class RecordVerdicts:
    """Makes a worker's verdicts final. `principal` owns the worker."""

    step: int
    prompt_index: int
    roster_index: int
    generation: int
    verifier: VerifierIdentity | None
    worker: str
    verdicts: tuple[Verdict, ...]
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenStep:
    """Opens the next step with these prompts; due() says when, the schedule says which."""

    step: int
    epoch: int
    prompt_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndPublishing:
    """Ends publishing of a step: everybody is done, or the publish deadline passed."""

    step: int


@dataclass(frozen=True, slots=True)
class CloseStep:
    """Closes a step: everything is judged, or the verify deadline passed. `verifier_alive`: some live
    worker offers the pool's verifier (decides TIMEOUT or UNSUPPORTED for what is left)."""

    step: int
    verifier_alive: bool


@dataclass(frozen=True, slots=True)
class Ack:
    """Acknowledges steps, cumulatively."""

    agent: str
    session: int
    step: int


@dataclass(frozen=True, slots=True)
class RetireSteps:
    """Lets go of the bodies of old steps."""

    through_step: int


Command: TypeAlias = (
    CreatePool
    | Join
    | Touch
    | Leave
    | PublishGroup
    | RecordVerdicts
    | OpenStep
    | EndPublishing
    | CloseStep
    | Ack
    | RetireSteps
)


# --- index keys ------------------------------------------------------------------------------------


def group_key(step: int, prompt_index: int, roster_index: int) -> str:
    """Index key of a GroupAccepted; keys of a step sort in manifest order."""
    return f"g/{step:010d}/{prompt_index:05d}/{roster_index:05d}"


def verdict_key(step: int, prompt_index: int, roster_index: int, *, generation: int) -> str:
    """Index key of a VerdictsRecorded."""
    return f"v/{step:010d}/{prompt_index:05d}/{roster_index:05d}/{generation:05d}"


def record_key(body: RecordBody) -> str:
    """The key the log finds a record by; empty for records nobody looks up."""
    match body:
        case GroupAccepted():
            return group_key(body.step, body.prompt_index, body.roster_index)
        case VerdictsRecorded():
            return verdict_key(body.step, body.prompt_index, body.roster_index, generation=body.generation)
        case StepOpened():
            return f"o/{body.step:010d}"
        case StepClosed():
            return f"c/{body.step:010d}"
        case _:
            return ""
