"""What growth was worth in past runs: by design, and by what was seen of the site when it was chosen.

Read off the files of runs. What counts is `FieldReport.value`, paired evidence alone; adaptations without one are
counted among the tried, not among the measured. Correlations with figures of health are `esper.leyline.foresight`'s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from esper.leyline.signals import FieldReport, HealthSignal, Outcome
from esper.leyline.summary import RunHistory, RunSummary
from esper.leyline.track import TrackRecord


@dataclass(frozen=True, slots=True)
class Design:
    """The adaptations with one blueprint at sites of one kind.

    Attributes:
        tried: how many ended.
        kept: how many became permanent.
        record: of those whose worth was measured.
    """

    kind: str
    blueprint: str
    tried: int
    kept: int
    record: TrackRecord


def designs(reports: Iterable[FieldReport]) -> list[Design]:
    """Sums up reports by kind of site and blueprint, the best mean value first, the unmeasured last."""
    tried: Counter[tuple[str, str]] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    records: dict[tuple[str, str], TrackRecord] = {}
    for report in reports:
        design = (report.signature.kind.value, report.blueprint)
        tried[design] += 1
        kept[design] += report.outcome is Outcome.FOSSILIZED
        record = records.setdefault(design, TrackRecord())
        if report.value is not None:
            records[design] = record.count(report.value)
    found = [Design(*design, number, kept[design], records[design]) for design, number in tried.items()]
    return sorted(found, key=lambda one: (not one.record.num, -one.record.mean, one.kind, one.blueprint))


def chosen(summary: RunSummary, history: RunHistory) -> list[tuple[HealthSignal, float]]:
    """What was seen of a site when an adaptation was chosen there, and the value that came of it."""
    values = {report.trace_id: report.value for report in summary.field_reports if report.trace_id}
    pairs = [(choice.health, values.get(choice.trace_id)) for choice in history.choices]
    return [(health, value) for health, value in pairs if value is not None]
