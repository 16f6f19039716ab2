"""Change points in a stream: one-sided CUSUMs (Page 1954)."""

from __future__ import annotations

import math


class Cusum:
    """Adds up scores above an allowance; each is clipped, so that no single one can be a change.

    Args:
        allowance: what a score may be without adding anything.
        clip: what a score counts at most.
        limit: the sum at which the level has changed.
    """

    def __init__(self, *, allowance: float = 1.0, clip: float = 4.0, limit: float = 8.0) -> None:
        self._allowance, self._clip, self._limit = allowance, clip, limit
        self.total = 0.0
        self.length = 0
        """Scores since the sum left zero: where the change began."""

    def add(self, score: float) -> bool:
        """Takes a score in; returns whether the level has changed."""
        self.total = min(max(0.0, self.total + min(score, self._clip) - self._allowance), 2 * self._limit)
        self.length = self.length + 1 if self.total else 0
        return self.total >= self._limit

    @property
    def suspects(self) -> bool:
        """Whether half of what a change needs is there."""
        return self.total >= self._limit / 2

    def clear(self) -> None:
        """Begins anew."""
        self.total, self.length = 0.0, 0


class RateCusum:
    """Tells when a share of successes has fallen below half of what it was: log-likelihood ratios of the two.

    Args:
        limit: the sum at which it has; e to its power is how much likelier the lower share then is.
        learn: trials from which the usual share is learned first.
        lowest: a usual share below it is not watched: there is nothing to lose.
        sure: deviations by which the share that is taken for usual lies below the one that was seen (Wilson 1927): few
            trials say little of it, and a share that was lucky at first would fall by chance.
    """

    def __init__(self, *, limit: float = 7.0, learn: int = 24, lowest: float = 0.3, sure: float = 1.0) -> None:
        self._limit, self._learn, self._lowest, self._sure = limit, learn, lowest, sure
        self._hits, self._trials = 0, 0
        self.total = 0.0

    @property
    def usual(self) -> float | None:
        """The share that is usual; None while too little was seen."""
        return None if self._trials < self._learn else (self._hits + 0.5) / (self._trials + 1)

    def add(self, hits: int, misses: int) -> bool:
        """Takes trials in; returns whether the share has fallen."""
        usual = self.usual
        if usual is None:
            self._take(hits, misses)
            return False
        if usual < self._lowest:
            self._take(hits, misses)
            return False
        usual = _wilson(usual, self._trials, self._sure)
        lower = usual / 2
        moved = hits * math.log(lower / usual) + misses * math.log((1 - lower) / (1 - usual))
        self.total = min(max(0.0, self.total + moved), 2 * self._limit)
        if self.total < self._limit / 2:
            self._take(hits, misses)
        return self.total >= self._limit

    def _take(self, hits: int, misses: int) -> None:
        self._hits, self._trials = self._hits + hits, self._trials + hits + misses
        if self._trials > 1 << 12:  # the far past weighs less
            self._hits, self._trials = self._hits // 2, self._trials // 2


def _wilson(share: float, trials: int, sure: float) -> float:
    """The lower end of Wilson's interval of a share."""
    spread = sure * math.sqrt(share * (1 - share) / trials + (sure / (2 * trials)) ** 2)
    return (share + sure * sure / (2 * trials) - spread) / (1 + sure * sure / trials)
