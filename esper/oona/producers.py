"""Which batch of each producer is the next one: a repeated batch is known, and one that came too early waits."""

from __future__ import annotations

from collections.abc import Mapping

from esper.oona.wire import Batch

MAX_PRODUCERS = 10_000
"""Producers whose batch numbers are remembered; the longest silent is forgotten first."""


class Producers:
    """The next number of each.

    Args:
        numbers: what a snapshot kept of another.
    """

    def __init__(self, numbers: Mapping[str, int] | None = None) -> None:
        self._next = dict(numbers or {})  # longest silent first

    def lead(self, batch: Batch) -> int:
        """How many batches too early this one is; below 0 it was there before."""
        return batch.seq - max(self._next.get(batch.producer, batch.base), batch.base)

    def note(self, batch: Batch) -> None:
        """Notes that this one was taken."""
        self._next.pop(batch.producer, None)
        self._next[batch.producer] = batch.seq + 1
        if len(self._next) > MAX_PRODUCERS:
            del self._next[next(iter(self._next))]

    def numbers(self) -> dict[str, int]:
        """What a snapshot keeps."""
        return self._next
