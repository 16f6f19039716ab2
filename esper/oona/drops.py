"""Telling of messages that gave way to newer ones: often enough to be seen, seldom enough to be read."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class DropTold:
    """Warns of a group's first drop, and each time the number has doubled. The counts are the broker's.

    Args:
        shard: its number, for the words.
    """

    def __init__(self, shard: int) -> None:
        self._shard = shard
        self._dropped: Counter[str] = Counter()
        self._next: dict[str, int] = {}

    def tell(self, group: str, count: int) -> None:
        """Counts `count` dropped messages of `group`, and warns when it is time."""
        total = self._dropped[group] = self._dropped[group] + count
        if total >= self._next.get(group, 1):
            self._next[group] = 2 * total
            logger.warning("oona.messages.dropped", extra={"group": group, "shard": self._shard, "num_dropped": total})
