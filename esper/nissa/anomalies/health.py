"""The health of one site, report by report: channels that die, and channels that become one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from esper.leyline.alerts import AlertKind
from esper.leyline.signals import HealthSignal, Severity
from esper.nissa.anomalies.findings import Z_SCORE, Found, Over, Said
from esper.nissa.anomalies.robust import Window, log_of

WINDOW, LEARN = 12, 4
SCORE = 3.0
TWICE = 2
"""Reports in a row: a single one may be chance."""
NUM_FEATURES = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """When a share of a layer is out of the ordinary: far above its own past, and bad in itself.

    Attributes:
        rise: how far above the usual it must be.
        least: what it must be.
        grave: from where on it is critical.
    """

    kind: AlertKind
    summary: str
    what: str
    rise: float
    least: float
    grave: float


DEAD = Rule(AlertKind.DEAD_CHANNELS, "channels die", "of the channels are dead", 0.3, 0.3, 0.8)
CORRELATED = Rule(
    AlertKind.CORRELATED_CHANNELS, "channels become one", "is the mean correlation of channels", 0.2, 0.85, 0.97
)


class _Share:
    """One figure of one site under one rule."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.past = Window(WINDOW, floor=0.02)
        self._times = 0
        self.is_told = False

    def clear(self) -> None:
        self.past.clear()
        self._times, self.is_told = 0, False

    def see(self, value: float) -> Said | None:
        rule, usual = self._rule, self.past.median
        rise = value - usual
        out = len(self.past) >= LEARN and value >= rule.least and rise > rule.rise and self.past.score(value) > SCORE
        if self.is_told and (value < rule.least - 0.05 or rise < rule.rise / 2):
            self.is_told, self._times = False, 0
            return Over(rule.kind, f"{value:.0%} again")
        self._times = self._times + 1 if out else 0
        if not (out or self.is_told):
            self.past.add(value)
        if self._times < TWICE and not self.is_told:
            return None
        self.is_told = True
        return Found(
            rule.kind, rule.summary, f"{value:.0%} {rule.what}, where {usual:.0%} is usual here", Z_SCORE,
            {"value": value, "usual": usual, "score": self.past.score(value)},
            Severity.CRITICAL if value >= rule.grave else Severity.WARNING,
        )  # fmt: skip


class HealthStream:
    """The health reports of one site."""

    def __init__(self) -> None:
        self._dead, self._correlated = _Share(DEAD), _Share(CORRELATED)
        self._scales = [Window(WINDOW, floor=0.1) for _ in range(3)]

    @property
    def is_told(self) -> bool:
        """Whether an alert of a plain figure lasts."""
        return self._dead.is_told or self._correlated.is_told

    def changed(self) -> Iterator[Said]:
        """The live path changed: what is usual here is learned anew."""
        for share in (self._dead, self._correlated):
            if share.is_told:
                yield Over(share._rule.kind, "the live path changed: the layer is judged anew")  # noqa: SLF001 - its own
            share.clear()
        for window in self._scales:
            window.clear()

    def see(self, signal: HealthSignal) -> Iterator[Said]:
        """Takes one report. What was not measured says nothing."""
        for share, value in ((self._dead, signal.dead_neuron_ratio), (self._correlated, signal.avg_correlation)):
            said = None if value is None else share.see(value)
            if said is not None:
                yield said

    def features(self, signal: HealthSignal) -> list[float] | None:
        """How far each figure of a report lies from what is usual here: [variance, gradient, potential] as logarithms,
        then [dead, correlation]. None while that is not known; 0 for what was not measured.
        """
        values = [
            None if value is None else log_of(value)
            for value in (signal.activation_variance, signal.gradient_norm, signal.grow_potential)
        ]
        known = all(len(w) >= LEARN for w, value in zip(self._scales, values, strict=True) if value is not None)
        found = [0.0 if v is None else v - w.median for w, v in zip(self._scales, values, strict=True)]
        for share, value in ((self._dead, signal.dead_neuron_ratio), (self._correlated, signal.avg_correlation)):
            known = known and (value is None or len(share.past) >= LEARN)
            found.append(0.0 if value is None else value - share.past.median)
        return [min(max(value, -10.0), 10.0) for value in found] if known else None

    def learn(self, signal: HealthSignal) -> None:
        """Takes a report's scales for usual; not to be called for one that is odd."""
        for window, value in zip(
            self._scales, (signal.activation_variance, signal.gradient_norm, signal.grow_potential), strict=True
        ):
            if value is not None:
                window.add(log_of(value))
