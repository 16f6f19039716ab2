"""What the frames of a shard's log are, and how those of batches begin."""

from __future__ import annotations

import struct
from enum import IntEnum


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
    PLACED_BATCH = 11  # the time, the first offset, then the body


TIME, PLACE = struct.Struct("<d"), struct.Struct("<dQ")
