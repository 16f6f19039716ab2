"""Hits of a trainer's kernel cache: their share falls below half of what it was."""

from __future__ import annotations

from collections.abc import Iterator

from esper.leyline.alerts import AlertKind
from esper.nissa.anomalies.change import RateCusum
from esper.nissa.anomalies.findings import CHANGE_POINT, Found, Over, Said


class CacheStream:
    """The counts of one run, which only rise."""

    def __init__(self) -> None:
        self._rate = RateCusum()
        self._last: tuple[int, int] | None = None
        self._is_told = False

    def see(self, hits: int, misses: int) -> Iterator[Said]:
        """Takes the counts so far."""
        before, self._last = self._last, (hits, misses)
        if before is None or hits < before[0] or misses < before[1]:  # the trainer began again
            before = (0, 0)
        new_hits, new_misses = hits - before[0], misses - before[1]
        if not new_hits + new_misses:
            return
        fallen = self._rate.add(new_hits, new_misses)
        usual = self._rate.usual
        if fallen and usual is not None:
            self._is_told = True
            share = new_hits / (new_hits + new_misses)
            evidence = f"{share:.0%} of {new_hits + new_misses} look-ups found their kernel, where {usual:.0%} is usual"
            figures = {"value": share, "usual": usual, "score": self._rate.total}
            yield Found(AlertKind.CACHE_MISSES, "the kernel cache misses", evidence, CHANGE_POINT, figures)
        elif self._is_told and not self._rate.total:
            self._is_told = False
            yield Over(AlertKind.CACHE_MISSES, "kernels are found as before")
