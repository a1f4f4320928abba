"""Records and snapshots keep every field on their way through bytes."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hacrl_exchange._pb import records_pb2
from hacrl_exchange.broker.core import records
from hacrl_exchange.broker.core.records import Record, RecordBody
from hacrl_exchange.broker.core.state import GroupState, Member, OpenStep, PoolState
from hacrl_exchange.broker.record_codec import (
    decode_record,
    encode_record,
    snapshot_from_bytes,
    snapshot_to_bytes,
)
from hacrl_exchange.errors import CorruptLogError
from hacrl_exchange.types import (
    Lockstep,
    MemberState,
    ModelSpec,
    PoolSpec,
    RevealRule,
    RosterEntry,
    RosterState,
    Scored,
    StepCounts,
    StepOutcome,
    Unscored,
    UnscoredKind,
    VerdictReason,
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

POSITIVE = st.integers(1, 2**31 - 1)
COUNT = st.integers(0, 2**31 - 1)
LONG = st.integers(0, 2**63 - 1)
NAME = st.from_regex(r"[a-z0-9-]{1,12}", fullmatch=True)
TEXT = st.text(max_size=12)
DIGEST = st.binary(min_size=32, max_size=32)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SECONDS = st.integers(1, 10**7).map(lambda ms: ms / 1000)
SHORT = 4


def rows(element: st.SearchStrategy[typing.Any]) -> st.SearchStrategy[tuple[typing.Any, ...]]:
    return st.lists(element, max_size=SHORT).map(tuple)


MODEL = st.builds(ModelSpec, TEXT, TEXT, LONG, TEXT)
COUNTS = st.builds(StepCounts, POSITIVE, COUNT, COUNT, COUNT)
SPEC = st.builds(
    PoolSpec,
    prompt_set=NAME,
    group_size=POSITIVE,
    plan=st.builds(
        VerificationPlan,
        verifiers=st.tuples(st.builds(VerifierUse, NAME, st.just('{"a": 1}'))),
        success_threshold=FINITE,
        item_timeout_seconds=SECONDS,
        max_attempts=POSITIVE,
        max_unscored_share=st.floats(0, 1),
    ),
    lockstep=st.builds(Lockstep, POSITIVE, POSITIVE, SECONDS, SECONDS, POSITIVE, LONG),
    seed=LONG,
    max_tokens=COUNT,
    reveal=st.sampled_from(RevealRule),
    retained_steps=COUNT,
    capability_window=POSITIVE,
)
VERDICT = st.one_of(
    st.builds(Scored, FINITE, st.dictionaries(TEXT, FINITE, max_size=SHORT)),
    st.builds(Unscored, st.sampled_from(UnscoredKind), st.sampled_from(VerdictReason)),
)
IDENTITY = st.builds(VerifierIdentity, NAME, TEXT, DIGEST)

BODIES: dict[type, st.SearchStrategy[typing.Any]] = {
    records.PoolCreated: st.builds(records.PoolCreated, NAME, SPEC, COUNT),
    records.MemberJoined: st.builds(records.MemberJoined, NAME, NAME, POSITIVE, TEXT, MODEL),
    records.MemberReturned: st.builds(records.MemberReturned, NAME),
    records.MemberLeft: st.builds(records.MemberLeft, NAME),
    records.StepOpened: st.builds(records.StepOpened, POSITIVE, LONG, rows(TEXT), rows(NAME)),
    records.GroupAccepted: st.builds(
        records.GroupAccepted, POSITIVE, COUNT, COUNT, POSITIVE, DIGEST, COUNT, st.binary(max_size=99)
    ),
    records.PublishingEnded: st.builds(records.PublishingEnded, POSITIVE, rows(st.sampled_from(RosterState))),
    records.VerdictsRecorded: st.builds(
        records.VerdictsRecorded,
        POSITIVE,
        COUNT,
        COUNT,
        POSITIVE,
        st.none() | IDENTITY,
        TEXT,
        rows(VERDICT),
        rows(TEXT),
        COUNT,
        COUNT,
    ),
    records.StepClosed: st.builds(
        records.StepClosed,
        POSITIVE,
        st.sampled_from(StepOutcome),
        st.booleans(),
        rows(st.builds(RosterEntry, NAME, NAME, st.sampled_from(RosterState), rows(COUNTS), st.booleans())),
        rows(st.builds(records.ManifestEntry, COUNT, COUNT, DIGEST, COUNT)),
        rows(
            st.builds(
                records.ExpiredGroup,
                COUNT,
                COUNT,
                st.sampled_from([UnscoredKind.TIMEOUT, UnscoredKind.UNSUPPORTED]),
            )
        ),
    ),
    records.StepAcked: st.builds(records.StepAcked, NAME, POSITIVE),
    records.StepsRetired: st.builds(records.StepsRetired, POSITIVE),
}
KINDS = typing.get_args(RecordBody)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_record_comes_back_as_it_went(kind: type, data: st.DataObject) -> None:
    record = Record(data.draw(LONG), data.draw(BODIES[kind]))
    assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_record_has_its_own_field(kind: type) -> None:
    fields = records_pb2.Record.DESCRIPTOR.oneofs_by_name["body"].fields
    assert kind.__name__ in {field.message_type.name for field in fields if field.message_type}


@given(st.dictionaries(TEXT, FINITE, min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_the_order_in_which_components_came_does_not_show(
    components: dict[str, float], draw: typing.Any
) -> None:
    shuffled = list(components.items())
    draw.shuffle(shuffled)

    def encoded(given_components: dict[str, float]) -> bytes:
        verdicts = (Scored(1.0, given_components),)
        return encode_record(Record(1, records.VerdictsRecorded(1, 0, 0, 1, None, "", verdicts, (), 1, 1)))

    assert encoded(components) == encoded(dict(shuffled))


MEMBER = st.builds(
    Member,
    agent=NAME,
    principal=NAME,
    session=POSITIVE,
    instance=TEXT,
    model=MODEL,
    state=st.sampled_from(MemberState),
    acked_step=LONG,
    counts=rows(COUNTS),
)
GROUP = st.builds(GroupState, POSITIVE, DIGEST, COUNT, COUNT, COUNT, COUNT)


@st.composite
def open_steps(draw: Callable[[st.SearchStrategy[typing.Any]], typing.Any]) -> OpenStep:
    roster = tuple(sorted(draw(st.sets(NAME, min_size=1, max_size=3))))
    prompts = tuple(draw(st.lists(TEXT, min_size=1, max_size=3, unique=True)))
    slots = st.tuples(st.integers(0, len(prompts) - 1), st.integers(0, len(roster) - 1))
    return OpenStep(
        step=draw(POSITIVE),
        epoch=draw(LONG),
        prompt_ids=prompts,
        roster=roster,
        open_time_us=draw(LONG),
        publishing_end_time_us=draw(LONG),
        roster_states=tuple(draw(st.none() | st.sampled_from(RosterState)) for _ in roster),
        groups=draw(st.dictionaries(slots, GROUP, max_size=6)),
    )


STATE = st.builds(
    PoolState,
    pool=NAME,
    spec=SPEC,
    prompt_count=COUNT,
    create_time_us=LONG,
    last_time_us=LONG,
    members=st.lists(MEMBER, max_size=3).map(lambda members: {one.agent: one for one in members}),
    open_steps=st.lists(open_steps(), max_size=2).map(lambda steps: {one.step: one for one in steps}),
    last_step=LONG,
    retired_through=LONG,
    accepted_count=LONG,
    scored_count=LONG,
    unscored_count=LONG,
)


@given(STATE)
def test_a_snapshot_comes_back_as_it_went(state: PoolState) -> None:
    assert snapshot_from_bytes(snapshot_to_bytes(state)) == state


@given(STATE)
def test_equal_states_have_equal_snapshots_whatever_order_they_grew_in(state: PoolState) -> None:
    before = snapshot_to_bytes(state)
    state.members = dict(reversed(state.members.items()))
    state.open_steps = dict(reversed(state.open_steps.items()))
    for step in state.open_steps.values():
        step.groups = dict(reversed(step.groups.items()))
    assert snapshot_to_bytes(state) == before


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"\xff\xff", "it is no Record"),
        (b"", "its kind is unset, or newer than this version"),
        (
            records_pb2.Record(prompt_set_created=records_pb2.PromptSetCreated()).SerializeToString(),
            "its kind is prompt_set_created",
        ),
        (
            records_pb2.Record(step_closed=records_pb2.StepClosed(step=1)).SerializeToString(),
            "its StepOutcome is 0",
        ),
        (
            b"B\x03\x12\x01\x4d",
            "its RosterState is 77",
        ),
    ],
)
def test_what_cannot_be_read_is_a_corrupt_log_and_never_a_guess(payload: bytes, why: str) -> None:
    with pytest.raises(CorruptLogError) as caught:
        decode_record(payload)
    assert caught.value.metadata == {"why": why}
