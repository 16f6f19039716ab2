"""The picture of one run for a terminal: pure drawing, any width from about 60 columns, no state.

Every colour goes with a word or a mark, so that the picture reads the same without colours. Where the terminal
cannot show block characters, plain ASCII is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from esper.leyline.alerts import Alert
from esper.leyline.native import Rung
from esper.leyline.seeds import ENDED, SeedStage
from esper.leyline.signals import Severity
from esper.nissa import words
from esper.nissa.stages import LOOKS, TRACK, word
from esper.nissa.viewmodel import LiveView, Note, SeedView, Tone

_WIDE = 112
_MIN_NOTES_LINES = 3
_MAX_ALERTS = 3


class Glyphs(NamedTuple):
    """The characters a picture is made of."""

    ramp: str
    passed: str
    here: str
    ahead: str
    line_passed: str
    line_ahead: str
    fossil: str
    ended: str
    dormant: str
    marks: tuple[str, str, str, str]
    arrow: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "●", "◉", "○", "━", "─", "◆", "✕", "·", ("•", "✓", "!", "✗"), "→")
ASCII = Glyphs("_.,-=+*#", "o", "O", ".", "=", "-", "#", "x", ".", ("-", "+", "!", "x"), "->")

TONE_STYLES: dict[Tone, str] = {
    Tone.INFO: "cyan",
    Tone.GOOD: "bold green",
    Tone.WARNING: "yellow",
    Tone.BAD: "bold red",
}


def glyphs_for(options: ConsoleOptions) -> Glyphs:
    """The characters that the terminal's encoding can show."""
    return ASCII if options.ascii_only else UNICODE


def sparkline(values: Sequence[float], width: int, ramp: str = UNICODE.ramp) -> str:
    """Draws a series in at most `width` characters; longer series are averaged in equal bins.

    Returns:
        one character a value or bin, lowest to highest of `ramp`; a flat series is drawn low.
    """
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(values), max(values) - min(values)
    top = len(ramp) - 1
    return "".join(ramp[round((value - low) / span * top) if span else 0] for value in values)


def track(stage: SeedStage, glyphs: Glyphs = UNICODE, *, reached: SeedStage | None = None) -> Text:
    """Draws the stations from germination to permanence, with the seed's own place on them.

    Args:
        stage: where it stands.
        glyphs: the characters to use.
        reached: for a seed that ended early, the last station it came to.
    """
    text = Text(no_wrap=True)
    style = LOOKS[stage].style
    if stage not in TRACK:
        passed = TRACK.index(reached) + 1 if reached in TRACK else 0
        mark = glyphs.dormant if stage is SeedStage.DORMANT else glyphs.ended
        text.append((glyphs.passed + glyphs.line_passed) * passed, "dim").append(mark, style)
        return text
    place = TRACK.index(stage)
    for i, station in enumerate(TRACK):
        behind = i <= place
        if i:
            text.append(glyphs.line_passed if behind else glyphs.line_ahead, style if behind else "dim")
        mark = glyphs.fossil if station is SeedStage.FOSSILIZED else glyphs.here
        text.append(mark if i == place else glyphs.passed if behind else glyphs.ahead, style if behind else "dim")
    return text


@dataclass(frozen=True)
class Frame:
    """One picture of `view` at time `now`, no taller than `height` lines.

    Attributes:
        notice: a line of the driver's own, such as that the view is out of date.
    """

    view: LiveView
    now: float
    height: int = 40
    notice: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inner = options.update_width(max(options.max_width - 4, 20))
        glyphs, wide = glyphs_for(options), options.max_width >= _WIDE
        head = [_progress(self.view, self.now), _curves(self.view, inner.max_width, glyphs), _costs(self.view)]
        head += _alert_rows(self.view, glyphs)
        tail = [_decision(self.view)] if self.view.decision else []
        if self.view.page and not self.view.is_done:
            tail.append(Text.assemble("live page ", (self.view.page, "blue")))
        if self.notice:
            tail.append(Text(f"{glyphs.marks[2]} {self.notice}", "yellow"))
        room = self.height - 2 - 4 - _num_lines(console, inner, [*head, *tail])
        rows = _seed_rows(self.view, glyphs, wide=wide)
        seeds, used = _fit(console, inner, rows, max(room - _MIN_NOTES_LINES, 2))
        if len(seeds) < len(rows):
            seeds.append(Text(f"and {len(rows) - len(seeds)} more", "dim"))
            used += 1
        notes = [_note_row(note, glyphs, self.view) for note in reversed(self.view.notes)]
        notes, _ = _fit(console, inner, notes, max(room - used, 1))
        body: list[RenderableType] = [*head]
        if seeds:
            body += [_heading("seeds"), *seeds]
        if notes:
            body += [_heading("what happened, latest first"), *notes]
        title = Text.assemble(("esper ", "bold green"), (self.view.run_id, "bold"))
        subtitle = self.view.task.replace("_", " ")
        yield Panel(
            Group(*body, *([Text()] if tail else []), *tail),
            title=title,
            title_align="left",
            subtitle=subtitle or None,
            subtitle_align="right",
            border_style="green" if self.view.is_done else "bright_black",
            box=box.ASCII if options.ascii_only else box.ROUNDED,
            padding=(0, 1),
        )


def _num_lines(console: Console, options: ConsoleOptions, parts: Iterable[RenderableType]) -> int:
    return sum(len(console.render_lines(part, options, pad=False)) for part in parts)


def _fit(
    console: Console, options: ConsoleOptions, parts: Sequence[RenderableType], room: int
) -> tuple[list[RenderableType], int]:
    """Takes parts from the front as long as they fit into `room` lines."""
    taken: list[RenderableType] = []
    used = 0
    for part in parts:
        lines = _num_lines(console, options, [part])
        if used + lines > room:
            break
        taken.append(part)
        used += lines
    return taken, used


def _heading(text: str) -> Rule:
    return Rule(Text(text, "bold"), align="left", style="bright_black")


def _alert_rows(view: LiveView, glyphs: Glyphs) -> list[RenderableType]:
    """The alerts that last, the gravest first; of more than a few, how many."""
    alerts = sorted(view.open_alerts, key=lambda alert: alert.severity is not Severity.CRITICAL)
    rows: list[RenderableType] = [_alert_row(alert, glyphs) for alert in alerts[:_MAX_ALERTS]]
    if len(alerts) > _MAX_ALERTS:
        rows.append(Text(f"and {len(alerts) - _MAX_ALERTS} more alerts: esper alerts", "yellow"))
    return rows


def _alert_row(alert: Alert, glyphs: Glyphs) -> Text:
    tone = Tone.BAD if alert.severity is Severity.CRITICAL else Tone.WARNING
    mark = glyphs.marks[list(Tone).index(tone)]
    since = "" if alert.since_step is None else f" since step {alert.since_step:,}"
    text = Text.assemble((f"{mark} {alert.summary}", TONE_STYLES[tone]), f" at {alert.place}{since}", overflow="fold")
    return text.append(f": {alert.evidence}; ", "dim").append(alert.command, "bold")


def _progress(view: LiveView, now: float) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, justify="right")
    left = view.seconds_left(now)
    if view.is_done:
        state = Text("done", "bold green")
    elif left is None:
        state = Text("measuring the pace", "dim")
    else:
        state = Text.assemble((words.duration(left), "bold"), " left")
    epoch = min(view.epochs_done + 1, view.num_epochs)
    grid.add_row(
        Text.assemble("epoch ", (f"{epoch}", "bold"), f"/{view.num_epochs or '?'}"),
        ProgressBar(total=1.0, completed=view.progress, complete_style="green", finished_style="bold green"),
        Text.assemble((f"{view.progress:>4.0%}", "bold"), "  ", state),
    )
    return grid


def _curves(view: LiveView, width: int, glyphs: Glyphs) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, justify="right", style="bold")
    grid.add_column(no_wrap=True, style="blue")
    grid.add_column(no_wrap=True, overflow="ellipsis", style="dim")
    room = min(max(width - 52, 10), 60)
    losses = [p.val_loss if p.val_loss is not None else p.train_loss for p in view.points]
    if not losses:
        now = view.step_losses[-1] if view.step_losses else None
        grid.add_row("training loss", words.loss(now), sparkline(view.step_losses, room, glyphs.ramp), "")
        return grid
    last = view.points[-1]
    has_validation = last.val_loss is not None
    grid.add_row(
        "validation loss" if has_validation else "training loss",
        words.loss(losses[-1]),
        sparkline(losses, room, glyphs.ramp),
        f"training {words.loss(last.train_loss)}" if has_validation else "",
    )
    name = view.last.metric_name if view.last else None
    metrics = [
        m for p in view.points if (m := p.val_metric if p.val_metric is not None else p.train_metric) is not None
    ]
    if metrics:
        best = view.best
        told = (
            f"best {words.metric(name, best.val_metric)} at epoch {best.epoch + 1}" if best and best.val_metric else ""
        )
        line = sparkline(metrics, room, glyphs.ramp)
        grid.add_row(words.metric_name(name), words.metric(name, metrics[-1]), Text(line, "green"), told)
    return grid


def _costs(view: LiveView) -> Text:
    text = Text(overflow="fold")
    text.append("parameters ").append(f"{view.params:,}", "bold")
    if view.params_start and view.params != view.params_start:
        text.append(f" ({words.factor(view.params, view.params_start)} of {view.params_start:,})")
    text.append("   kernels ").append(f"{view.kernels_ready} ready", "bold")
    if view.kernels_pending:
        text.append(f", {view.kernels_pending} compiling", "yellow")
    if view.step_ms is not None:
        text.append("   step ").append(words.milliseconds(view.step_ms), "bold")
    for name, state in words.circuits(view.last):
        text.append(f"   {name} ").append(words.CIRCUITS[state], "bold yellow")
    return text


def _seed_rows(view: LiveView, glyphs: Glyphs, *, wide: bool) -> list[RenderableType]:
    """Active seeds first, then fossils, those that ended, and the dormant."""
    seeds = sorted(view.seeds.values(), key=lambda seed: _rank(seed.stage))
    per_site: dict[str, int] = {}
    for seed in seeds:
        per_site[seed.site] = per_site.get(seed.site, 0) + 1
    labels = [seed.site if per_site[seed.site] == 1 else f"{seed.site} {seed.seed_id}" for seed in seeds]
    width = min(max((len(label) for label in labels), default=0), 40 if wide else 22)
    return [_seed_row(seed, label, width, glyphs, wide=wide) for seed, label in zip(seeds, labels, strict=True)]


def _rank(stage: SeedStage) -> int:
    if stage.is_active:
        return 0
    return 1 if stage is SeedStage.FOSSILIZED else 2 if stage in ENDED else 3


def _seed_row(seed: SeedView, label: str, width: int, glyphs: Glyphs, *, wide: bool) -> RenderableType:
    look = LOOKS[seed.stage]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=width, no_wrap=True, overflow="ellipsis")
    grid.add_column(width=2 * len(TRACK) - 1, no_wrap=True)
    grid.add_column(width=16, no_wrap=True)
    grid.add_column(overflow="fold")
    stage = Text(word(seed.stage), look.style)
    if seed.stage is SeedStage.GRAFTING:
        stage.append(f" {seed.alpha:.0%}", "bold")
    details = _details(seed)
    site = Text(label, "dim" if seed.stage is SeedStage.DORMANT else "bold")
    if wide or seed.stage is SeedStage.DORMANT:
        grid.add_row(site, track(seed.stage, glyphs), stage, Text("  ").join(details))
        return grid
    grid.add_row(site, track(seed.stage, glyphs), stage, details[0] if details else "")
    if len(details) < 2:
        return grid
    return Group(grid, Padding(Text("  ").join(details[1:]), (0, 0, 0, 2)))


def _details(seed: SeedView) -> list[Text]:
    if seed.stage is SeedStage.DORMANT:
        potential = seed.grow_potential
        return [Text(f"growth potential {potential:.3g}", "dim")] if potential is not None else []
    details = [Text(seed.blueprint)] if seed.blueprint else []
    if seed.rung is Rung.NATIVE and seed.stage.is_blended:
        details.append(Text(words.RUNGS[seed.rung], "dim"))
    if seed.evidence is not None:
        details.append(Text(words.evidence(seed.evidence), "green" if words.is_proven(seed.evidence) else "yellow"))
    if seed.gate:
        details.append(Text(seed.gate, "dim"))
    return details


def _note_row(note: Note, glyphs: Glyphs, view: LiveView) -> Table:
    style, mark = TONE_STYLES[note.tone], glyphs.marks[list(Tone).index(note.tone)]
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True, width=len(f"epoch {view.num_epochs}"))
    grid.add_column(overflow="fold")
    text = Text.assemble((note.subject, "bold"), " ", (note.text.replace("→", glyphs.arrow), style))
    if note.reason:
        text.append(f": {note.reason}", "dim")
    grid.add_row(Text(mark, style), Text(f"epoch {note.epoch + 1}", "dim"), text)
    return grid


def _decision(view: LiveView) -> Text:
    who = f"tamiyo ({view.policy})" if view.policy else "tamiyo"
    return Text.assemble((f"{who}: ", "bold"), view.decision, overflow="fold")
