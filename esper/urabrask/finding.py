"""What one look at a kernel gives: verdicts, and figures for the report. Figures are equal for equal kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.leyline import Check


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one property's examination."""

    checks: tuple[Check, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    def check(self, name: str) -> Check:
        """The check of this name; raises `KeyError` for one that was not made."""
        return {check.name: check for check in self.checks}[name]


def verdict(
    name: str,
    passed: bool,
    *,
    value: float | None = None,
    limit: float | None = None,
    detail: str = "",
    figures: Mapping[str, float] | None = None,
) -> Finding:
    """A finding of one check. Numbers are rounded, and those that a report cannot hold become words."""
    if value is not None and not math.isfinite(value):
        value, detail = None, detail or f"it is {value}"
    check = Check(name=name, passed=passed, value=_or_none(value), limit=_or_none(limit), detail=detail[:300])
    return Finding((check,), {key: figure(one) for key, one in (figures or {}).items() if math.isfinite(one)})


def merge(*findings: Finding) -> Finding:
    """All checks and figures, in order."""
    figures: dict[str, float] = {}
    for finding in findings:
        figures |= finding.figures
    return Finding(tuple(check for finding in findings for check in finding.checks), figures)


def figure(value: float) -> float:
    """Three significant digits, but integers in full: what is beyond them depends on the order of a sum."""
    return value if float(value).is_integer() else float(f"{value:.3g}")


def _or_none(value: float | None) -> float | None:
    return None if value is None else figure(value)
