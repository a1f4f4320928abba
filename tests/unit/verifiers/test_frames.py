"""The pipe between supervisor and child: whole frames or a clear end."""

from __future__ import annotations

import pytest

from hacrl_exchange.types import Scored, Unscored, UnscoredKind, VerdictReason
from hacrl_verifiers._frames import FrameError, FrameReader, encode
from hacrl_verifiers.results import BadResultError, Judgement, clipped, failed, from_wire, to_wire


def test_frames_arrive_whole_however_they_are_cut() -> None:
    messages = [[1, "a", [0.5]], {"x": "é" * 500}, 7]
    stream = b"".join(map(encode, messages))
    for size in (1, 3, 1000, len(stream)):
        reader = FrameReader(1 << 20)
        seen = []
        for start in range(0, len(stream), size):
            reader.feed(stream[start : start + size])
            while (message := reader.next()) is not None:
                seen.append(message)
        assert seen == messages


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff\xff\xff", "A frame of 4294967295 bytes was announced; 1024 are allowed."),
        (b"\x01\x00\x00\x00\xc1", "A frame is not msgpack"),
        (b"\x01\x00\x00\x00\xc0", "A frame is empty."),
        (b"\x02\x00\x00\x00\x01\x01", "A frame is not msgpack"),
    ],
)
def test_noise_is_refused_before_anything_is_allocated(data: bytes, message: str) -> None:
    reader = FrameReader(1024)
    reader.feed(data)

    with pytest.raises(FrameError, match=message):
        reader.next()


@pytest.mark.parametrize(
    "judgement",
    [
        Judgement(Scored(0.25)),
        Judgement(Scored(1.0, {"format": 0.5})),
        failed(VerdictReason.RAISED, "ValueError: no"),
        Judgement(Unscored(UnscoredKind.NOT_APPLICABLE, VerdictReason.NOT_APPLICABLE)),
    ],
)
def test_a_judgement_survives_the_pipe(judgement: Judgement) -> None:
    assert from_wire(to_wire(judgement)) == judgement


@pytest.mark.parametrize(
    "message",
    [
        None,
        1,
        "1.0",
        float("nan"),
        float("inf"),
        [1.0],
        [1.0, {"a": "b"}],
        [1.0, {f"k{n}": 1.0 for n in range(33)}],
        ["scored", 1, ""],
        ["timeout", 99, ""],
        ["timeout", 5, b""],
    ],
)
def test_a_child_cannot_invent_a_judgement(message: object) -> None:
    with pytest.raises(BadResultError):
        from_wire(message)


def test_a_detail_is_cut_at_two_kib_of_utf8() -> None:
    assert clipped("é" * 2000) == "é" * 1024
    assert clipped("a\ud800b") == "a?b"
