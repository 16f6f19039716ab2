"""Whether a kernel that trains behind the host takes too long. Told durations; the clock is the caller's."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

WINDOW = 32
"""Latest durations that count, of the host and of each kernel: medians, so that one slow step says nothing."""
MIN_STEPS = 8
"""Durations of each before there is a verdict."""


class Slowness:
    """Compares updates of kernels with steps of the host.

    Args:
        limit: steps of the host that an update may take; None gives no verdict.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._host: deque[float] = deque(maxlen=WINDOW)
        self._shadows: dict[str, deque[float]] = {}

    def host(self, seconds: float) -> None:
        """Takes in the duration of the host's own step."""
        self._host.append(seconds)

    def shadows(self, seconds: Mapping[str, float]) -> None:
        """Takes in the durations of updates, by seed; what is no longer among them is forgotten."""
        self._shadows = {seed: self._shadows.get(seed, deque(maxlen=WINDOW)) for seed in seconds}
        for seed, one in seconds.items():
            self._shadows[seed].append(one)

    def verdict(self, seed_id: str) -> str | None:
        """Why a kernel is too slow; None if it is not, or too little is known."""
        own = self._shadows.get(seed_id, ())
        if self._limit is None or min(len(own), len(self._host)) < MIN_STEPS:
            return None
        shadow, host = statistics.median(own), statistics.median(self._host)
        if shadow <= self._limit * host:
            return None
        return f"an update takes {1e3 * shadow:.3g} ms, a step of the host {1e3 * host:.3g} ms"
