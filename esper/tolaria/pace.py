"""How often health is sampled, and kernels are trained behind the host.

Health is sampled on every so many steps, and less often where a sample costs more than its share.

It is told what steps took and knows nothing else; the clock is the caller's. With a share of None the interval is
fixed, which is what a deterministic run needs: what is sampled must not depend on the clock. Nor may it differ between
the ranks of a run, whose clocks do: they hold to one rank's interval from epoch to epoch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

WINDOW = 16
"""Steps of each kind whose median counts: one slow step on a shared machine says nothing."""
MIN_STEPS = 3
"""Steps of each kind before the interval is changed."""
MAX_FACTOR = 16
"""The interval never exceeds the one that was asked for by more than this factor."""

REPLAYS_EVERY = 12
"""Steps from one update of a kernel in TRAINING to the next: an update takes up to 3 steps of a small host (measured by
`esper bench overhead`), and training a kernel may cost a quarter of a step."""
REPLAYS_AN_EPOCH = 64
"""Updates that an epoch has room for, if it has as many steps: kernels have few epochs to show a gain in."""


def replay_interval(every: int | Literal["auto"], *, steps_per_epoch: int) -> int:
    """Steps from one update of a kernel in TRAINING to the next.

    Args:
        every: `kasmina.shadow_every`.
        steps_per_epoch: 0 if it is not known yet.
    """
    return max(1, min(REPLAYS_EVERY, steps_per_epoch // REPLAYS_AN_EPOCH)) if every == "auto" else every


class Pace:
    """Says on which steps health is sampled.

    Args:
        every: steps between samples at least.
        share: what samples may cost, as a share of the time of all steps; None keeps to `every`.
    """

    def __init__(self, every: int, share: float | None) -> None:
        self._every = every
        self._share = share
        self._last: int | None = None
        self._held: int | None = None
        self._spares = False
        self._plain: deque[float] = deque(maxlen=WINDOW)
        self._sampled: deque[float] = deque(maxlen=WINDOW)

    def samples(self, step: int, *, longest: int) -> bool:
        """Whether `step` is sampled; to be asked once a step, in order.

        Args:
            step: its number.
            longest: the interval is no longer than this, so that no epoch goes unmeasured.
        """
        if self._share is None:
            return step % self._every == 0
        interval = self._held or self.interval(longest=longest)
        spared, self._spares = self._spares and longest > 1, False
        if spared or (self._last is not None and self._last <= step < self._last + interval):
            return False
        self._last = step
        return True

    def took(self, seconds: float, *, sampled: bool) -> None:
        """Takes in the duration of a step."""
        (self._sampled if sampled else self._plain).append(seconds)

    def hold(self, interval: int) -> None:
        """Keeps to this interval, whatever was measured, until it is told another."""
        self._held = interval

    def forget(self) -> None:
        """Drops what was measured: steps cost something else from now on, as after a graft. The next step has enough to
        do with that: if a sample is due on it, it is taken on the one after.
        """
        self._plain.clear()
        self._sampled.clear()
        self._spares = True

    def interval(self, *, longest: int) -> int:
        """Steps from one sample to the next, as things stand."""
        known = min(len(self._plain), len(self._sampled)) >= MIN_STEPS
        if self._share is None or not known:
            return self._every
        plain = statistics.median(self._plain)
        extra = statistics.median(self._sampled) - plain
        wanted = math.ceil(extra / (self._share * plain)) if plain > 0 else self._every
        return max(self._every, min(wanted, MAX_FACTOR * self._every, longest))
