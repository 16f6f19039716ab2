"""When a compiler that shares its cores with a trainer may run: a decision from what was seen and the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from esper.leyline import Pipeline
from esper.tezzeret.neighbours import Neighbours

Yields = Literal["auto", "between_epochs", "never"]

CORE_LEFT = 0.75
"""So much of a core that nobody else uses is enough to work without being felt."""
PERIOD_S = 4.0
"""A compiler that has but a share of the time takes it at once, once in so long: what it stirs up settles between."""


class Pace:
    """Says again and again whether the compiler may run.

    While no trainer takes steps on its cores it may, and so between their epochs. While one does:

    - `never`: it may nevertheless;
    - `between_epochs`: it may not;
    - `auto`: what is made from the IR may, since runs wait for it at their start and it is a second's work at a lower
      priority than theirs; native code may where a core is left over, by measurement, else for `share` of the time, so
      that it ends some day.

    Args:
        yields: see above.
        share: see above; 0 to 1.
        look: what was seen, see `neighbours`.
        clock: seconds.
    """

    def __init__(
        self,
        yields: Yields,
        share: float,
        look: Callable[[], Neighbours],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._yields: Yields = yields
        self._share = share
        self._look = look
        self._clock = clock

    def __call__(self, pipeline: Pipeline) -> bool:
        if self._yields == "never":
            return True
        seen = self._look()
        if not seen.num_trainers:
            return True
        if self._yields == "between_epochs":
            return False
        if pipeline is Pipeline.FAST:
            return True
        return seen.free_cores >= CORE_LEFT or self._clock() % PERIOD_S < self._share * PERIOD_S
