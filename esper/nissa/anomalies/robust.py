"""Median and scale of a stream's last values, which single outliers do not move. Safe for any finite float."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, of normal noise."""
FAR = 1e6
"""No score is beyond it."""


def log_of(value: float) -> float:
    """The logarithm of what should be positive; what is not counts as very small."""
    return math.log(max(value, 1e-12))


def median_of(ordered: list[float]) -> float:
    """The median of sorted values, of which there is one at least."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else ordered[middle - 1] / 2 + ordered[middle] / 2


class Window:
    """The last `size` values of a stream.

    Args:
        size: values kept.
        floor: smallest scale: what varies less than that is taken to vary so much.
        refresh: values after which median and scale are taken anew.
    """

    def __init__(self, size: int, *, floor: float, refresh: int = 1) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._sorted: list[float] = []
        self._floor, self._refresh = floor, refresh
        self._stale = 0
        self.median, self.scale = 0.0, floor

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Takes a finite value in, and the oldest out."""
        if len(self._values) == self._values.maxlen:
            self._sorted.pop(bisect_left(self._sorted, self._values[0]))
        self._values.append(value)
        insort(self._sorted, value)
        self._stale += 1
        if self._stale >= self._refresh or len(self._values) <= self._refresh:
            self._measure()

    def clear(self) -> None:
        """Forgets the values; median and scale stay as they were last."""
        self._values.clear()
        self._sorted.clear()
        self._stale = 0

    def score(self, value: float) -> float:
        """How many deviations `value` lies above the median."""
        score = (value - self.median) / self.scale
        return min(max(score, -FAR), FAR) if math.isfinite(score) else math.copysign(FAR, value - self.median)

    def _measure(self) -> None:
        self._stale = 0
        self.median = median_of(self._sorted)
        median = self.median
        deviation = median_of(sorted([abs(value - median) for value in self._sorted]))  # two runs: linear
        self.scale = max(TO_SIGMA * min(deviation, 1e300), self._floor)
