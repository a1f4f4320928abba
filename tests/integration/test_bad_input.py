"""Each kind of bad group has its own documented reason, costs that group alone, and stores nothing of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import grpc
import numpy as np
import pytest
import zstandard
from google.rpc import error_details_pb2

from hacrl_exchange._pb import exchange_service_pb2, rollout_pb2
from hacrl_exchange.errors import InvalidRequestError, PoolNotFoundError
from hacrl_exchange.status import from_rpc_error
from rawdesk import Desk

TEXT, TOKENS, LOGPROBS = 0, 1, 2


def replace_part(group: rollout_pb2.Group, index: int, decoded: bytes) -> None:
    """Puts other content into a part, described truthfully."""
    info = group.envelope.parts[index]
    stored = zstandard.compress(decoded)
    info.compression = rollout_pb2.COMPRESSION_ZSTD
    info.stored_size, info.decoded_size = len(stored), len(decoded)
    info.sha256 = hashlib.sha256(stored).digest()
    group.parts[index] = stored


def unknown_prompt(group: rollout_pb2.Group) -> None:
    group.name = group.name.replace("/q1/", "/nowhere/")


def another_agents_slot(group: rollout_pb2.Group) -> None:
    group.name = group.name.removesuffix("a") + "b"


def another_pools_slot(group: rollout_pb2.Group) -> None:
    group.name = group.name.replace("pools/p/", "pools/other/")


def step_in_the_future(group: rollout_pb2.Group) -> None:
    group.name = group.name.replace("/steps/1/", "/steps/9/")


def group_too_small(group: rollout_pb2.Group) -> None:
    del group.envelope.rollouts[1:]


def logprob_nan(group: rollout_pb2.Group) -> None:
    replace_part(group, LOGPROBS, np.array([math.nan, *[-0.5] * 5], dtype="<f2").tobytes())


def logprob_positive(group: rollout_pb2.Group) -> None:
    replace_part(group, LOGPROBS, np.array([0.5, *[-0.5] * 5], dtype="<f2").tobytes())


def sum_not_finite(group: rollout_pb2.Group) -> None:
    group.envelope.rollouts[0].logprob_sum = -math.inf


def sum_contradicts_the_body(group: rollout_pb2.Group) -> None:
    group.envelope.rollouts[0].logprob_sum = -1.6


def count_contradicts_the_body(group: rollout_pb2.Group) -> None:
    group.envelope.rollouts[0].token_count = 4


def too_few_texts(group: rollout_pb2.Group) -> None:
    body = rollout_pb2.TextBody(rollouts=[rollout_pb2.RolloutText(text="one")])
    replace_part(group, TEXT, body.SerializeToString())


def text_not_utf8(group: rollout_pb2.Group) -> None:
    replace_part(group, TEXT, b"\x0a\x03\x0a\x01\xff\x0a\x03\x0a\x01\xff")


def wrong_digest(group: rollout_pb2.Group) -> None:
    group.envelope.parts[TEXT].sha256 = bytes(32)


def stored_size_lies(group: rollout_pb2.Group) -> None:
    group.envelope.parts[TEXT].stored_size += 1


def decoded_size_lies(group: rollout_pb2.Group) -> None:
    group.envelope.parts[TEXT].decoded_size += 1


def zip_bomb(group: rollout_pb2.Group) -> None:
    """1 GiB of zeros in 32 kB, declared as small."""
    compressor = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    block = bytes(1 << 20)
    stored = b"".join(compressor.compress(block) for _ in range(1024)) + compressor.flush()
    info = group.envelope.parts[TEXT]
    info.compression = rollout_pb2.COMPRESSION_ZSTD
    info.stored_size, info.decoded_size = len(stored), 100
    info.sha256 = hashlib.sha256(stored).digest()
    group.parts[TEXT] = stored


def text_bomb(group: rollout_pb2.Group) -> None:
    """A truthful megabyte of blanks in a kilobyte, said to be six tokens."""
    body = rollout_pb2.TextBody(rollouts=[rollout_pb2.RolloutText(text=" " * (1 << 19))] * 2)
    replace_part(group, TEXT, body.SerializeToString())


def text_with_ballast(group: rollout_pb2.Group) -> None:
    """Honest texts and a field that nobody knows."""
    body = rollout_pb2.TextBody(rollouts=[rollout_pb2.RolloutText(text="x")] * 2).SerializeToString()
    replace_part(group, TEXT, body + b"\xfa\x7f" + b"\x80\x80\x04" + bytes(1 << 16))


def decoded_size_over_the_limit(group: rollout_pb2.Group) -> None:
    group.envelope.parts[TEXT].decoded_size = 1 << 40


def part_over_the_limit(group: rollout_pb2.Group) -> None:
    stored = np.random.default_rng(0).bytes(5 << 20)
    info = group.envelope.parts[TEXT]
    info.compression = rollout_pb2.COMPRESSION_NONE
    info.stored_size = info.decoded_size = len(stored)
    info.sha256 = hashlib.sha256(stored).digest()
    group.parts[TEXT] = stored


def not_zstd(group: rollout_pb2.Group) -> None:
    group.parts[TEXT] = b"plain"
    info = group.envelope.parts[TEXT]
    info.compression = rollout_pb2.COMPRESSION_ZSTD
    info.stored_size, info.sha256 = 5, hashlib.sha256(b"plain").digest()


def unknown_compression(group: rollout_pb2.Group) -> None:
    group.envelope.parts[TEXT].compression = 99  # type: ignore[assignment]  # a newer client's


def unknown_part(group: rollout_pb2.Group) -> None:
    group.envelope.parts[LOGPROBS].kind = 77  # type: ignore[assignment]  # a newer client's


def part_missing(group: rollout_pb2.Group) -> None:
    del group.parts[2:]


def no_text(group: rollout_pb2.Group) -> None:
    del group.parts[0], group.envelope.parts[0]


def fingerprint_missing(group: rollout_pb2.Group) -> None:
    group.envelope.tokenizer_fingerprint = ""


def temperature_zero(group: rollout_pb2.Group) -> None:
    group.envelope.sampling.temperature = 0


def no_finish_reason(group: rollout_pb2.Group) -> None:
    group.envelope.rollouts[1].finish_reason = rollout_pb2.FINISH_REASON_UNSPECIFIED


def envelope_bloated(group: rollout_pb2.Group) -> None:
    """A megabyte in a field that nobody knows."""
    unknown = b"\xfa\x7f" + b"\x80\x80\x40" + bytes(1 << 20)  # field 2047, length-delimited
    group.envelope.MergeFromString(unknown)


def session_of_the_future(group: rollout_pb2.Group) -> None:
    group.envelope.policy_end.session = 2**63 - 1


def sum_absurd(group: rollout_pb2.Group) -> None:
    group.envelope.rollouts[0].logprob_sum = -1e300


def too_many_tokens(group: rollout_pb2.Group) -> None:
    group.envelope.rollouts[0].token_count = 1 << 20


CASES: dict[Callable[[rollout_pb2.Group], None], str] = {
    unknown_prompt: "UNKNOWN_PROMPT",
    another_agents_slot: "FOREIGN_SLOT",
    another_pools_slot: "FOREIGN_SLOT",
    step_in_the_future: "STEP_NOT_FOUND",
    group_too_small: "WRONG_GROUP_SIZE",
    logprob_nan: "INVALID_LOGPROB",
    logprob_positive: "INVALID_LOGPROB",
    sum_not_finite: "INVALID_LOGPROB",
    sum_contradicts_the_body: "SUM_MISMATCH",
    count_contradicts_the_body: "COUNT_MISMATCH",
    too_few_texts: "COUNT_MISMATCH",
    text_not_utf8: "PART_UNDECODABLE",
    wrong_digest: "DIGEST_MISMATCH",
    stored_size_lies: "SIZE_MISMATCH",
    decoded_size_lies: "SIZE_MISMATCH",
    zip_bomb: "PART_UNDECODABLE",
    text_bomb: "PART_TOO_LARGE",
    text_with_ballast: "PART_TOO_LARGE",
    decoded_size_over_the_limit: "PART_TOO_LARGE",
    part_over_the_limit: "PART_TOO_LARGE",
    not_zstd: "PART_UNDECODABLE",
    unknown_compression: "UNSUPPORTED_ENCODING",
    unknown_part: "UNSUPPORTED_ENCODING",
    part_missing: "COUNT_MISMATCH",
    no_text: "INVALID_ENVELOPE",
    fingerprint_missing: "INVALID_ENVELOPE",
    temperature_zero: "INVALID_ENVELOPE",
    no_finish_reason: "INVALID_ENVELOPE",
    too_many_tokens: "TOO_MANY_TOKENS",
    envelope_bloated: "INVALID_ENVELOPE",
    session_of_the_future: "INVALID_ENVELOPE",
    sum_absurd: "INVALID_LOGPROB",
}


@pytest.fixture
def joined(desk: Desk) -> Desk:
    """A pool with an open step and one agent."""
    desk.create_pool()
    desk.join("a")
    desk.await_step("a")
    return desk


def reason_of(result: exchange_service_pb2.PublishResult) -> str:
    """The one ErrorInfo's reason."""
    (detail,) = result.error.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert info.domain == "hacrl.exchange"
    assert result.error.message.endswith(".")
    return str(info.reason)


def test_each_bad_group_gets_its_reason_alone_and_the_others_of_the_call_are_accepted(joined: Desk) -> None:
    for number, (spoil, reason) in enumerate(CASES.items()):
        bad = joined.encoded("a", "q1", seed=100 + number)
        spoil(bad)
        results = joined.publish("a", joined.encoded("a", "q0"), bad, joined.encoded("a", "q2")).results
        assert [result.WhichOneof("result") for result in results] == ["receipt", "error", "receipt"], spoil
        assert reason_of(results[1]) == reason, spoil
    assert joined.status().accepted_count == 4, "something of a refused group was stored"
    stored = joined.exchange.StreamOwnGroups(
        exchange_service_pb2.StreamOwnGroupsRequest(pool=joined.pool, caller=joined.caller("a"), step=1),
        timeout=10,
    )
    names = [group.name.split("/")[5] for message in stored for group in message.groups]
    assert sorted(names) == ["q0", "q2"]


def test_the_slot_of_a_refused_group_is_still_free(joined: Desk) -> None:
    bad = joined.encoded("a", "q1")
    wrong_digest(bad)
    assert reason_of(joined.publish("a", bad).results[0]) == "DIGEST_MISMATCH"
    assert joined.publish("a", joined.encoded("a", "q1")).results[0].receipt.rollout_count == 2


def test_a_closed_step_takes_no_new_group(desk: Desk) -> None:
    desk.create_pool(publish_timeout_seconds=0.2, verify_timeout_seconds=0.2)
    desk.join("a")
    desk.await_step("a")
    desk.manifest(1, agent="a")
    assert reason_of(desk.publish("a", desk.encoded("a", "q0")).results[0]) == "STEP_CLOSED"


def test_a_joiner_after_the_opening_is_not_on_the_roster(joined: Desk) -> None:
    joined.join("late")
    assert reason_of(joined.publish("late", joined.encoded("late", "q0")).results[0]) == "NOT_ON_ROSTER"


def test_a_wrong_pool_is_refused_as_a_whole(joined: Desk) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        joined.exchange.PublishGroups(
            exchange_service_pb2.PublishGroupsRequest(
                pool="pools/none", caller=joined.caller("a"), groups=[joined.encoded("a", "q0")]
            ),
            timeout=10,
        )
    assert isinstance(from_rpc_error(caught.value), PoolNotFoundError)


def test_a_call_carries_at_most_64_groups(joined: Desk) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        joined.publish("a", *[joined.encoded("a", "q0")] * 65)
    assert isinstance(from_rpc_error(caught.value), InvalidRequestError)
