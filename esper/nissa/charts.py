"""The report's pictures as plotly figures, drawn in the light palette. No page around them, no theme switching.

Epochs are counted from 1 for people; x = 3 is the end of the third epoch.
"""

from __future__ import annotations

import html
import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.leyline.seeds import SeedStage
from esper.leyline.signals import LifecycleEvent
from esper.leyline.summary import Ledger, RunHistory, RunSummary
from esper.nissa import words
from esper.nissa.adaptations import adaptations
from esper.nissa.palette import LIGHT
from esper.nissa.stages import LOOKS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MAX_STEP_POINTS = 1_200
_LABEL = 26


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        name: unique on the page; names its element.
        title: its heading.
        caption: what to see in it, in words; also its description for those who cannot see it.
        height: in CSS pixels.
        wide: whether it takes the page's whole width.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    height: int
    wide: bool = True


def charts(summary: RunSummary, history: RunHistory) -> list[Chart]:
    """Draws what there is to draw; a picture without data is left out."""
    drawn = [
        _metric(summary, history),
        _loss(summary, history),
        _timeline(summary, history),
        _evidence(summary),
        _size(history, "params", "Parameters", "trainable parameters on the live path"),
        _size(history, "flops_per_sample", "FLOPs a sample", "forward FLOPs of the live path for one sample"),
        _ledger(summary.ledger),
        _steps(history),
    ]
    return [chart for chart in drawn if chart is not None]


# ---------------------------------------------------------------- curves


def _metric(summary: RunSummary, history: RunHistory) -> Chart | None:
    name = next((record.metric_name for record in history.epochs if record.metric_name), None)
    if all(record.val_metric is None and record.train_metric is None for record in history.epochs):
        return None
    figure = _figure()
    share = words.is_share(name)
    _curve(figure, history, "train_metric", "training", LIGHT["train"], dash="dot", width=1.6)
    _curve(figure, history, "val_metric", "validation", LIGHT["accent"])
    figure.update_yaxes(tickformat=".0%" if share else None)
    marked = _mark_growth(figure, summary, history)
    title = words.metric_name(name).capitalize()
    caption = _told(history, "val_metric", lambda v: words.metric(name, v)) + marked
    return Chart("metric", title, caption, figure, 340)


def _loss(summary: RunSummary, history: RunHistory) -> Chart | None:
    if not history.epochs:
        return None
    figure = _figure()
    _curve(figure, history, "train_loss", "training", LIGHT["train"], dash="dot", width=1.6)
    _curve(figure, history, "val_loss", "validation", LIGHT["loss"])
    _mark_growth(figure, summary, history)
    has_validation = any(record.val_loss is not None for record in history.epochs)
    caption = _told(history, "val_loss" if has_validation else "train_loss", words.loss)
    return Chart("loss", "Loss", caption, figure, 340)


def _curve(
    figure: Figure, history: RunHistory, key: str, name: str, color: str, *, dash: str = "solid", width: float = 2.6
) -> None:
    pairs = [(record.epoch + 1, value) for record in history.epochs if (value := getattr(record, key)) is not None]
    if not pairs:
        return
    figure.add_scatter(
        x=[x for x, _ in pairs],
        y=[_rounded(y) for _, y in pairs],
        name=name,
        mode="lines" if len(pairs) > 1 else "markers",
        line={"color": color, "width": width, "dash": dash, "shape": "linear"},
        marker={"color": color, "size": 8},
        hovertemplate="%{y}",
    )


def _told(history: RunHistory, key: str, write: Any) -> str:
    values = [value for record in history.epochs if (value := getattr(record, key)) is not None]
    if not values:
        return ""
    side = "validation" if key.startswith("val") else "training"
    return f"From {write(values[0])} to {write(values[-1])} on {side} data over {len(values)} epochs. "


# stage reached -> (legend, symbol); a mark is told apart by its shape, not by its colour alone
_MARKS: dict[SeedStage, tuple[str, str]] = {
    SeedStage.GRAFTING: ("graft begins", "triangle-up"),
    SeedStage.FOSSILIZED: ("fossilized", "diamond"),
    SeedStage.CULLED: ("culled", "x"),
    SeedStage.CANCELLED: ("cancelled", "circle-open"),
    SeedStage.ROLLED_BACK: ("rolled back", "triangle-left"),
}


def _mark_growth(figure: Figure, summary: RunSummary, history: RunHistory) -> str:
    """Marks what changed the network, or was refused to; returns the marks in words."""
    scale = _EpochScale(history)
    told: list[str] = []
    for stage, (name, symbol) in _MARKS.items():
        events = [e for e in summary.events if e.to_stage is stage and not e.refused]
        if not events:
            continue
        color = LOOKS[stage].light
        figure.add_scatter(
            x=[scale(event) for event in events],
            y=[1.0] * len(events),
            yaxis="y2",
            name=name,
            mode="markers",
            marker={"symbol": symbol, "size": 11, "color": color, "line": {"color": LIGHT["card"], "width": 1}},
            customdata=[_label(event.site, event.blueprint) for event in events],
            hovertemplate=f"%{{customdata}} {name}<extra></extra>",
            cliponaxis=False,
        )
        for event in events:
            figure.add_vline(x=scale(event), line={"color": color, "width": 1.2, "dash": "dot"}, layer="below")
        told += [f"{_label(e.site, e.blueprint)} {name} after epoch {e.epoch + 1}" for e in events]
    figure.update_xaxes(title_text="epochs")
    figure.update_layout(
        yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True, "showgrid": False}
    )
    return html.unescape("; ".join(told) + ".") if told else "The network did not grow."


class _EpochScale:
    """Where an event stands on the axis of epochs."""

    def __init__(self, history: RunHistory) -> None:
        last = max(history.epochs, key=lambda record: record.step, default=None)
        self.end = float(last.epoch + 1) if last else 1.0
        self._steps_per_epoch = last.step / (last.epoch + 1) if last and last.step else 0.0

    def __call__(self, event: LifecycleEvent) -> float:
        return round(self.of_step(event.step), 3) if self._steps_per_epoch else float(event.epoch + 1)

    def of_step(self, step: int) -> float:
        return step / self._steps_per_epoch if self._steps_per_epoch else 0.0


# ---------------------------------------------------------------- seeds


def _timeline(summary: RunSummary, history: RunHistory) -> Chart | None:
    spans = _spans(summary, history)
    if not spans:
        return None
    rows = list(dict.fromkeys(span.row for span in spans))
    figure = _figure(hovermode="closest")
    for stage, look in LOOKS.items():
        own = [span for span in spans if span.stage is stage]
        if not own:
            continue
        figure.add_bar(
            orientation="h",
            y=[span.row for span in own],
            base=[round(span.start, 3) for span in own],
            x=[round(span.end - span.start, 3) for span in own],
            name=look.word,
            text=[look.word for _ in own],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": LIGHT[look.text]},
            marker={"color": look.light, "line": {"color": LIGHT["card"], "width": 1.5}},
            customdata=[[span.what, span.reason, f"{span.start:.4g}", f"{span.end:.4g}"] for span in own],
            hovertemplate=(
                f"<b>{look.word}</b> %{{customdata[0]}}<br>epoch %{{customdata[2]}} to %{{customdata[3]}}"
                "<br>%{customdata[1]}<extra></extra>"
            ),
        )
    figure.update_layout(barmode="overlay", bargap=0.42, uniformtext={"minsize": 10, "mode": "hide"})
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True, ticklabelstandoff=6)
    figure.update_xaxes(range=[0, _EpochScale(history).end], showgrid=True, title_text="epochs")
    told = [
        f"{life.site}: {life.blueprint or 'no kernel'}, {life.outcome} after epoch {life.events[-1].epoch + 1}"
        for life in adaptations(summary)
    ]
    return Chart("timeline", "Lives of the seeds", "; ".join(told) + ".", figure, 150 + 54 * len(rows))


@dataclass(frozen=True)
class _Span:
    row: str
    stage: SeedStage
    start: float
    end: float
    what: str
    reason: str


def _spans(summary: RunSummary, history: RunHistory) -> list[_Span]:
    scale = _EpochScale(history)
    per_seed: dict[tuple[str, str], list[LifecycleEvent]] = {}
    for event in summary.events:
        if not event.refused:
            per_seed.setdefault((event.site, event.seed), []).append(event)
    num_seeds: dict[str, int] = {}
    for site, _ in per_seed:
        num_seeds[site] = num_seeds.get(site, 0) + 1
    spans: list[_Span] = []
    for (site, seed), events in per_seed.items():
        row = html.escape(_cut(site if num_seeds[site] == 1 else f"{site} · {seed}"))
        starts = [0.0, *(scale(event) for event in events)]
        ends = [*starts[1:], max(scale.end, starts[-1])]
        stages = [events[0].from_stage, *(event.to_stage for event in events)]
        for i, (stage, start, end) in enumerate(zip(stages, starts, ends, strict=True)):
            if end > start:  # a stage that was passed at one and the same step has no length
                event = events[i - 1] if i else None
                shows = event is not None and stage is not SeedStage.DORMANT
                what = html.escape(event.blueprint or "") if event and shows else ""
                spans.append(_Span(row, stage, start, end, what, _wrapped(event.reason) if event else ""))
    return spans


def _evidence(summary: RunSummary) -> Chart | None:
    """Gains with two standard errors to both sides, against zero."""
    lives = [life for life in adaptations(summary) if life.evidence is not None and life.evidence.kind in words.WORTH]
    if not lives:
        return None
    figure = _figure(hovermode="closest")
    rows = [
        f"{i}. {_label(life.site, None)}<br>{html.escape(_cut(life.blueprint or ''))}"
        for i, life in enumerate(lives, 1)
    ]
    for proven, name, color, symbol in (
        (True, "above two standard errors", LIGHT["accent"], "circle"),
        (False, "not proven", LIGHT["warn"], "circle-open"),
    ):
        own = [
            (row, life.evidence, life.outcome)
            for row, life in zip(rows, lives, strict=True)
            if life.evidence is not None and words.is_proven(life.evidence) is proven
        ]
        if not own:
            continue
        figure.add_scatter(
            x=[_rounded(evidence.gain) for _, evidence, _ in own],
            y=[row for row, _, _ in own],
            error_x={"type": "data", "array": [_rounded(2 * e.stderr) for _, e, _ in own], "color": color, "width": 6},
            mode="markers",
            name=name,
            marker={"color": color, "size": 12, "symbol": symbol, "line": {"width": 2, "color": color}},
            customdata=[html.escape(f"{words.evidence(e)}; {outcome}") for _, e, outcome in own],
            hovertemplate="%{customdata}<extra></extra>",
        )
    figure.add_vline(x=0, line={"color": LIGHT["muted"], "width": 1.2})
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5],
        categoryorder="array",
        categoryarray=rows,
        showgrid=False,
        automargin=True,
        ticklabelstandoff=6,
    )
    figure.update_xaxes(title_text="paired gain in loss, ± 2 standard errors", zeroline=False, showgrid=True)
    told = [f"{life.site}, {life.blueprint}: {words.evidence(life.evidence)}" for life in lives if life.evidence]
    return Chart("evidence", "Evidence before the graft", "; ".join(told) + ".", figure, 160 + 58 * len(lives))


# ---------------------------------------------------------------- costs


def _size(history: RunHistory, key: str, title: str, what: str) -> Chart | None:
    values = [(record.epoch + 1, getattr(record, key)) for record in history.epochs]
    if not any(value for _, value in values):
        return None
    figure = _figure()
    figure.add_scatter(
        x=[x for x, _ in values],
        y=[y for _, y in values],
        mode="lines",
        name=title.lower(),
        line={"color": LIGHT["host"], "width": 2.6, "shape": "vh"},
        fill="tozeroy",
        fillcolor=LIGHT["line"],
        hovertemplate="%{y:,}",
    )
    figure.update_layout(showlegend=False)
    figure.update_yaxes(rangemode="tozero", tickformat=".3~s")
    first, last = values[0][1], values[-1][1]
    grown = f" ({words.factor(last, first)})" if first and last != first else ""
    return Chart(key, title, f"From {first:,} to {last:,}{grown}: {what}.", figure, 250, wide=False)


_PURPOSES = ("host", "shadow", "validation", "telemetry", "control", "checkpoint")


def _ledger(ledger: Ledger) -> Chart | None:
    rows = [
        (name, unit, {p: float(getattr(part, p, 0)) for p in _PURPOSES})
        for name, unit, part in (("FLOPs", words.short, ledger.flops), ("Time", words.duration, ledger.seconds))
    ]
    rows = [(name, unit, parts) for name, unit, parts in rows if sum(parts.values())]
    if not rows:
        return None
    figure = _figure(hovermode="closest")
    for purpose in _PURPOSES:
        own = [(name, unit, parts[purpose], sum(parts.values())) for name, unit, parts in rows if parts[purpose]]
        if not own:
            continue
        figure.add_bar(
            orientation="h",
            y=[name for name, *_ in own],
            x=[_rounded(value / total) for _, _, value, total in own],
            name=purpose,
            text=[f"{purpose} {value / total:.0%}" for _, _, value, total in own],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": LIGHT["on_soft" if purpose == "validation" else "on_strong"]},
            marker={"color": LIGHT[purpose], "line": {"color": LIGHT["card"], "width": 1.5}},
            customdata=[unit(value) for _, unit, value, _ in own],
            hovertemplate=f"<b>{purpose}</b> %{{customdata}} (%{{x:.1%}})<extra></extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.4, uniformtext={"minsize": 10, "mode": "hide"})
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True, ticklabelstandoff=6)
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    told = [
        f"{name} {unit(sum(parts.values()))}: "
        + ", ".join(f"{p} {v / sum(parts.values()):.1%}" for p, v in parts.items() if v)
        for name, unit, parts in rows
    ]
    return Chart("ledger", "The ledger: what everything cost", ". ".join(told) + ".", figure, 120 + 62 * len(rows))


def _steps(history: RunHistory) -> Chart | None:
    if not history.step_ms:
        return None
    figure = _figure()
    size = max(math.ceil(len(history.step_ms) / MAX_STEP_POINTS), 1)
    bins = [history.step_ms[i : i + size] for i in range(0, len(history.step_ms), size)]
    x = [i * size for i in range(len(bins))]
    figure.add_scatter(
        x=x,
        y=[_rounded(max(part)) for part in bins],
        mode="markers",
        name="step" if size == 1 else f"slowest of {size} steps",
        marker={"color": LIGHT["loss"], "size": 4, "opacity": 0.55},
        hovertemplate="%{y:.3g} ms",
    )
    window = max(len(bins) // 60, 5)
    medians = [
        statistics.median(statistics.median(b) for b in bins[i : i + window]) for i in range(0, len(bins), window)
    ]
    figure.add_scatter(
        x=[min(i * window + window // 2, len(bins) - 1) * size for i in range(len(medians))],
        y=[_rounded(value) for value in medians],
        mode="lines",
        name="median nearby",
        line={"color": LIGHT["ink"], "width": 2},
        hovertemplate="%{y:.3g} ms",
    )
    top = max(history.step_ms)
    if history.graft_steps:
        figure.add_scatter(
            x=list(history.graft_steps),
            y=[_rounded(top)] * len(history.graft_steps),
            mode="markers",
            name="live path changed",
            marker={"symbol": "triangle-down", "size": 11, "color": LOOKS[SeedStage.GRAFTING].light},
            hovertemplate="step %{x}",
        )
        for step in history.graft_steps:
            figure.add_vline(
                x=step, line={"color": LOOKS[SeedStage.GRAFTING].light, "width": 1.2, "dash": "dot"}, layer="below"
            )
    figure.update_xaxes(title_text="steps")
    ticks = _log_ticks(min(history.step_ms), top)
    figure.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g} ms" for tick in ticks])
    median = statistics.median(history.step_ms)
    changes = (
        f" The live path changed at step {', '.join(map(str, history.graft_steps))}." if history.graft_steps else ""
    )
    caption = f"Median {words.milliseconds(median)}, slowest {words.milliseconds(top)}.{changes} Logarithmic scale."
    return Chart("steps", "Step times", caption, figure, 300)


def _log_ticks(low: float, high: float) -> list[float]:
    start = math.floor(math.log10(max(low, 1e-6)))
    ticks = [m * 10.0**e for e in range(start, math.ceil(math.log10(max(high, 1e-6))) + 1) for m in (1, 2, 5)]
    inside = [tick for tick in ticks if low * 0.8 <= tick <= high * 1.25]
    return inside or [round(high, 3)]


# ---------------------------------------------------------------- shared look


def _figure(*, hovermode: str = "x unified") -> Figure:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="none",
        font={"family": FONT, "size": 13, "color": LIGHT["ink"]},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 52, "r": 22, "t": 14, "b": 44},
        hovermode=hovermode,
        hoverlabel={
            "bgcolor": LIGHT["card"],
            "bordercolor": LIGHT["line"],
            "font": {"color": LIGHT["ink"]},
            "align": "left",
        },
        legend={
            "orientation": "h",
            "y": 1.04,
            "yanchor": "bottom",
            "x": 0,
            "font": {"color": LIGHT["muted"]},
            "traceorder": "normal",
        },
        dragmode=False,
    )
    axis = {
        "gridcolor": LIGHT["line"],
        "linecolor": LIGHT["line"],
        "tickfont": {"color": LIGHT["muted"], "size": 12},
        "title": {"font": {"color": LIGHT["muted"], "size": 12}, "standoff": 8},
        "zeroline": False,
        "fixedrange": True,  # a finger on a chart scrolls the page
    }
    figure.update_xaxes(**axis, showgrid=False, ticks="outside", tickcolor=LIGHT["line"])
    figure.update_yaxes(**axis, automargin=True)
    return figure


def _label(site: str, blueprint: str | None) -> str:
    return html.escape(f"{_cut(site)} {_cut(blueprint)}" if blueprint else _cut(site))


def _cut(text: str) -> str:
    """Shortens a long module path at its front, where paths are alike."""
    return text if len(text) <= _LABEL else "…" + text[-_LABEL + 1 :]


def _wrapped(text: str, width: int = 60) -> str:
    import textwrap

    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, width))


def _rounded(value: float) -> float:
    """Five significant figures: more cannot be seen and would only make the file large."""
    return float(f"{value:.5g}")
