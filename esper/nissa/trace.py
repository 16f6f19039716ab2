"""The whole way of one adaptation, from what was seen of its site to its end: one line for each thing that happened.

Read off a run's files and, where there is a catalogue, off the kernel's record. Times are those of whoever told.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from esper.leyline.kernels import CompiledKernelArtifact
from esper.leyline.native import Rung
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Choice, HealthSignal, LifecycleEvent, VetoRecord
from esper.leyline.summary import RunHistory, RunSummary
from esper.nissa import words

_RUNGS = {Rung.NATIVE: "runs native code", Rung.IR: "runs from its IR"}


@dataclass(frozen=True, slots=True)
class Stop:
    """One thing that happened on the way.

    Attributes:
        at: seconds since the epoch.
        system: whose doing it was.
        step: optimizer steps that were done; None for what no run did.
        what: in a few words.
        why: the reason that was given, with figures; may be empty.
    """

    at: float
    system: str
    step: int | None
    what: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Way:
    """One adaptation.

    Attributes:
        trace_id: of it.
        run_id: the run.
        site, seed, blueprint, kernel_id: what grew where; the last two None if it never had a kernel.
        stops: in the order of time.
    """

    trace_id: str
    run_id: str
    site: str
    seed: str
    blueprint: str | None
    kernel_id: str | None
    stops: tuple[Stop, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def traces(summary: RunSummary) -> list[str]:
    """The trace ids of a run's adaptations, in the order in which they began."""
    return list(dict.fromkeys(event.trace_id for event in summary.events if event.trace_id))


def way_of(
    trace_id: str, summary: RunSummary, history: RunHistory, kernel: CompiledKernelArtifact | None = None
) -> Way:
    """Tells the way of an adaptation.

    Args:
        trace_id: one of `traces(summary)`.
        summary: of its run.
        history: likewise.
        kernel: the record of its kernel; None where it is not known.

    Raises:
        KeyError: if the run has no such adaptation.
    """
    events = [event for event in summary.events if event.trace_id == trace_id]
    if not events:
        raise KeyError(trace_id)
    stops = [_of_event(event) for event in events]
    stops += [_of_choice(choice) for choice in history.choices if choice.trace_id == trace_id]
    stops += [
        Stop(change.timestamp, "Kasmina", change.step, _RUNGS[change.rung], change.reason)
        for change in summary.rungs
        if change.trace_id == trace_id
    ]
    stops += [_of_veto(record) for record in summary.vetoes if record.trace_id == trace_id]
    if kernel is not None:
        stops.append(_of_kernel(kernel))
    report = next((report for report in summary.field_reports if report.trace_id == trace_id), None)
    if report is not None:
        cost = f"{words.short(report.flops)} FLOPs and {words.duration(report.seconds)} behind the host"
        why = "; ".join(part for part in (report.failure_reason, cost) if part)
        last, outcome = max(stop.at for stop in stops), report.outcome.value.replace("_", " ")
        stops.append(Stop(last, "Tolaria", events[-1].step, f"reported as {outcome}", why))
    return Way(
        trace_id=trace_id,
        run_id=summary.run_id,
        site=events[0].site,
        seed=events[0].seed,
        blueprint=next((event.blueprint for event in reversed(events) if event.blueprint), None),
        kernel_id=next((event.kernel_id for event in reversed(events) if event.kernel_id), None),
        stops=tuple(sorted(stops, key=lambda stop: stop.at)),
    )


def _named(stage: SeedStage) -> str:
    return stage.value.lower().replace("_", " ")


def _of_event(event: LifecycleEvent) -> Stop:
    stage = _named(event.to_stage)
    what = f"refused to go to {stage}" if event.refused else f"{_named(event.from_stage)} to {stage}"
    figures = "" if event.evidence is None else words.evidence(event.evidence)
    why = "; ".join(part for part in (event.reason, figures) if part)
    return Stop(event.timestamp, "Kasmina", event.step, what, why)


def _of_choice(choice: Choice) -> Stop:
    why = f"{choice.reason}; {_seen(choice.health)}"
    return Stop(choice.timestamp, "Tamiyo", choice.step, f"chosen by {choice.policy}", why)


def _of_veto(record: VetoRecord) -> Stop:
    often = "" if record.num == 1 else f" ({record.num} times, until epoch {record.last_epoch})"
    what = f"vetoed by the {record.veto.gate.value} gate{often}"
    return Stop(record.timestamp, "Tamiyo", record.step, what, f"{record.policy}: {record.veto.in_words}")


def _of_kernel(kernel: CompiledKernelArtifact) -> Stop:
    checks = kernel.report.checks
    passed = sum(check.passed for check in checks)
    return Stop(
        kernel.created_at, "Tezzeret", None, f"kernel {kernel.kernel_id[:12]} compiled",
        f"in {words.duration(kernel.compile_s)}; Urabrask: {passed} of {len(checks)} checks passed",
    )  # fmt: skip


def _seen(health: HealthSignal) -> str:
    """What the site looked like; a figure that was not measured is not named."""
    figures = {
        "health": health.health_score,
        "grow potential": health.grow_potential,
        "gradient": health.gradient_norm,
        "variance": health.activation_variance,
        "dead": health.dead_neuron_ratio,
        "correlation": health.avg_correlation,
    }
    seen = ", ".join(f"{name} {value:.3g}" for name, value in figures.items() if value is not None)
    return f"seen of {health.layer_id}: {seen or 'nothing yet'}"
