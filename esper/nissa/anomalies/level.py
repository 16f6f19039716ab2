"""The level of a noisy positive stream, in blocks, against its own past: says when it has risen and when it is back."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from esper.nissa.anomalies.change import Cusum
from esper.nissa.anomalies.robust import Window, log_of, median_of


@dataclass(frozen=True, slots=True)
class Shift:
    """A block that lies above the usual level.

    Attributes:
        value, usual: of the block and of the past, as the stream has them.
        score: deviations above.
        blocks: since the level began to rise.
    """

    value: float
    usual: float
    score: float
    blocks: int


class Level:
    """Follows one stream. Works on logarithms: a rise is a factor.

    Args:
        block: values whose median is one reading.
        window: readings that are the past; the last `delay` of them are not yet part of it.
        learn: readings before anything is said.
        factor: a rise below it is none, however steady.
        floor: smallest deviation of a reading, as a share.
        streak: readings in a row that must lie above `factor`.
    """

    def __init__(
        self,
        *,
        block: int,
        factor: float,
        window: int = 24,
        delay: int = 2,
        learn: int = 6,
        floor: float = 0.03,
        streak: int = 3,
    ) -> None:
        self._size, self._delay, self._learn = block, delay, learn
        self._least = math.log(factor)
        self._block: list[float] = []
        self._past = Window(window, floor=floor)
        self._waiting: deque[float] = deque()
        self._cusum = Cusum()
        self._streak, self._above, self._quiet = streak, 0, 0
        self.is_up = False

    def clear(self) -> None:
        """Learns anew."""
        self._block.clear()
        self._past.clear()
        self._waiting.clear()
        self._cusum.clear()
        self._above, self._quiet, self.is_up = 0, 0, False

    def add(self, value: float) -> Shift | bool | None:
        """Takes a value in.

        Returns:
            A shift while the level is up; True when it has come back; None otherwise, and within a block.
        """
        self._block.append(log_of(value))
        if len(self._block) < self._size:
            return None
        self._block.sort()
        reading = median_of(self._block)
        self._block.clear()
        return self._read(reading)

    def _read(self, reading: float) -> Shift | bool | None:
        if len(self._past) < self._learn:
            self._take(reading)
            return None
        rise, score = reading - self._past.median, self._past.score(reading)
        changed = self._cusum.add(score if rise > self._least / 2 else min(score, 0.0))
        self._above = self._above + 1 if rise > self._least else 0
        if self.is_up:
            self._quiet = self._quiet + 1 if rise < self._least / 2 else 0
            if self._quiet >= 2:
                self.is_up, self._quiet = False, 0
                self._cusum.clear()
                return True
        elif changed and self._above >= self._streak:
            self.is_up = True
        elif not self._cusum.suspects:
            self._take(reading)
        if not self.is_up:
            return None
        return Shift(math.exp(reading), math.exp(self._past.median), score, self._cusum.length)

    def _take(self, reading: float) -> None:
        self._waiting.append(reading)
        if len(self._waiting) > self._delay or len(self._past) < self._learn:
            self._past.add(self._waiting.popleft())
