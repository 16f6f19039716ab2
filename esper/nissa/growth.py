"""Growth over time as a picture: score, loss and parameters over the epochs, and what changed the network.

The curves are SVG that stretches with its place; axes are words beside them, so that they stay readable on a phone.
Colours come from the page's style sheet by class, so that one drawing serves both themes.
"""

# ruff: noqa: E501 (HTML and SVG read best with an element a line)
from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esper.leyline.seeds import SeedStage
from esper.nissa import words
from esper.nissa.stages import css_name, word
from esper.nissa.viewmodel import LiveView, Note, Point

_WIDTH, _HEIGHT = 1000, 260
_MAX_MARKS = 160
MARKED = (SeedStage.GRAFTING, SeedStage.FOSSILIZED, SeedStage.CULLED, SeedStage.ROLLED_BACK)
"""What is marked on the curves."""
_TOLD_MARKS = 6


@dataclass(frozen=True)
class _Curve:
    name: str
    css: str
    points: Sequence[tuple[float, float]]
    is_stepped: bool = False


@dataclass(frozen=True)
class _Mark:
    x: float
    stage: SeedStage


def panels(view: LiveView, notes: Sequence[Note]) -> str:
    """The three pictures as HTML; one without data is left out."""
    points = view.points
    if not points:
        return '<p class="muted">No epoch has ended yet.</p>'
    first, last = float(points[0].epoch), float(points[-1].epoch + 1)
    marks = _marks(view, notes, first, last)
    name = view.last.metric_name if view.last else None

    def metric(value: float) -> str:
        return words.metric(name, value)

    drawn = [
        _panel(
            words.metric_name(name).capitalize(),
            [_curve(points, "train_metric", "training"), _curve(points, "val_metric", "validation")],
            metric,
            marks,
            (first, last),
        ),
        _panel(
            "Loss",
            [_curve(points, "train_loss", "training"), _curve(points, "val_loss", "validation", css="loss")],
            words.loss,
            marks,
            (first, last),
        ),
        _panel(
            "Parameters",
            [_sizes(view)],
            lambda value: f"{value:,.0f}",
            marks,
            (first, last),
            from_zero=True,
        ),
    ]
    return f'<div class="panels">{"".join(drawn)}</div>{_key(marks, notes)}'


def _curve(points: Sequence[Point], key: str, name: str, *, css: str = "val") -> _Curve:
    found = [(p.epoch + 1.0, float(v)) for p in points if (v := getattr(p, key)) is not None]
    return _Curve(name, css if name == "validation" else "train", found)


def _sizes(view: LiveView) -> _Curve:
    points = [(p.epoch + 1.0, float(p.params)) for p in view.points if p.params]
    start = [(0.0, float(view.params_start))] if view.params_start and view.points[0].epoch == 0 else []
    return _Curve("live path", "size", [*start, *points], is_stepped=True)


def _marks(view: LiveView, notes: Sequence[Note], first: float, last: float) -> list[_Mark]:
    """The latest that changed the network, one a place and kind."""
    found: dict[tuple[int, SeedStage], _Mark] = {}
    for note in notes:
        if (stage := note.stage) is not None and stage in MARKED:
            x = note.step / view.steps_per_epoch if view.steps_per_epoch and note.step else note.epoch + 1.0
            if first <= x <= last:
                found[round(200 * x / last), stage] = _Mark(x, stage)
    return list(found.values())[-_MAX_MARKS:]


def _panel(
    title: str,
    curves: Sequence[_Curve],
    write: Callable[[float], str],
    marks: Sequence[_Mark],
    span: tuple[float, float],
    *,
    from_zero: bool = False,
) -> str:
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return ""
    values = [y for curve in drawn for _, y in curve.points]
    low, high = 0.0 if from_zero else min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    low, high = low if from_zero else low - room, high + room
    scale = _Scale(span, (low, high))
    lines = "".join(_line(curve, scale) for curve in drawn)
    ticks = [high - room, (low + high) / 2, low if from_zero else low + room]
    grid = "".join(f'<path class="rule" d="M0 {scale.y(tick):.1f}H{_WIDTH}"/>' for tick in ticks)
    stems = "".join(
        f'<path class="mark s-{css_name(mark.stage)}" d="M{scale.x(mark.x):.1f} 0V{_HEIGHT}"/>' for mark in marks
    )
    main = drawn[-1]
    begun, now = main.points[0][1], main.points[-1][1]
    told = f"{main.name}, from {write(begun)}" if len(main.points) > 1 else main.name
    others = ", ".join(f"{curve.name} {write(curve.points[-1][1])}" for curve in drawn[:-1])
    ys = "".join(f"<span>{html.escape(write(tick))}</span>" for tick in ticks)
    label = f"{title}: {main.name} from {write(begun)} to {write(now)} over epochs {span[0] + 1:g} to {span[1]:g}"
    return (
        f'<figure class="panel"><figcaption><h3>{html.escape(title)}</h3><b>{html.escape(write(now))}</b>'
        f"<span>{html.escape(told)}{f' · {html.escape(others)}' if others else ''}</span></figcaption>"
        f'<div class="plot"><div class="ys" aria-hidden="true">{ys}</div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{html.escape(label)}">'
        f"{grid}{stems}{lines}</svg>"
        f'<div class="xs" aria-hidden="true"><span>{span[0]:g}</span><span>epoch {span[1]:g}</span></div></div></figure>'
    )


RUN_STYLES = tuple(f"run-{i}" for i in range(6))
"""Of runs that are compared: each has a colour and a dash of its own in `pictures.css`."""


def overlay(views: Sequence[LiveView]) -> str:
    """Several runs on the same axes; a metric of another name than the first run's is left out of the first panel."""
    names = [view.last.metric_name if view.last else None for view in views]
    name = next((one for one in names if one is not None), None)
    last = max((float(view.points[-1].epoch + 1) for view in views if view.points), default=0.0)
    if not last:
        return '<p class="muted">No epoch has ended yet.</p>'

    def curves(key: str, *, only: str | None = None) -> list[_Curve]:
        return [
            _Curve(view.run_id, css, _curve(view.points, key, view.run_id).points)
            for view, css, metric in zip(views, RUN_STYLES, names, strict=False)
            if only is None or metric == only
        ]

    sizes = [
        _Curve(view.run_id, css, _sizes(view).points if view.points else [], is_stepped=True)
        for view, css in zip(views, RUN_STYLES, strict=False)
    ]
    drawn = [
        _panel(
            f"Validation {words.metric_name(name)}",
            curves("val_metric", only=name),
            lambda value: words.metric(name, value),
            (),
            (0.0, last),
        ),
        _panel("Validation loss", curves("val_loss"), words.loss, (), (0.0, last)),
        _panel("Training loss", curves("train_loss"), words.loss, (), (0.0, last)),
        _panel("Parameters", sizes, lambda value: f"{value:,.0f}", (), (0.0, last), from_zero=True),
    ]
    key = "".join(
        f'<li><i class="{css} swatch"></i>{html.escape(view.run_id)}</li>'
        for view, css in zip(views, RUN_STYLES, strict=False)
    )
    return f'<div class="panels two">{"".join(drawn)}</div><ul class="key" aria-label="The runs">{key}</ul>'


class _Scale:
    """From epochs and values to the drawing."""

    def __init__(self, across: tuple[float, float], up: tuple[float, float]) -> None:
        self._x0, self._width = across[0], (across[1] - across[0]) or 1.0
        self._y0, self._height = up[0], (up[1] - up[0]) or 1.0

    def x(self, value: float) -> float:
        return (value - self._x0) / self._width * _WIDTH

    def y(self, value: float) -> float:
        return _HEIGHT - (value - self._y0) / self._height * _HEIGHT


def _line(curve: _Curve, scale: _Scale) -> str:
    dots = [(scale.x(x), scale.y(y)) for x, y in curve.points]
    if curve.is_stepped:  # a network has one size until it changes
        steps = "".join(f"V{y:.1f}H{x:.1f}" for x, y in dots[1:])
        path = f"M{dots[0][0]:.1f} {dots[0][1]:.1f}{steps}" if len(dots) > 1 else f"M0 {dots[0][1]:.1f}H{_WIDTH}"
        start = f"M{dots[0][0]:.1f} {_HEIGHT}V{dots[0][1]:.1f}{steps}V{_HEIGHT}Z"
        area = f'<path class="area" d="{start}"/>' if curve.css == "size" else ""
        return f'{area}<path class="line {curve.css}" d="{path}"/>'
    if len(dots) == 1:
        return f'<path class="dot {curve.css}" d="M{dots[0][0]:.1f} {dots[0][1]:.1f}h0"/>'
    return f'<path class="line {curve.css}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in dots)}"/>'


def _key(marks: Sequence[_Mark], notes: Sequence[Note]) -> str:
    if not marks:
        return '<p class="muted key">Nothing has changed the network so far.</p>'
    stages = [stage for stage in MARKED if any(mark.stage is stage for mark in marks)]
    items = "".join(f'<li><i class="tick s-{css_name(stage)}"></i>{word(stage)}</li>' for stage in stages)
    changes = [note for note in notes if note.stage in MARKED][-_TOLD_MARKS:]
    said = "; ".join(f"{note.subject}: {note.text}, epoch {note.epoch + 1}" for note in changes)
    return (
        f'<ul class="key" aria-label="Marks on the curves">{items}</ul><p class="sr">Latest: {html.escape(said)}.</p>'
    )


def epochs_table(view: LiveView, last: int = 60) -> str:
    """The figures behind the curves, the latest epochs first."""
    name = view.last.metric_name if view.last else None
    heads = ("Epoch", "Training loss", "Validation loss", f"Validation {words.metric_name(name)}", "Parameters")
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{p.epoch + 1}</th><td>{words.loss(p.train_loss)}</td><td>{words.loss(p.val_loss)}</td>'
        f"<td>{words.metric(name, p.val_metric)}</td><td>{p.params:,}</td></tr>"
        for p in itertools.islice(reversed(view.points), last)
    )
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
