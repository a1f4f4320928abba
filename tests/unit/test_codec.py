"""Rules of the codec: what goes in comes out, and nothing hostile gets further than its error."""

from __future__ import annotations

import hashlib
import math
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from hacrl_exchange import codec
from hacrl_exchange._pb import exchange_service_pb2, pool_pb2, verdict_pb2
from hacrl_exchange._pb import rollout_pb2 as pb
from hacrl_exchange.errors import (
    CountMismatchError,
    DigestMismatchError,
    ExchangeError,
    InvalidEnvelopeError,
    InvalidLogprobError,
    InvalidPoolError,
    InvalidRequestError,
    PartTooLargeError,
    PartUndecodableError,
    SizeMismatchError,
    SumMismatchError,
    UnsupportedEncodingError,
)
from hacrl_exchange.types import (
    FinishReason,
    Group,
    Lockstep,
    LogprobOrigin,
    Message,
    ModelSpec,
    PolicyVersion,
    PoolSpec,
    Prompt,
    PromptEntry,
    Receipt,
    RevealRule,
    Rollout,
    RosterEntry,
    RosterState,
    SamplingParameters,
    Scored,
    Slot,
    StepCounts,
    StepState,
    Unscored,
    UnscoredKind,
    Verdict,
    VerdictReason,
    VerificationPlan,
    VerifierIdentity,
    VerifierUse,
)

NAME = "pools/math/steps/3/prompts/p-1/agents/lab-a"
BOMB = 1 << 26


def make_rollout(text: str = "four", count: int = 3, **changes: object) -> Rollout:
    fields: dict[str, object] = {
        "text": text,
        "token_count": count,
        "logprob_sum": math.nan,
        "token_ids": list(range(count)),
        "logprobs": [-0.25 * (i + 1) for i in range(count)],
    }
    return Rollout(**{**fields, **changes})  # type: ignore[arg-type]  # a test's shorthand


def make_group(*rollouts: Rollout) -> Group:
    return Group(
        prompt_id="p-1",
        rollouts=rollouts or (make_rollout("four"), make_rollout("", 1)),
        tokenizer_fingerprint="ab" * 32,
        policy_start=PolicyVersion(2, 5),
        policy_end=PolicyVersion(2, 6),
        sampling=SamplingParameters(0.7, 0.9, 64),
        logprob_origin=LogprobOrigin.SAMPLER,
    )


def make_part(data: bytes = b"four " * 100) -> tuple[pb.PartInfo, bytes]:
    return codec.encode_part(pb.PART_KIND_TEXT, data)


def describe(stored: bytes, decoded_size: int, *, compression: int = pb.COMPRESSION_ZSTD) -> pb.PartInfo:
    """A description that is right about everything but, perhaps, what is in the frame."""
    return pb.PartInfo(
        kind=pb.PART_KIND_TEXT,
        compression=pb.Compression.ValueType(compression),
        stored_size=len(stored),
        decoded_size=decoded_size,
        sha256=hashlib.sha256(stored).digest(),
    )


# --- groups ----------------------------------------------------------------------------------------


def test_a_group_comes_back_as_it_went() -> None:
    metadata = {"turns": [1, 2], "note": "ü"}
    group = make_group(
        make_rollout("vier ü \N{PILE OF POO}", finish_reason=FinishReason.LENGTH, metadata=metadata),
        make_rollout("", 1, terminal_only=True),
    )

    message = codec.encode_group(group, name=NAME)
    decoded = codec.decode_group(pb.Group.FromString(message.SerializeToString()))

    assert [info.kind for info in message.envelope.parts] == [1, 2, 3, 4]
    for before, after in zip(group.rollouts, decoded.rollouts, strict=True):
        assert before.logprobs is not None
        assert after.logprobs is not None
        assert after.token_ids is not None
        assert (after.text, after.token_count, after.finish_reason, after.terminal_only, after.metadata) == (
            before.text,
            before.token_count,
            before.finish_reason,
            before.terminal_only,
            before.metadata,
        )
        assert list(after.token_ids) == before.token_ids
        assert list(after.logprobs) == before.logprobs  # quarters are exact in f16
        assert after.logprob_sum == sum(before.logprobs)
    assert decoded == Group(
        prompt_id="p-1",
        rollouts=decoded.rollouts,
        tokenizer_fingerprint=group.tokenizer_fingerprint,
        policy_start=group.policy_start,
        policy_end=group.policy_end,
        sampling=group.sampling,
        logprob_origin=group.logprob_origin,
    )


def test_arrays_and_lists_encode_alike() -> None:
    arrays = make_rollout(
        token_ids=np.arange(3, dtype=np.int32), logprobs=np.array([-0.25, -0.5, -0.75], dtype=np.float32)
    )

    assert codec.encode_group(make_group(arrays), name=NAME) == codec.encode_group(
        make_group(make_rollout()), name=NAME
    )


def test_a_group_may_be_text_and_sums_alone() -> None:
    rollout = make_rollout(token_ids=None, logprobs=None, logprob_sum=-1.5)

    message = codec.encode_group(make_group(rollout), name=NAME)
    (decoded,) = codec.decode_group(message).rollouts

    assert [info.kind for info in message.envelope.parts] == [pb.PART_KIND_TEXT]
    assert decoded == Rollout(text="four", token_count=3, logprob_sum=-1.5)


def test_only_the_parts_that_were_asked_for_are_decoded() -> None:
    message = codec.encode_group(make_group(), name=NAME)
    message.part_kinds.append(pb.PART_KIND_TOKENS)
    tokens = message.parts[1]
    del message.parts[:]
    message.parts.append(tokens)

    first = codec.decode_group(message).rollouts[0]

    assert first.token_ids is not None
    assert list(first.token_ids) == [0, 1, 2]
    assert first.logprobs is None
    assert first.text == ""


def test_a_delivery_without_parts_has_the_envelope_alone() -> None:
    message = codec.encode_group(make_group(), name=NAME)
    del message.parts[:]

    assert [rollout.token_count for rollout in codec.decode_group(message).rollouts] == [3, 1]


def test_delivered_numbers_are_read_only_views_without_a_copy() -> None:
    first, second = codec.decode_group(codec.encode_group(make_group(), name=NAME)).rollouts

    assert isinstance(first.token_ids, np.ndarray)
    assert isinstance(second.token_ids, np.ndarray)
    assert first.token_ids.base is second.token_ids.base
    assert not first.token_ids.flags.writeable


def test_the_sum_is_of_the_values_as_given_not_as_rounded() -> None:
    logprobs = [-0.1, -0.2, -0.3]

    message = codec.encode_group(make_group(make_rollout(logprobs=logprobs)), name=NAME)

    assert message.envelope.rollouts[0].logprob_sum == pytest.approx(sum(logprobs), abs=1e-15)


@given(
    values=st.lists(st.floats(min_value=-65504, max_value=0, allow_subnormal=True), min_size=1, max_size=40),
    dtype=st.sampled_from(["f16", "f32"]),
)
def test_the_tolerance_holds_for_what_the_encoder_makes(
    values: list[float], dtype: codec.LogprobDtype
) -> None:
    rollout = make_rollout(count=len(values), logprobs=values)

    message = codec.encode_group(make_group(rollout), name=NAME, logprob_dtype=dtype)
    logprobs = codec.decode_group(message).rollouts[0].logprobs

    assert logprobs is not None
    decoded_sum = float(np.sum(np.asarray(logprobs, dtype=np.float64)))
    stated = message.envelope.rollouts[0].logprob_sum
    element_type = message.envelope.parts[2].element_type
    tolerance = codec.logprob_sum_tolerance(abs(stated), len(values), element_type=element_type)
    assert abs(decoded_sum - stated) <= tolerance


def test_the_tolerance_is_narrow_enough_to_notice_a_missing_token() -> None:
    assert codec.logprob_sum_tolerance(1000.0, 1000, element_type=pb.ELEMENT_TYPE_F16) < 0.5
    assert codec.logprob_sum_tolerance(1000.0, 1000, element_type=pb.ELEMENT_TYPE_F32) < 1e-4


def test_there_is_no_tolerance_for_an_unknown_element_type() -> None:
    with pytest.raises(UnsupportedEncodingError):
        codec.logprob_sum_tolerance(1.0, 1, element_type=99)


@pytest.mark.parametrize(
    ("rollouts", "error"),
    [
        ((make_rollout(logprobs=[-1.0, math.nan, -1.0]),), InvalidLogprobError),
        ((make_rollout(logprobs=[-1.0, -math.inf, -1.0]),), InvalidLogprobError),
        ((make_rollout(logprobs=[-1.0, 1e-9, -1.0]),), InvalidLogprobError),
        ((make_rollout(logprobs=[-1.0, -65520.0, -1.0]),), InvalidLogprobError),
        ((make_rollout(logprobs=["a", "b", "c"]),), InvalidLogprobError),
        ((make_rollout(logprobs=[-1.0, -1.0]),), CountMismatchError),
        ((make_rollout(token_ids=[1, 2, 3, 4]),), CountMismatchError),
        ((make_rollout(token_ids=[[1], [2], [3]]),), CountMismatchError),
        ((make_rollout(token_ids=[1, 2, -1]),), PartUndecodableError),
        ((make_rollout(token_ids=[1, 2, 2**32]),), PartUndecodableError),
        ((make_rollout(token_ids=[1.0, 2.0, 3.0]),), PartUndecodableError),
        ((make_rollout(token_ids=[1, 2, 2**70]),), PartUndecodableError),
        ((make_rollout("\ud800"),), PartUndecodableError),
        ((make_rollout(metadata={"f": object()}),), PartUndecodableError),
        ((make_rollout(logprob_sum=-9.0),), SumMismatchError),
        ((make_rollout(), make_rollout(token_ids=None)), InvalidEnvelopeError),
        ((make_rollout(), make_rollout(logprobs=None)), InvalidEnvelopeError),
        ((make_rollout(), make_rollout(count=0)), InvalidEnvelopeError),
        ((Rollout(text="", token_count=2**31, logprob_sum=-1.0),), InvalidEnvelopeError),
    ],
)
def test_a_malformed_group_is_refused_before_it_travels(
    rollouts: tuple[Rollout, ...], error: type[ExchangeError]
) -> None:
    with pytest.raises(error):
        codec.encode_group(make_group(*rollouts), name=NAME)


def test_a_group_without_rollouts_is_refused() -> None:
    group = make_group()

    with pytest.raises(
        InvalidEnvelopeError, match=r"^The group holds no rollouts; publish the pool's group size\.$"
    ):
        codec.encode_group(Group("p-1", (), "ab" * 32, group.policy_start, group.policy_end), name=NAME)


def test_a_logprob_that_f16_cannot_hold_fits_f32() -> None:
    group = make_group(make_rollout(logprobs=[-1.0, -1e6, -1.0]))

    with pytest.raises(
        InvalidLogprobError, match=r"^A log-prob of rollout 0 is -1e\+06, which f16 cannot hold; "
    ):
        codec.encode_group(group, name=NAME)
    assert (
        codec.encode_group(group, name=NAME, logprob_dtype="f32").envelope.rollouts[0].logprob_sum == -1000002
    )


@pytest.mark.parametrize("tamper", ["texts", "tokens", "kind", "element_type", "finish", "metadata"])
def test_a_body_that_contradicts_its_envelope_is_refused(tamper: str) -> None:
    message = codec.encode_group(make_group(make_rollout(metadata={})), name=NAME)
    if tamper == "texts":
        replace(message, 0, pb.TextBody(rollouts=[pb.RolloutText()] * 2).SerializeToString())
    elif tamper == "tokens":
        replace(message, 1, b"\0" * 16)
    elif tamper == "kind":
        message.part_kinds.extend([1, 1, 2, 3])  # type: ignore[list-item]  # raw numbers
    elif tamper == "element_type":
        message.envelope.parts[1].element_type = pb.ELEMENT_TYPE_F16
    elif tamper == "finish":
        message.envelope.rollouts[0].finish_reason = pb.FinishReason.ValueType(7)
    else:
        replace(message, 3, b"\x80")

    with pytest.raises(
        (CountMismatchError, UnsupportedEncodingError, DigestMismatchError, SizeMismatchError)
    ):
        codec.decode_group(message)


@pytest.mark.parametrize("data", [b"\x0a\x05\x0a\x03\xff\xfe\xfd", b"\xff\xff\xff\xff", b"\x0a\x7f"])
def test_a_text_part_of_invalid_utf_8_or_garbage_is_undecodable(data: bytes) -> None:
    message = codec.encode_group(make_group(make_rollout()), name=NAME)
    replace(message, 0, data)

    with pytest.raises(PartUndecodableError, match=r"^The text part is not a TextBody of valid UTF-8\.$"):
        codec.decode_group(message)


@pytest.mark.parametrize("data", [b"\xc1", b"\x92\x80", b"\x91" * 2000, b"", b"\x91\x81\x90\x01"])
def test_a_metadata_part_of_garbage_is_undecodable(data: bytes) -> None:
    message = codec.encode_group(make_group(make_rollout(metadata={"a": 1})), name=NAME)
    replace(message, 3, data)

    with pytest.raises(PartUndecodableError, match=r"^The metadata part is not msgpack\.$"):
        codec.decode_group(message)


@pytest.mark.parametrize(
    ("index", "size", "refusal"),
    [
        (0, 2**24, PartTooLargeError),
        (1, 2**24, CountMismatchError),
        (2, 2**24, CountMismatchError),
        (3, 2**16 + 1, PartTooLargeError),
    ],
)
def test_a_part_beyond_what_its_counts_allow_is_refused_before_it_is_decoded(
    index: int, size: int, refusal: type[Exception]
) -> None:
    message = codec.encode_group(make_group(make_rollout(metadata={})), name=NAME)
    info = message.envelope.parts[index]
    bomb, stored = codec.encode_part(info.kind, bytes(size), element_type=info.element_type)
    info.CopyFrom(bomb)
    message.parts[index] = stored

    with pytest.raises(refusal, match=r"by the envelope's counts it is at most \d+\.$"):
        codec.decode_group(message)


def test_a_text_has_256_bytes_a_token_and_1024_more() -> None:
    counts = [3, 1]
    largest = pb.TextBody(rollouts=[pb.RolloutText(text="x" * (256 * count + 1024)) for count in counts])
    info = pb.PartInfo(kind=pb.PART_KIND_TEXT)
    assert 0 <= codec.max_decoded_size(info, counts) - largest.ByteSize() < 24
    assert codec.max_decoded_size(pb.PartInfo(), counts) == 0


def test_the_size_on_the_wire_is_exact_without_serializing() -> None:
    for size in (1, 50, 5000):
        rollout = make_rollout("x" * size, 3)
        group = codec.encode_group(make_group(*[rollout] * 8), name="pools/p/steps/1/prompts/q/agents/a")
        for part_kinds in ([], [pb.PART_KIND_TEXT, pb.PART_KIND_META]):
            group.ClearField("part_kinds")
            group.part_kinds.extend(part_kinds)
            request = exchange_service_pb2.PublishGroupsRequest(groups=[group, group])
            assert 2 * codec.wire_size(group) == request.ByteSize()


def test_empty_texts_are_counted_before_they_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    from hacrl_exchange.codec import bodies

    data = b"\x0a\x00" * 1000
    monkeypatch.setattr(pb, "TextBody", None)

    with pytest.raises(CountMismatchError, match=r"^The text part holds more than 8 texts for 8 rollouts\.$"):
        bodies.texts_of((pb.PartInfo(), data), 8)


def test_a_part_of_a_newer_kind_is_skipped() -> None:
    message = codec.encode_group(make_group(), name=NAME)
    message.envelope.parts.add(kind=pb.PartKind.ValueType(9), decoded_size=2**40)
    message.parts.append(b"?")

    assert codec.decode_group(message).rollouts


def replace(message: pb.Group, index: int, data: bytes) -> None:
    """Puts an honest description of other data in place of a part."""
    old = message.envelope.parts[index]
    info, stored = codec.encode_part(old.kind, data, element_type=old.element_type)
    old.CopyFrom(info)
    message.parts[index] = stored


# --- digests ---------------------------------------------------------------------------------------


def test_the_digest_is_sha256_over_the_documented_fields() -> None:
    envelope = codec.encode_group(make_group(), name=NAME).envelope
    expected = struct.pack("<I", 3)
    for info in envelope.parts:
        expected += struct.pack("<I", info.kind) + info.sha256
    expected += struct.pack("<I", 2)
    expected += struct.pack("<IdBB", 3, -1.5, 1, 0) + struct.pack("<IdBB", 1, -0.25, 1, 0)

    assert codec.group_digest(envelope) == hashlib.sha256(expected).digest()


def test_the_digest_depends_on_every_field_it_states_and_on_no_claim() -> None:
    envelope = codec.encode_group(make_group(), name=NAME).envelope
    claims, sums, ends, parts = (pb.Envelope.FromString(envelope.SerializeToString()) for _ in range(4))
    claims.policy_end.updates = 99
    sums.rollouts[0].logprob_sum = -1.0
    ends.rollouts[1].terminal_only = True
    parts.parts[2].sha256 = bytes(32)

    assert codec.group_digest(claims) == codec.group_digest(envelope)
    assert len({codec.group_digest(one) for one in (envelope, sums, ends, parts)}) == 4


@pytest.mark.parametrize("tamper", ["sha256", "count"])
def test_an_impossible_envelope_has_no_digest(tamper: str) -> None:
    envelope = codec.encode_group(make_group(), name=NAME).envelope
    if tamper == "sha256":
        envelope.parts[0].sha256 = b"short"
    else:
        envelope.rollouts[0].token_count = -1

    with pytest.raises(InvalidEnvelopeError):
        codec.group_digest(envelope)


# --- parts -----------------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_a_part_comes_back_as_it_went(data: bytes) -> None:
    info, stored = codec.encode_part(pb.PART_KIND_TEXT, data)

    assert codec.decode_part(info, stored) == data
    assert info.stored_size == len(stored) <= len(data)


def test_what_zstd_does_not_shrink_is_stored_as_it_is() -> None:
    assert make_part(b"\x07")[0].compression == pb.COMPRESSION_NONE
    assert make_part(bytes(100))[0].compression == pb.COMPRESSION_ZSTD


def test_wrong_stored_bytes_have_a_wrong_digest() -> None:
    info, stored = make_part()
    flipped = bytes([stored[0] ^ 1]) + stored[1:]

    with pytest.raises(
        DigestMismatchError,
        match=r"^The bytes of the text part do not have the sha256 that its description states\.$",
    ):
        codec.decode_part(info, flipped)


def test_a_stored_size_that_lies_is_refused() -> None:
    info, stored = make_part()

    with pytest.raises(SizeMismatchError):
        codec.decode_part(info, stored + b"x")


def test_a_part_above_the_limit_is_refused_before_it_is_decoded() -> None:
    info, stored = make_part()

    with pytest.raises(
        PartTooLargeError, match=r"^The text part takes 500 bytes decoded; at most 499 are allowed\.$"
    ):
        codec.decode_part(info, stored, max_decoded=499)


@pytest.mark.parametrize("with_size", [True, False])
def test_a_bomb_that_states_a_small_size_gets_no_memory(with_size: bool) -> None:
    """64 MiB of zeros in a few kB, described as 1000 bytes."""
    compressor = zstandard.ZstdCompressor(write_content_size=with_size)
    stored = compressor.compress(bytes(BOMB))
    info = describe(stored, 1000)

    tracemalloc.start()
    with pytest.raises((SizeMismatchError, PartUndecodableError)):
        codec.decode_part(info, stored)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 1 << 20


def test_a_header_that_promises_more_than_is_stated_is_refused() -> None:
    stored = zstandard.ZstdCompressor().compress(bytes(5000))

    with pytest.raises(
        SizeMismatchError, match=r"^The text part decodes to 5000 bytes; its description states 10\.$"
    ):
        codec.decode_part(describe(stored, 10), stored)


def test_a_header_that_promises_more_than_there_is_is_refused() -> None:
    """A single-segment frame whose one-byte content size is raised from 200 to 250."""
    stored = bytearray(zstandard.ZstdCompressor().compress(bytes(200)))
    assert stored[5] == 200
    stored[5] = 250

    with pytest.raises(PartUndecodableError):
        codec.decode_part(describe(bytes(stored), 250), bytes(stored))


def test_a_frame_without_a_size_is_fine_if_the_statement_is_true() -> None:
    stored = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(777))

    assert codec.decode_part(describe(stored, 777), stored) == bytes(777)
    with pytest.raises(SizeMismatchError):
        codec.decode_part(describe(stored, 778), stored)


@pytest.mark.parametrize(
    "mangle",
    [
        lambda frame: frame[:-1],
        lambda frame: frame[:4],
        lambda frame: b"",
        lambda frame: b"not zstd at all",
        lambda frame: frame + frame,
        lambda frame: frame + b"\0",
        lambda frame: struct.pack("<II", 0x184D2A50, 4) + b"skip" + frame,
        lambda frame: struct.pack("<II", 0x184D2A50, 4) + b"skip",
    ],
    ids=["torn", "header", "empty", "garbage", "two frames", "trailing", "skippable first", "skippable"],
)
def test_what_is_not_one_whole_frame_is_undecodable(mangle: object) -> None:
    frame = zstandard.ZstdCompressor().compress(b"four " * 100)
    stored = mangle(frame)  # type: ignore[operator]  # a lambda of the table above

    with pytest.raises((PartUndecodableError, SizeMismatchError)):
        codec.decode_part(describe(stored, 500), stored)


@given(data=st.binary(max_size=200), size=st.integers(min_value=-10, max_value=10_000))
def test_no_bytes_whatsoever_get_past_an_error(data: bytes, size: int) -> None:
    for compression in (pb.COMPRESSION_ZSTD, pb.COMPRESSION_NONE, 77):
        try:
            decoded = codec.decode_part(describe(data, size, compression=compression), data, max_decoded=9000)
        except ExchangeError:
            continue
        assert len(decoded) == size


def test_an_unknown_compression_is_unsupported() -> None:
    with pytest.raises(
        UnsupportedEncodingError,
        match=r"^The text part has compression 9, which is unknown here; use NONE or ZSTD\.$",
    ):
        codec.decode_part(describe(b"x", 1, compression=9), b"x")


# --- names -----------------------------------------------------------------------------------------

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(pool=ids, step=st.integers(min_value=0, max_value=2**59), prompt_id=ids, agent=ids)
def test_a_group_name_gives_back_its_parts(pool: str, step: int, prompt_id: str, agent: str) -> None:
    slot = Slot(step=step, prompt_id=prompt_id, agent=agent)

    assert codec.parse_group_name(codec.group_name(pool, slot)) == (pool, slot)


def test_names_are_spelled_as_the_protocol_says() -> None:
    slot = Slot(step=7, prompt_id="gsm8k/12 a%", agent="lab-a")

    assert codec.group_name("math", slot) == "pools/math/steps/7/prompts/gsm8k%2F12%20a%25/agents/lab-a"
    assert codec.manifest_name("math", 7) == "pools/math/steps/7/manifest"
    assert codec.parse_agent_name(codec.agent_name("math", "lab-a")) == ("math", "lab-a")
    assert codec.parse_pool_name(codec.pool_name("math")) == "math"
    assert codec.parse_prompt_set_name(codec.prompt_set_name("s")) == "s"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "pools/math",
        "pools/math/steps/1/prompts/p/agents",
        "pools//steps/1/prompts/p/agents/a",
        "pools/math/steps/01/prompts/p/agents/a",
        "pools/math/steps/-1/prompts/p/agents/a",
        "pools/math/steps/\N{SUPERSCRIPT TWO}/prompts/p/agents/a",
        "pools/math/steps/" + "9" * 5000 + "/prompts/p/agents/a",
        "pools/math/steps/1/prompts/p%2fq/agents/a",
        "pools/math/steps/1/prompts/%70/agents/a",
        "pools/math/steps/1/prompts/%FF/agents/a",
        "pools/math/steps/1/prompts/p q/agents/a",
        "pools/math/steps/1/prompts/p/agents/a/x/y",
    ],
)
def test_a_name_with_another_spelling_is_refused(name: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=r" is not a name of the form pools/\{pool\}/steps/\{step\}/"
    ):
        codec.parse_group_name(name)


# --- messages --------------------------------------------------------------------------------------


def test_an_unset_field_of_a_pool_is_the_default() -> None:
    spec = codec.pool_spec_from_proto(
        pool_pb2.PoolSpec(
            prompt_set="promptSets/gsm8k",
            group_size=8,
            plan=pool_pb2.VerificationPlan(verifiers=[pool_pb2.VerifierUse(verifier="math")]),
            lockstep=pool_pb2.Lockstep(prompts_per_step=16),
        )
    )

    assert spec == PoolSpec("gsm8k", 8, VerificationPlan((VerifierUse("math"),)), Lockstep(16))


def test_every_field_of_a_pool_comes_back() -> None:
    spec = PoolSpec(
        prompt_set="gsm8k",
        group_size=4,
        plan=VerificationPlan((VerifierUse("boxed", '{"a": 1}'),), 0.0, 2.5, 7, 0.0),
        lockstep=Lockstep(5, 3, 1.25, 0.5, 2, 100),
        seed=-3,
        max_tokens=64,
        reveal=RevealRule.OPEN,
        retained_steps=9,
        capability_window=2,
    )

    assert codec.pool_spec_from_proto(codec.pool_spec_to_proto(spec)) == spec


def test_a_pool_without_schedule_or_prompt_set_is_invalid() -> None:
    with pytest.raises(InvalidPoolError, match=r"^The pool states no schedule that this version knows; "):
        codec.pool_spec_from_proto(pool_pb2.PoolSpec(prompt_set="promptSets/a"))
    with pytest.raises(InvalidPoolError, match=r"^The pool names no prompt set: "):
        codec.pool_spec_from_proto(pool_pb2.PoolSpec(prompt_set="a", lockstep=pool_pb2.Lockstep()))


def test_small_messages_come_back_as_they_went() -> None:
    entry = PromptEntry(
        Prompt("p/1", (Message("user", "2+2?"), Message("assistant", "")), "sums"), '{"a": 4}'
    )
    model = ModelSpec("tiny", "LlamaForCausalLM", 5_000_000_000, "ab" * 32)
    roster = RosterEntry(
        "a", "local", RosterState.LATE, (StepCounts(1, 2, 3, 4), StepCounts(2, 0, 0, 0)), True
    )
    receipt = Receipt("math", Slot(1, "p/1", "a"), b"d" * 32, 4, 8)
    identity = VerifierIdentity("math", "1.2", b"c" * 32)

    assert codec.prompt_entry_from_proto(codec.prompt_entry_to_proto(entry)) == entry
    assert codec.model_spec_from_proto(codec.model_spec_to_proto(model)) == model
    assert codec.roster_entry_from_proto(codec.roster_entry_to_proto(roster)) == roster
    assert codec.receipt_from_proto(codec.receipt_to_proto(receipt)) == receipt
    assert codec.verifier_identity_from_proto(codec.verifier_identity_to_proto(identity)) == identity
    assert codec.timestamp_to_proto(1_234_567_890_123_456).ToMicroseconds() == 1_234_567_890_123_456


@given(st.floats(min_value=0, max_value=1e9))
def test_a_duration_keeps_the_nanosecond(seconds: float) -> None:
    assert codec.duration_from_proto(codec.duration_to_proto(seconds)) == pytest.approx(
        seconds, abs=1e-9, rel=1e-15
    )


@pytest.mark.parametrize(
    "verdict",
    [
        Scored(0.0),
        Scored(0.5, {"format": 1.0}),
        *(Unscored(kind, reason) for kind in UnscoredKind for reason in VerdictReason),
    ],
)
def test_a_verdict_comes_back_as_it_went(verdict: Verdict) -> None:
    assert codec.verdict_from_proto(codec.verdict_to_proto(verdict)) == verdict


def test_a_verdict_that_is_unset_or_newer_is_unscored() -> None:
    newer = verdict_pb2.Verdict.FromString(b"\x3a\x00")  # field 7: an outcome of the future
    reason = verdict_pb2.Verdict(
        timed_out=verdict_pb2.TimedOut(), reason=verdict_pb2.VerdictReason.ValueType(99)
    )

    assert codec.verdict_from_proto(verdict_pb2.Verdict()) == Unscored(UnscoredKind.UNSUPPORTED)
    assert codec.verdict_from_proto(newer) == Unscored(UnscoredKind.UNSUPPORTED)
    assert codec.verdict_from_proto(reason) == Unscored(UnscoredKind.TIMEOUT)


@pytest.mark.parametrize("value", [0, 99])
def test_an_unknown_enum_is_refused_with_advice(value: int) -> None:
    with pytest.raises(
        UnsupportedEncodingError,
        match=rf"^StepState {value} is unknown to this version; upgrade hacrl-exchange\.$",
    ):
        codec.enum_from_proto(StepState, value)


def test_a_delivered_group_has_one_verdict_per_rollout_or_is_refused() -> None:
    group = codec.encode_group(make_group(), name=NAME)
    verdicts = [verdict_pb2.Verdict(scored=verdict_pb2.Scored(score=1))]
    delivered = exchange_service_pb2.DeliveredGroup(
        group=group, verdict=verdict_pb2.GroupVerdict(generation=1, verdicts=verdicts * 2)
    )

    verified = codec.decode_verified_group(delivered)

    assert (verified.agent, verified.generation, verified.verifier) == ("lab-a", 1, None)
    assert verified.verdicts == (Scored(1.0), Scored(1.0))
    assert verified.digest == codec.group_digest(group.envelope)
    del delivered.verdict.verdicts[1]
    with pytest.raises(CountMismatchError):
        codec.decode_verified_group(delivered)


def test_the_types_have_the_wire_values_of_the_protocol() -> None:
    assert {one.value for one in FinishReason} == set(pb.FinishReason.values()) - {0}
    assert {one.value for one in LogprobOrigin} == set(pb.LogprobOrigin.values()) - {0}
    assert {one.value for one in VerdictReason} == set(verdict_pb2.VerdictReason.values())


def test_everything_the_package_lists_is_there() -> None:
    assert [name for name in codec.__all__ if not hasattr(codec, name)] == []
