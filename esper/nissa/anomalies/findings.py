"""What a detector says of one stream at one moment: something is out of the ordinary, or that is over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.leyline.alerts import AlertKind
from esper.leyline.signals import Severity

Z_SCORE, CHANGE_POINT, FOREST, EVENTS = "robust z-score", "change point", "isolation forest", "events"
"""What detects."""


@dataclass(frozen=True, slots=True)
class Found:
    """Something out of the ordinary. Said again as long as it lasts.

    Attributes:
        steps_ago, seconds_ago: how long before the signal at hand it began.
    """

    kind: AlertKind
    summary: str
    evidence: str
    detector: str
    figures: Mapping[str, float] = field(default_factory=dict)
    severity: Severity = Severity.WARNING
    steps_ago: int = 0
    seconds_ago: float = 0.0


@dataclass(frozen=True, slots=True)
class Over:
    """What was out of the ordinary is not any more, and why that is said."""

    kind: AlertKind
    why: str


Said = Found | Over
