"""Training loss by step: spikes by a robust z-score, rises of its level by a change point, steps without a loss."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

from esper.leyline.alerts import AlertKind
from esper.leyline.signals import Severity
from esper.nissa.anomalies.findings import CHANGE_POINT, EVENTS, Z_SCORE, Found, Over, Said
from esper.nissa.anomalies.level import Level, Shift
from esper.nissa.anomalies.robust import Window, log_of

WINDOW, LEARN, DELAY = 128, 32, 8
SPIKE_SCORE, SPIKE_FACTOR = 6.0, 1.5
SPIKE_OF = (3, 5)
"""So many of the last so many steps make a spike: a single hard batch is none."""
CALM_STEPS = 10
SETTLE_STEPS = 24
"""After a change of the live path a loss may do what it likes for so many steps, but explode."""
EXPLODED = 4.0
"""Times the loss before: that is no settling in."""
BLOCK = 16
RISE_FACTOR = 1.2


class LossStream:
    """The loss of one run."""

    def __init__(self) -> None:
        self._past = Window(WINDOW, floor=0.05, refresh=16)
        self._waiting: deque[float] = deque()
        self._recent: deque[bool] = deque(maxlen=SPIKE_OF[1])
        self._level = Level(block=BLOCK, factor=RISE_FACTOR)
        self._is_spike = False
        self._calm = 0
        self._settling = 0
        self._before: float | None = None

    def changed(self) -> Iterator[Said]:
        """The live path is another one from here on: learns anew, and remembers what the loss was."""
        if len(self._past) >= LEARN:
            self._before = self._past.median
        yield from self._close("the live path changed: the loss is judged anew")
        self._forget()
        self._settling = SETTLE_STEPS

    def missed(self, num_steps: int) -> Found:
        """Steps came without a finite loss."""
        self._is_spike, self._calm = True, 0
        evidence = f"{num_steps} steps without a finite loss; the governor goes back to the last good state"
        return Found(
            AlertKind.LOSS_SPIKE, "the loss is not finite", evidence, EVENTS, {"value": float(num_steps)},
            Severity.CRITICAL,
        )  # fmt: skip

    def see(self, loss: float) -> Iterator[Said]:
        """Takes the loss of one step."""
        value = log_of(loss)
        if self._settling:
            self._settling -= 1
            yield from self._spike(loss, value, self._exploded(value))
            return
        knows = len(self._past) >= LEARN
        least = math.log(SPIKE_FACTOR)
        out = knows and value - self._past.median > least and self._past.score(value) > SPIKE_SCORE
        yield from self._spike(loss, value, out if knows else self._exploded(value))
        if not (out or self._is_spike):
            self._waiting.append(value)
            if len(self._waiting) > DELAY:
                self._past.add(self._waiting.popleft())
        yield from self._rise(self._level.add(loss))

    def _exploded(self, value: float) -> bool:
        return self._before is not None and value - self._before > math.log(EXPLODED)

    def _spike(self, loss: float, value: float, out: bool) -> Iterator[Said]:
        self._recent.append(out)
        if self._level.is_up:
            return
        usual = self._past.median if len(self._past) >= LEARN or self._before is None else self._before
        if not self._is_spike and sum(self._recent) >= SPIKE_OF[0]:
            self._is_spike, self._calm = True, 0
        if not self._is_spike:
            return
        if out:
            self._calm = 0
            score = (value - usual) / self._past.scale
            times = math.exp(min(value - usual, 50.0))
            evidence = f"{loss:.4g} where {math.exp(usual):.4g} is usual: {times:.1f} times, {score:.0f} deviations"
            yield Found(
                AlertKind.LOSS_SPIKE, "the loss jumped", evidence, Z_SCORE,
                {"value": loss, "usual": math.exp(usual), "score": score},
                Severity.CRITICAL if times > 10 else Severity.WARNING, steps_ago=len(self._recent) - 1,
            )  # fmt: skip
            return
        self._calm += 1
        if self._calm >= CALM_STEPS:
            self._is_spike = False
            yield Over(AlertKind.LOSS_SPIKE, f"{CALM_STEPS} steps as before; the last loss was {loss:.4g}")

    def _rise(self, shift: Shift | bool | None) -> Iterator[Said]:
        if isinstance(shift, Shift):
            if self._is_spike:
                self._is_spike = False
                yield Over(AlertKind.LOSS_SPIKE, "the level itself rose")
            times = shift.value / shift.usual
            evidence = (
                f"the median of {BLOCK} steps is {shift.value:.4g} where {shift.usual:.4g} is usual: "
                f"{times:.2f} times for {shift.blocks * BLOCK} steps"
            )
            yield Found(
                AlertKind.LOSS_RISE, "the loss rises", evidence, CHANGE_POINT,
                {"value": shift.value, "usual": shift.usual, "score": shift.score},
                Severity.CRITICAL if times > 10 else Severity.WARNING, steps_ago=shift.blocks * BLOCK,
            )  # fmt: skip
        elif shift:
            yield Over(AlertKind.LOSS_RISE, f"the median of {2 * BLOCK} steps is as before")

    def _close(self, why: str) -> Iterator[Said]:
        if self._is_spike:
            yield Over(AlertKind.LOSS_SPIKE, why)
        if self._level.is_up:
            yield Over(AlertKind.LOSS_RISE, why)

    def _forget(self) -> None:
        self._is_spike, self._calm = False, 0
        for memory in (self._past, self._waiting, self._recent, self._level):
            memory.clear()
