"""What the frames of a shard's log are, and how those of batches begin."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

from esper.oona.spans import spans_of
from esper.oona.wire import Batch, decode_batch, decode_unpacked


class Kind(IntEnum):
    """Kinds of frames."""

    SNAPSHOT = 0
    BATCH = 1
    JOIN = 2
    LEASE = 3
    ACK = 4
    LEAVE = 5
    FORGET = 6
    TIMED_BATCH = 7  # the time, then the body; logs of the second form
    BURY = 8
    DROP = 9
    GAP = 10  # what was here could not be read
    PLACED_BATCH = 11  # the time, the first offset, then the body; logs of the third form
    PACKED_BATCH = 12  # the same with a packed body
    LEASE_SPANS = 13  # as LEASE, ACK and DROP, but of spans: the first offset and the one behind the last
    ACK_SPANS = 14
    DROP_SPANS = 15
    REQUEUE_SPANS = 16


OF_OFFSETS = {Kind.LEASE_SPANS: Kind.LEASE, Kind.ACK_SPANS: Kind.ACK, Kind.DROP_SPANS: Kind.DROP}
"""What names spans, and what named each offset until the third form."""

TIME, PLACE = struct.Struct("<d"), struct.Struct("<dQ")


def batch_of(kind: Kind, frame: bytes) -> Batch:
    """The batch that a frame of one of these kinds holds.

    Raises:
        TamperedError: if it is not whole.
    """
    if kind is Kind.PACKED_BATCH:
        return decode_batch(frame[PLACE.size :])
    if kind is Kind.PLACED_BATCH:
        return decode_unpacked(frame[PLACE.size :])
    return decode_unpacked(frame[TIME.size :] if kind is Kind.TIMED_BATCH else frame)


def spans_in(kind: Kind, values: Sequence[Any]) -> list[range]:
    """The spans that end a frame which names spans or offsets."""
    named = values[-1]
    are_spans = kind in OF_OFFSETS or kind is Kind.REQUEUE_SPANS
    return [range(start, stop) for start, stop in named] if are_spans else spans_of(named)


def pairs_of(spans: Sequence[range]) -> list[tuple[int, int]]:
    """Inverse of `spans_in`, as JSON values."""
    return [(span.start, span.stop) for span in spans]
