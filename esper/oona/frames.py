"""Frames of a log: CRC-32 of the rest, length of the body, kind, then the body."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("<IIB")
NUM_KINDS = 32
"""Kinds of frames, at most."""
MAX_BODY_BYTES = 16 << 20
"""Of a frame that is found behind damage."""


class Frame(NamedTuple):
    """One entry: what kind it is, and its bytes."""

    kind: int
    body: bytes

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return _HEADER.size + len(self.body)


def frame_of(kind: int, body: bytes) -> bytes:
    """A frame's bytes."""
    assert kind < NUM_KINDS
    tail = _HEADER.pack(0, len(body), kind)[4:]
    return struct.pack("<I", zlib.crc32(body, zlib.crc32(tail))) + tail + body


def frames_in(data: bytes, start: int = 0) -> Iterator[Frame]:
    """Yields whole frames until the data ends or a frame does not match its CRC."""
    at = start
    while at + _HEADER.size <= len(data):
        crc, length, kind = _HEADER.unpack_from(data, at)
        start = at + _HEADER.size
        body = data[start : start + length]
        if len(body) < length or zlib.crc32(body, zlib.crc32(data[at + 4 : start])) != crc:
            return
        yield Frame(kind, body)
        at = start + length


def whole_until(data: bytes, start: int = 0) -> int:
    """Where the whole frames end that follow each other from `start` on."""
    return start + sum(frame.size for frame in frames_in(data, start))


def next_frame(data: bytes, start: int, stop: int | None = None) -> int | None:
    """Where a whole frame begins from `start` on, before `stop`; None if none does."""
    view = memoryview(data)
    end_of_search = len(data) - _HEADER.size + 1
    for at in range(start, end_of_search if stop is None else min(stop, end_of_search)):
        crc, length, kind = _HEADER.unpack_from(data, at)
        end = at + _HEADER.size + length
        if kind < NUM_KINDS and end <= len(data) and length <= MAX_BODY_BYTES and zlib.crc32(view[at + 4 : end]) == crc:
            return at
    return None
