"""Rules of patience: what is tried again, how long, and what is said in the end."""

from __future__ import annotations

import pytest

from hacrl_exchange.client.retry import Patience, is_passing
from hacrl_exchange.errors import (
    BrokerStoppingError,
    ExchangeError,
    InvalidRequestError,
    LogFailedError,
    OverloadedError,
    UnreachableError,
    all_errors,
)


class FakeTime:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def patience(time: FakeTime, seconds: float = 300.0, *, jitter: float = 1.0) -> Patience:
    return Patience(seconds, target="host:1", clock=time.clock, sleep=time.sleep, jitter=lambda: jitter)


def exhaust(bearing: Patience, error: ExchangeError) -> None:
    while True:
        bearing.pause(error)


def test_pauses_double_up_to_two_seconds() -> None:
    time = FakeTime()
    bearing = patience(time)

    for _ in range(8):
        bearing.pause(UnreachableError("away"))

    assert time.slept == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]


def test_jitter_takes_up_to_half_of_a_pause() -> None:
    time = FakeTime()

    patience(time, jitter=0.0).pause(UnreachableError("away"))

    assert time.slept == [0.025]


def test_a_delay_that_the_server_names_is_kept_up_to_two_seconds() -> None:
    time = FakeTime()
    bearing = patience(time)

    bearing.pause(OverloadedError("full", retry_seconds=0.7))
    bearing.pause(OverloadedError("full", retry_seconds=60.0))

    assert time.slept == [0.7, 2.0]


def test_patience_ends_with_a_sentence() -> None:
    time = FakeTime()
    bearing = patience(time, 10.0)

    with pytest.raises(
        UnreachableError,
        match=r"^The broker at host:1 has not answered for 10 s\. "
        r"Check that it runs and that the address is right \(connection refused\)\.$",
    ):
        exhaust(bearing, UnreachableError("connection refused"))
    assert sum(time.slept) == pytest.approx(10.0)


def test_what_the_broker_said_last_is_raised_as_it_is() -> None:
    time = FakeTime()
    bearing = patience(time, 10.0)

    with pytest.raises(LogFailedError, match=r"^The disk is full\.$"):
        exhaust(bearing, LogFailedError("The disk is full."))


def test_progress_makes_patience_whole() -> None:
    time = FakeTime()
    bearing = patience(time, 1.0)

    for _ in range(100):
        bearing.pause(UnreachableError("away"))
        bearing.progress()

    assert set(time.slept) == {0.05}


def test_the_time_of_the_failed_attempt_counts() -> None:
    time = FakeTime()

    with pytest.raises(UnreachableError):
        patience(time, 30.0).pause(UnreachableError("Deadline Exceeded"), began=time.now - 30.0)


def test_an_attempt_may_take_no_longer_than_patience_lasts() -> None:
    time = FakeTime()
    bearing = patience(time, 10.0)
    assert bearing.bound(30.0) == 30.0

    bearing.pause(UnreachableError("away"))

    assert bearing.bound(30.0) == pytest.approx(9.95)
    assert bearing.bound(5.0) == 5.0


def test_what_cannot_pass_is_raised_at_once() -> None:
    time = FakeTime()

    with pytest.raises(InvalidRequestError):
        patience(time).pause(InvalidRequestError("no"))
    assert time.slept == []


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.reason)
def test_only_an_absent_or_stopping_broker_is_waited_for(kind: type[ExchangeError]) -> None:
    assert is_passing(kind("x")) == (kind in (BrokerStoppingError, LogFailedError, UnreachableError))


def test_an_overloaded_broker_is_waited_for_if_it_names_a_delay() -> None:
    assert is_passing(OverloadedError("full", retry_seconds=0.1))
    assert not is_passing(OverloadedError("full"))
