"""What became of the messages of each key: published, delivered, redelivered, dropped, dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from esper.leyline.summary import BusCounts

_PUBLISHED, _DELIVERED, _REDELIVERED, _DROPPED, _DEAD = range(5)


class Tallies:
    """Counts by key. `delivered` counts every delivery to every group, `redelivered` the repeated ones.

    Args:
        counts: what a snapshot kept of another; logs of the first form have three figures.
    """

    def __init__(self, counts: Mapping[str, Sequence[int]] | None = None) -> None:
        self._counts = {key: [*values, *[0] * (5 - len(values))] for key, values in (counts or {}).items()}

    def published(self, key: str, count: int) -> None:
        self._of(key)[_PUBLISHED] += count

    def delivered(self, key: str, count: int, *, again: int) -> None:
        counts = self._of(key)
        counts[_DELIVERED] += count
        counts[_REDELIVERED] += again

    def dropped(self, key: str, count: int) -> None:
        self._of(key)[_DROPPED] += count

    def dead(self, key: str, count: int) -> None:
        self._of(key)[_DEAD] += count

    def of(self, key: str) -> BusCounts:
        """The counts of one key."""
        published, delivered, redelivered, dropped, dead = self._counts.get(key, (0, 0, 0, 0, 0))
        return BusCounts(published=published, delivered=delivered, redelivered=redelivered, dropped=dropped, dead=dead)

    def counters(self) -> dict[str, list[int]]:
        """What a snapshot keeps."""
        return self._counts

    def _of(self, key: str) -> list[int]:
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0] * 5
        return counts
