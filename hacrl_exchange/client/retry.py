"""When to try again, how long to pause, and when to give up. Clock and sleep are parameters."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from hacrl_exchange.errors import ExchangeError, UnreachableError

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 2.0


def is_passing(error: ExchangeError) -> bool:
    """Says whether the same call may succeed later: the broker is away, or busy and names a delay."""
    return error.code == "UNAVAILABLE" or (
        error.code == "RESOURCE_EXHAUSTED" and error.retry_seconds is not None
    )


class Patience:
    """How long one logical call bears failures: `seconds` since the last sign of progress.

    Pauses double from 0.05 s to 2 s and are jittered, so that many agents do not come back at once. A delay
    that the server names is kept, up to the same 2 s.
    """

    def __init__(
        self,
        seconds: float,
        *,
        target: str,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._seconds = seconds
        self._target = target
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._failing_since: float | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def progress(self) -> None:
        """The broker answered: patience is whole again."""
        self._failing_since = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def bound(self, seconds: float) -> float:
        """The deadline of the next attempt: `seconds`, or what is left of patience once attempts fail."""
        if self._failing_since is None:
            return seconds
        return min(seconds, max(self._failing_since + self._seconds - self._clock(), FIRST_PAUSE_SECONDS))

    def pause(self, error: ExchangeError, *, began: float | None = None) -> None:
        """Waits before the next attempt, or raises if there must be none.

        `began` is when the failed attempt started, if it took time.

        Raises:
            UnreachableError: the broker has not answered for too long.
            ExchangeError: the error itself, if trying again cannot help or patience has run out.
        """
        if not is_passing(error):
            raise error
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now if began is None else began
        left = self._failing_since + self._seconds - now
        if left <= 0:
            if not isinstance(error, UnreachableError):
                raise error
            raise UnreachableError(
                f"The broker at {self._target} has not answered for {now - self._failing_since:.0f} s. "
                f"Check that it runs and that the address is right ({error.message}).",
                target=self._target,
            ) from error
        pause = self._pause_seconds * (0.5 + 0.5 * self._jitter())
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
        if error.retry_seconds is not None:
            pause = min(max(pause, error.retry_seconds), LONGEST_PAUSE_SECONDS)
        self._sleep(min(pause, left))
