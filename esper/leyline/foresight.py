"""Whether a figure of health tells beforehand where growth pays: rank correlation of what was seen of a site when an
adaptation was chosen there with the value that came of it.

Spearman's, with its 95% interval by Fisher's z and the standard error of Bonett and Wright (2000); none below five
pairs. Pairs in perfect order count for the interval as halfway to the next best order, or five of them would leave no
doubt at all. Several figures are looked at together, so that one interval in twenty misses by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.leyline.signals import FieldReport, HealthSignal

FIGURES = (
    "grow_potential", "gradient_norm", "activation_variance", "dead_neuron_ratio", "avg_correlation", "health_score",
)  # fmt: skip
MIN_PAIRS = 5
_Z95 = 1.959964


@dataclass(frozen=True, slots=True)
class Foresight:
    """How a figure of health at the choice goes with the value that came of it.

    Attributes:
        num: adaptations for which both are known.
        rho: Spearman's rank correlation; None below `MIN_PAIRS`, or where one of both never varies.
        low, high: its 95% interval.
    """

    figure: str
    num: int
    rho: float | None
    low: float | None
    high: float | None


def pairs_of(reports: Iterable[FieldReport]) -> list[tuple[HealthSignal, float]]:
    """What was seen of a site when each adaptation was chosen, and its value; those without one of both fall out."""
    pairs = [(report.seen, report.value) for report in reports]
    return [(seen, value) for seen, value in pairs if seen is not None and value is not None]


def foresights(pairs: Sequence[tuple[HealthSignal, float]]) -> list[Foresight]:
    """One row for each figure of health."""
    found: list[Foresight] = []
    for figure in FIGURES:
        known = [(x, value) for health, value in pairs if (x := getattr(health, figure)) is not None]
        rho = spearman(known) if len(known) >= MIN_PAIRS else None
        low, high = (None, None) if rho is None else _interval(rho, len(known))
        found.append(Foresight(figure, len(known), rho, low, high))
    return found


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Rank correlation, ties by their mean rank; None where one side never varies."""
    xs, ys = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) + 1) / 2.0
    sxy = math.fsum((x - middle) * (y - middle) for x, y in zip(xs, ys, strict=True))
    sxx, syy = (math.fsum((rank - middle) ** 2 for rank in ranks) for ranks in (xs, ys))
    return sxy / math.sqrt(sxx * syy) if sxx and syy else None


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered, 1)))}
    last = {value: place for place, value in enumerate(ordered, 1)}
    return [(first[value] + last[value]) / 2.0 for value in values]


def _interval(rho: float, num: int) -> tuple[float, float]:
    most = 1.0 - 6.0 / (num * (num**2 - 1))  # two neighbours exchanged take off twice that
    held = max(-most, min(most, rho))
    reach = _Z95 * math.sqrt((1.0 + held**2 / 2.0) / (num - 3))
    centre = math.atanh(held)
    return min(rho, math.tanh(centre - reach)), max(rho, math.tanh(centre + reach))
