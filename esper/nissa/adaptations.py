"""What became of each adaptation, read off a run's lifecycle events: one record from germination to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esper.leyline.native import Rung, RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Evidence, FieldReport, LifecycleEvent
from esper.leyline.summary import RunSummary
from esper.nissa.words import WORTH

_START = SeedStage.GERMINATED


@dataclass(frozen=True)
class Adaptation:
    """One kernel's life at one site.

    Attributes:
        events: its transitions in order; refused commands are among them.
        report: what was said of it at its end; None while it is under way.
        rungs: what its kernel ran from, each from its step on; before the first, its IR.
    """

    site: str
    seed: str
    blueprint: str | None
    kernel_id: str | None
    events: tuple[LifecycleEvent, ...]
    report: FieldReport | None = None
    rungs: tuple[RungChange, ...] = ()

    @property
    def start_epoch(self) -> int:
        return self.events[0].epoch

    @property
    def stage(self) -> SeedStage:
        """Where it stands after its last transition."""
        return self._last.to_stage

    @property
    def is_native(self) -> bool:
        """Whether its kernel ran from native code at last."""
        return bool(self.rungs) and self.rungs[-1].rung is Rung.NATIVE

    @property
    def is_over(self) -> bool:
        """Whether it came to an end of its own before the run did."""
        return not self.stage.is_active

    @property
    def outcome(self) -> str:
        """How it ended, in words; an unfinished one names the stage it stood in."""
        name = self.stage.value.lower().replace("_", " ")
        return name if self.is_over else f"unfinished ({name})"

    @property
    def reason(self) -> str:
        """Why it ended as it did: the words of its last transition, or why it was not finished."""
        if not self.is_over and self.report is not None and self.report.failure_reason:
            return self.report.failure_reason
        return self._last.reason

    @property
    def num_parameters(self) -> int | None:
        """Of the kernel, where a report said so."""
        return self.report.num_parameters if self.report is not None and self.report.blueprint_id else None

    @property
    def motive(self) -> str:
        """Why it was begun: the words of its first transition."""
        return self.events[0].reason

    @property
    def evidence(self) -> Evidence | None:
        """The last paired evidence of worth; without one, the last evidence of any kind."""
        taken = [event.evidence for event in self.events if event.evidence is not None]
        if self.report is not None and self.report.evidence is not None:
            taken.append(self.report.evidence)
        worth = [evidence for evidence in taken if evidence.kind in WORTH]
        return (worth or taken or [None])[-1]

    @property
    def _last(self) -> LifecycleEvent:
        return next((event for event in reversed(self.events) if not event.refused), self.events[-1])


def adaptations(summary: RunSummary) -> list[Adaptation]:
    """Groups a run's events into adaptations, in the order in which they began.

    An event that no germination precedes (a run resumed from elsewhere) begins one as well.
    """
    groups: list[list[LifecycleEvent]] = []
    current: dict[tuple[str, str], list[LifecycleEvent]] = {}
    for event in summary.events:
        key = (event.site, event.seed)
        if event.to_stage is SeedStage.DORMANT:
            current.pop(key, None)  # the embargo is over: the end of nothing that people count
            continue
        starts = event.from_stage is SeedStage.DORMANT and event.to_stage is _START and not event.refused
        if starts or key not in current:
            if event.refused:
                continue  # a refusal before any life: listed among the events, not an adaptation
            current[key] = []
            groups.append(current[key])
        current[key].append(event)
    return [_adaptation(events, summary) for events in groups]


def _adaptation(events: Sequence[LifecycleEvent], summary: RunSummary) -> Adaptation:
    kernel_id = next((e.kernel_id for e in reversed(events) if e.kernel_id), None)
    reports = [
        report for report in summary.field_reports if report.kernel_id == kernel_id and report.seed_id == events[0].seed
    ]
    return Adaptation(
        site=events[0].site,
        seed=events[0].seed,
        blueprint=next((e.blueprint for e in reversed(events) if e.blueprint), None),
        kernel_id=kernel_id,
        events=tuple(events),
        report=reports[-1] if reports else None,
        rungs=tuple(r for r in summary.rungs if (r.seed, r.kernel_id) == (events[0].seed, kernel_id)),
    )
