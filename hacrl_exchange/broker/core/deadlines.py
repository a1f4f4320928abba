"""When a step is due, in microseconds since the epoch, from record times and the pool's durations."""

from __future__ import annotations

from hacrl_exchange.broker.core.state import OpenStep
from hacrl_exchange.types import Lockstep

MICROSECONDS = 1_000_000


def publish_deadline_us(step: OpenStep, lockstep: Lockstep) -> int:
    """From here on nobody publishes into the step."""
    return step.open_time_us + round(lockstep.publish_timeout_seconds * MICROSECONDS)


def verify_deadline_us(step: OpenStep, lockstep: Lockstep) -> int:
    """From here on the step closes without the verdicts that are missing. Only once publishing ended."""
    return step.publishing_end_time_us + round(lockstep.verify_timeout_seconds * MICROSECONDS)
