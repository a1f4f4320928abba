"""Length-prefixed msgpack frames on a stream socket. Sizes are checked before anything is allocated."""

from __future__ import annotations

import socket
import struct

import msgpack

_HEADER = struct.Struct("<I")
_CHUNK = 1 << 18

# A job is split by the worker long before this; one group of giant texts still fits.
MAX_JOB_BYTES = 256 << 20
# 100 results with full details and components are half of it.
MAX_RESULT_BYTES = 1 << 20


class FrameError(Exception):
    """The peer sent something that is not a frame. The stream cannot be used any more."""


def encode(message: object) -> bytes:
    """One frame, header included."""
    body: bytes = msgpack.packb(message)
    return _HEADER.pack(len(body)) + body


class FrameReader:
    """Collects bytes into frames, so that reading may stop in the middle of one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds received bytes."""
        self._buffer += data

    def next(self) -> object | None:
        """The next whole message, or None if more bytes are needed.

        Raises:
            FrameError: a frame over the limit or not msgpack.
        """
        if len(self._buffer) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._buffer)
        if size > self._limit:
            raise FrameError(f"A frame of {size} bytes was announced; {self._limit} are allowed.")
        end = _HEADER.size + size
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEADER.size : end])
        del self._buffer[:end]
        try:
            message: object = msgpack.unpackb(body)
        except Exception as error:  # msgpack raises half a dozen unrelated classes
            raise FrameError(f"A frame is not msgpack: {error}.") from error
        if message is None:
            raise FrameError("A frame is empty.")
        return message


def receive(connection: socket.socket, reader: FrameReader) -> object | None:
    """Blocks for the next message; None when the peer closed.

    Raises:
        FrameError: see FrameReader.next.
    """
    while (message := reader.next()) is None:
        data = connection.recv(_CHUNK)
        if not data:
            return None
        reader.feed(data)
    return message
