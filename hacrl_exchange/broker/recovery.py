"""What a pool starts from: its folded stream, and a clock that goes on from the last record."""

from __future__ import annotations

import time

from hacrl_exchange.broker.core.pool import evolve
from hacrl_exchange.broker.core.state import PoolState
from hacrl_exchange.broker.log import Log
from hacrl_exchange.broker.record_codec import decode_record, snapshot_from_bytes
from hacrl_exchange.errors import CorruptLogError


class PoolClock:
    """Record time: the wall clock read once, then the monotonic clock; never before the last record."""

    def __init__(self, *, not_before_us: int) -> None:
        self._base_us = max(not_before_us, time.time_ns() // 1000)
        self._start_ns = time.monotonic_ns()

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        return self._base_us + (time.monotonic_ns() - self._start_ns) // 1000


def fold_stream(log: Log, stream: str) -> tuple[PoolState | None, int]:
    """The state of a pool and the position it was read from: the snapshot and the records after it."""
    snapshot = log.load_snapshot(stream)
    state: PoolState | None = None
    position = 0
    if snapshot is not None:
        position, payload = snapshot
        state = snapshot_from_bytes(payload)
    for entry in log.read(stream, after=position):
        if entry.position != position + 1:
            raise CorruptLogError(
                f"Stream {stream} jumps from position {position} to {entry.position}; restore a copy.",
                stream=stream,
            )
        state = evolve(state, decode_record(entry.payload))
        position = entry.position
    return state, position
