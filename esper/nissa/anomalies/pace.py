"""Step times: a change point of their level, once it has lasted for seconds. A busy moment is none."""

from __future__ import annotations

from collections.abc import Iterator

from esper.leyline.alerts import AlertKind
from esper.nissa.anomalies.findings import CHANGE_POINT, Found, Over, Said
from esper.nissa.anomalies.level import Level, Shift

BLOCK = 16
SLOW_FACTOR = 1.5
LEAST_S = 2.0
"""What is over sooner is not worth a word."""


class PaceStream:
    """The milliseconds of one run's steps."""

    def __init__(self) -> None:
        self._level = Level(block=BLOCK, factor=SLOW_FACTOR, floor=0.08, streak=4)
        self._slow_s = 0.0
        self._is_told = False

    def changed(self) -> Iterator[Said]:
        """The network or what trains behind it changed: step times are learned anew."""
        if self._is_told:
            yield Over(AlertKind.SLOW_STEPS, "the network changed: its steps are measured anew")
        self._level.clear()
        self._slow_s, self._is_told = 0.0, False

    def see(self, milliseconds: float) -> Iterator[Said]:
        """Takes the time of one step."""
        shift = self._level.add(milliseconds)
        if isinstance(shift, Shift):
            self._slow_s = max(self._slow_s + shift.value * BLOCK / 1e3, shift.blocks * BLOCK * shift.value / 1e3)
            if self._slow_s >= LEAST_S:
                self._is_told = True
                yield self._slow(shift)
        elif shift:
            self._slow_s = 0.0
            if self._is_told:
                self._is_told = False
                yield Over(AlertKind.SLOW_STEPS, f"the median of {2 * BLOCK} steps is as before")

    def _slow(self, shift: Shift) -> Found:
        times = shift.value / shift.usual
        evidence = (
            f"the median of {BLOCK} steps is {shift.value:.3g} ms where {shift.usual:.3g} ms is usual: "
            f"{times:.1f} times, for {self._slow_s:.0f} s"
        )
        figures = {"value": shift.value, "usual": shift.usual, "score": shift.score}
        return Found(
            AlertKind.SLOW_STEPS, "steps are slow", evidence, CHANGE_POINT, figures,
            steps_ago=shift.blocks * BLOCK, seconds_ago=self._slow_s,
        )  # fmt: skip
