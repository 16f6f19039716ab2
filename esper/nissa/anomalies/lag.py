"""How far a consumer group is behind, look by look: a change point of its lag, or deliveries that stand still."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from esper.leyline.alerts import AlertKind
from esper.leyline.bus import GroupStats
from esper.nissa.anomalies.change import Cusum
from esper.nissa.anomalies.findings import CHANGE_POINT, Found, Over, Said
from esper.nissa.anomalies.robust import Window

WINDOW, DELAY, LEARN = 48, 3, 5
LEAST = 200
"""Messages: fewer are no lag worth a word."""
GROWTH = math.log(3.0)
STUCK_LOOKS = 6
"""Looks in a row at which nothing was delivered and more was waiting."""


class LagStream:
    """The figures of one group."""

    def __init__(self) -> None:
        self._past = Window(WINDOW, floor=0.3)
        self._waiting: deque[float] = deque()
        self._cusum = Cusum()
        self._last: GroupStats | None = None
        self._stuck = 0
        self.is_told = False

    def see(self, group: GroupStats) -> Iterator[Said]:
        """Takes one look."""
        pending, value = group.pending, math.log1p(group.pending)
        last, self._last = self._last, group
        stands = last is not None and group.delivered == last.delivered and pending > last.pending
        self._stuck = self._stuck + 1 if stands else 0
        falls = last is not None and pending < last.pending
        knows = len(self._past) >= LEARN
        grown = knows and value - self._past.median > GROWTH and not falls
        changed = self._cusum.add(self._past.score(value) if grown else -1.0) if knows else False
        if self.is_told:
            if pending < max(LEAST / 4, math.expm1(self._past.median + GROWTH / 2)):
                self.is_told = False
                self._cusum.clear()
                yield Over(AlertKind.BUS_LAG, f"it caught up: {pending:,} messages behind")
                return
            yield self._lags(group)
            return
        if pending >= LEAST and (changed or self._stuck >= STUCK_LOOKS):
            self.is_told = True
            yield self._lags(group)
            return
        if not self._cusum.suspects and not self._stuck:
            self._waiting.append(value)
            if len(self._waiting) > DELAY or len(self._past) < LEARN:
                self._past.add(self._waiting.popleft())

    def _lags(self, group: GroupStats) -> Found:
        usual = math.expm1(self._past.median) if len(self._past) else 0.0
        stands = f"; nothing was delivered at the last {self._stuck} looks" if self._stuck > 1 else ""
        evidence = f"{group.pending:,} messages behind where {usual:,.0f} are usual{stands}"
        figures = {"value": float(group.pending), "usual": usual, "score": self._cusum.total}
        return Found(AlertKind.BUS_LAG, "a consumer falls behind", evidence, CHANGE_POINT, figures)
