"""Where a new group, or a reader without one, begins in a shard."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from esper.oona.broker import Broker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """At the end, or at one of these.

    Attributes:
        from_start: at the oldest record that is kept.
        offsets: an offset for each shard; a shard that is not named begins at its end.
        time: at the first record that the broker took at or after it, seconds since the epoch.

    Raises:
        ValueError: if more than one is given.
    """

    from_start: bool = False
    offsets: Mapping[int, int] | None = None
    time: float | None = None

    def __post_init__(self) -> None:
        if self.from_start + (self.offsets is not None) + (self.time is not None) > 1:
            raise ValueError("begin from the start, from offsets or from a time: one of them")

    @classmethod
    def of_read(cls, positions: Mapping[int, int] | None, at: float | None) -> Start:
        """Of a reader, who begins at the start where nothing is said.

        Raises:
            ValueError: if both are given.
        """
        return cls(from_start=positions is None and at is None, offsets=positions, time=at)

    def offset(self, broker: Broker, shard: int) -> int:
        """The offset to begin at; what is no longer kept is told."""
        if self.from_start:
            return broker.first_offset
        if self.time is not None:
            return broker.kept.offset_at(self.time)
        asked = None if self.offsets is None else self.offsets.get(shard)
        if asked is None:
            return broker.next_offset
        if asked < broker.first_offset:
            gone = {"shard": shard, "asked": asked, "first": broker.first_offset}
            logger.warning("oona.replay.shortened", extra=gone)
        return max(asked, broker.first_offset)
