"""The table at the end of a run: what it came to, what it cost, what was adapted, and where the report lies."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from esper.leyline.native import Rung
from esper.leyline.signals import Severity
from esper.leyline.summary import RunStatus, RunSummary
from esper.nissa import words
from esper.nissa.adaptations import Adaptation, adaptations
from esper.nissa.frame import glyphs_for, track
from esper.nissa.stages import LOOKS, TRACK

_WIDE = 112
_MAX_ALERTS = 6
STATUS_STYLES: dict[RunStatus, str] = {
    RunStatus.RUNNING: "cyan",
    RunStatus.FINISHED: "bold green",
    RunStatus.INTERRUPTED: "yellow",
    RunStatus.FAILED: "bold red",
}


@dataclass(frozen=True)
class _Outcome:
    summary: RunSummary
    report: str | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        summary = self.summary
        yield Text.assemble(
            ("esper ", "bold green"),
            (summary.run_id, "bold"),
            "  ",
            (summary.status.value, STATUS_STYLES[summary.status]),
            f"  {summary.task.replace('_', ' ')}, seed {summary.seed}",
            ", deterministic" if summary.deterministic else "",
        )
        if summary.error:
            yield Text(summary.error, "red")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(no_wrap=True, style="dim")
        facts.add_column(overflow="fold")
        for name, value in figures(summary):
            facts.add_row(name, value)
        yield facts
        lives = adaptations(summary)
        if lives:
            yield Text()
            yield _wide(lives, options) if options.max_width >= _WIDE else _narrow(lives, options)
        else:
            yield Text("no adaptation was begun", "dim")
        for back in summary.rollbacks:
            yield Text(f"{glyphs_for(options).marks[2]} {words.rollback(back)}", "yellow")
        for missing in summary.went_without:
            yield Text(f"{glyphs_for(options).marks[2]} went without {missing}", "yellow")
        yield from _alerts(summary, glyphs_for(options).marks[2])
        if summary.status is RunStatus.INTERRUPTED:
            yield Text(f"resume with: esper train --resume {summary.run_id}", "bold")
        if self.report:
            yield Text.assemble(("report  ", "dim"), (self.report, "bold"), overflow="fold")


def _alerts(summary: RunSummary, mark: str) -> Iterable[Text]:
    """Two lines an alert, the gravest first; of more than a few, how many."""
    found = words.gravest_first(summary.alerts)
    for alert in found[:_MAX_ALERTS]:
        style = "bold red" if alert.severity is Severity.CRITICAL else "yellow"
        head = f"{mark} {alert.summary} at {alert.place} from {words.alert_since(alert)} to {words.alert_until(alert)}"
        yield Text(head, style, overflow="fold")
        yield Text.assemble((f"  {alert.evidence}; look: ", "dim"), (alert.command, "bold"), overflow="fold")
    if len(found) > _MAX_ALERTS:
        yield Text(f"and {len(found) - _MAX_ALERTS} more alerts: esper runs report {summary.run_id}", "yellow")


def figures(summary: RunSummary) -> list[tuple[str, str]]:
    """The run's headline figures as (name, value), for the table and the report alike."""
    metrics, params, flops = summary.metrics, summary.params, summary.ledger.flops
    rows: list[tuple[str, str]] = []
    if summary.start is not None:
        rows.append(("started at", words.start(summary.start)))
    if metrics.val_accuracy is not None or metrics.test_accuracy is not None:
        parts = [("validation", metrics.val_accuracy), ("test", metrics.test_accuracy)]
        rows.append(("accuracy", ", ".join(f"{value:.1%} {name}" for name, value in parts if value is not None)))
    losses = [("validation", metrics.val_loss), ("test", metrics.test_loss)]
    if any(value is not None for _, value in losses):
        rows.append(("loss", ", ".join(f"{words.loss(value)} {name}" for name, value in losses if value is not None)))
    rows += [(words.metric_name(name), words.metric(name, value)) for name, value in metrics.extra.items()]
    grown = f" ({words.factor(params.final, params.start)})" if params.final != params.start and params.start else ""
    rows.append(("parameters", f"{params.start:,} → {params.final:,}{grown}"))
    if flops.total:
        parts = [("host", flops.host), ("shadow", flops.shadow), ("validation", flops.validation)]
        parts += [("telemetry", flops.telemetry), ("trials", flops.trials)]
        shares = ", ".join(f"{name} {value / flops.total:.0%}" for name, value in parts if value)
        rows.append(("FLOPs", f"{words.short(flops.total)} ({shares})"))
    if summary.trials:
        rows.append(("trials", words.trials(summary.trials)))
    if summary.ledger.seconds.total:
        rows.append(("time", f"{words.duration(summary.ledger.seconds.total)} in the trainer"))
    steps = summary.steps
    if steps.count:
        graft = steps.worst_in_graft_ms
        worst = f", worst near a graft {words.milliseconds(graft)}" if graft is not None else ""
        times = f"median {words.milliseconds(steps.median_ms)}, p99 {words.milliseconds(steps.p99_ms)}{worst}"
        rows.append(("steps", f"{steps.count:,}, {times}"))
    for name, circuit in (("Urza", summary.urza), ("Tamiyo", summary.tamiyo)):
        if circuit.opened:
            rows.append((name, words.circuit(circuit)))
    return rows


def _wide(lives: list[Adaptation], options: ConsoleOptions) -> Table:
    table = Table(box=box.SIMPLE_HEAD if not options.ascii_only else box.ASCII2, pad_edge=False, expand=True)
    for name in ("site", "blueprint", "epochs", "way", "outcome", "evidence"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    table.add_column("reason", ratio=1, overflow="fold")
    for life in lives:
        table.add_row(
            life.site,
            _blueprint(life),
            _epochs(life),
            _way(life, options),
            _end(life),
            _evidence(life),
            life.reason,
        )
    return table


def _narrow(lives: list[Adaptation], options: ConsoleOptions) -> Group:
    parts: list[RenderableType] = []
    for life in lives:
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(life.site, "bold"), _blueprint(life), _way(life, options), _end(life))
        more = Group(
            Text.assemble(f"epochs {_epochs(life)}  ", _evidence(life, full=True)),
            Text(life.reason, "dim", overflow="fold"),
        )
        parts += [head, Padding(more, (0, 0, 0, 2))]
    return Group(*parts)


def _blueprint(life: Adaptation) -> str:
    return (life.blueprint or words.UNKNOWN) + (f", {words.RUNGS[Rung.NATIVE]}" if life.is_native else "")


def _epochs(life: Adaptation) -> str:
    return f"{life.start_epoch + 1}-{life.events[-1].epoch + 1}"


def _way(life: Adaptation, options: ConsoleOptions) -> Text:
    """The track; of one that ended early, up to the last station it came to."""
    stages = [event.to_stage for event in life.events if not event.refused]
    reached = [stage for stage in stages if stage in TRACK]
    return track(life.stage, glyphs_for(options), reached=reached[-1] if reached else None)


def _end(life: Adaptation) -> Text:
    return Text(life.outcome, LOOKS[life.stage].style)


def _evidence(life: Adaptation, *, full: bool = False) -> Text:
    evidence = life.evidence
    if evidence is None:
        return Text(words.UNKNOWN, "dim")
    return Text(
        words.evidence(evidence) if full else words.gain(evidence), "green" if words.is_proven(evidence) else "yellow"
    )


def outcome(summary: RunSummary, *, report: str | None = None) -> RenderableType:
    """The end-of-run table as a rich renderable, of the width it is given.

    Args:
        summary: what the run came to.
        report: where the report lies, if one was written.
    """
    return _Outcome(summary, report)


def table(summary: RunSummary, *, report: str | None = None, width: int = 100, color: bool = False) -> str:
    """The end-of-run table as text of at most `width` columns, with terminal colours if asked for."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(outcome(summary, report=report))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
