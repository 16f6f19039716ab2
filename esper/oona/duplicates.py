"""Knowing a message again: (shard, offset) is the same however often it is delivered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from esper.leyline.ports import Delivery

REMEMBERED = 65_536


class Duplicates:
    """Drops what was handled before: `fresh`, handle, `handled`, then acknowledge.

    One life of a consumer needs it only for messages whose acknowledgement was lost; a consumer that starts again
    needs it for all that it had handled, and may keep `positions` with its results. Not safe for threads.

    Args:
        remembered: messages that are known again; the longest known is forgotten first.
        positions: (shard, offset) of messages that an earlier life handled.
    """

    def __init__(self, *, remembered: int = REMEMBERED, positions: Sequence[tuple[int, int]] = ()) -> None:
        self._remembered = remembered
        self._known = OrderedDict[tuple[int, int], None]()  # the newest last; a dict is slow to tell its oldest
        self.num_dropped = 0
        for shard, offset in positions:
            self.add(shard, offset)

    def fresh(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Those that were not handled before, each once; `num_dropped` counts the others."""
        first: dict[tuple[int, int], Delivery] = {}
        for delivery in deliveries:
            at = (delivery.shard, delivery.offset)
            if at not in self._known:
                first.setdefault(at, delivery)
        self.num_dropped += len(deliveries) - len(first)
        return list(first.values())

    def handled(self, deliveries: Sequence[Delivery]) -> None:
        """Remembers that these were handled."""
        for delivery in deliveries:
            self.add(delivery.shard, delivery.offset)

    def add(self, shard: int, offset: int) -> bool:
        """Remembers one; returns whether it is new."""
        is_new = (shard, offset) not in self._known
        self._known[shard, offset] = None
        if len(self._known) > self._remembered:
            self._known.popitem(last=False)
        return is_new

    @property
    def positions(self) -> list[tuple[int, int]]:
        """What is remembered, the newest last."""
        return list(self._known)

    def __contains__(self, at: tuple[int, int]) -> bool:
        return at in self._known
