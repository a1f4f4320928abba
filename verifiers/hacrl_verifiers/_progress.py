"""24 shared bytes through which a child says what it works on, at the price of a memory write.

The supervisor thus knows, at any time and without a message, since when the current item runs. Times are
CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass

# By its own name: a verifier that patches the time module must not stop our clock.
from time import monotonic

# When it began, the first item, how many items. The time comes first: half-written it can only look younger.
_LAYOUT = struct.Struct("@dQQ")

WAITING = 2**64 - 1
PREPARING = 2**64 - 2


@dataclass(frozen=True, slots=True)
class Mark:
    """What the child works on: items first .. first + count - 1, or WAITING or PREPARING."""

    began: float
    first: int
    count: int


class Progress:
    """The shared bytes, seen from either side."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, _LAYOUT.size)

    def mark(self, first: int, count: int) -> None:
        """States what is worked on from now."""
        _LAYOUT.pack_into(self._memory, 0, monotonic(), first, count)

    def read(self) -> Mark:
        """What is worked on; may be nonsense if the child has been taken over, but never NaN."""
        began, first, count = _LAYOUT.unpack_from(self._memory)
        return Mark(math.inf if math.isnan(began) else began, first, count)

    def close(self) -> None:
        """Unmaps the bytes."""
        self._memory.close()


def shared_memory() -> int:
    """A descriptor of fresh shared bytes, for `Progress`."""
    fd = os.memfd_create("hacrl-progress", os.MFD_CLOEXEC)
    os.ftruncate(fd, _LAYOUT.size)
    return fd
