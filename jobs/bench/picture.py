"""Curves with intervals as one small SVG, for a page or a README: no script, no font, no dependency."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from esper.nissa.palette import LIGHT

WIDTH, HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 72, 48
_COLORS = ("accent", "loss", "warn", "shadow")
_SHAPES = ("", "7 4", "2 4", "9 3 2 3")
"""Dashes, so that curves are told apart without their colours."""


@dataclass(frozen=True)
class Mark:
    """One point with its interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Points of one kind, joined in the order of x."""

    name: str
    marks: tuple[Mark, ...]


def draw(title: str, curves: Sequence[Curve], *, x: str, y: str, level: tuple[str, float] | None = None) -> str:
    """Draws curves.

    Args:
        title: above the picture.
        curves: at most four, each with a point or more.
        x: what the horizontal axis shows; it begins at 0.
        y: unit of the vertical axis.
        level: name and height of a line across.
    """
    scale = _Scale(curves, level)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="13" '
        f'font-family="system-ui, sans-serif" fill="{LIGHT["ink"]}">'
    )
    lines = [
        head,
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{LIGHT["card"]}"/>',
        _text(_LEFT, 24, title, weight="600"),
        *_axes(scale, x, y),
    ]
    if level is not None:
        name, height = level
        lines.append(_line(_LEFT, scale.y(height), WIDTH - _RIGHT, scale.y(height), "muted", "4 4"))
        lines.append(_text(WIDTH - _RIGHT, scale.y(height) - 5, f"{name} {height:.1f}{y}", anchor="end"))
    across = (WIDTH - _LEFT - _RIGHT) / max(1, len(curves))
    for number, curve in enumerate(curves):
        color, dash, left = _COLORS[number], _SHAPES[number], _LEFT + number * across
        lines.append(_line(left, 46, left + 26, 46, color, dash, width=2.4))
        lines.append(_text(left + 32, 50, curve.name))
        lines.extend(_curve(curve, scale, color, dash))
    return "\n".join([*lines, "</svg>", ""])


class _Scale:
    """From figures to places."""

    def __init__(self, curves: Sequence[Curve], level: tuple[str, float] | None) -> None:
        marks = [mark for curve in curves for mark in curve.marks]
        heights = [figure for mark in marks for figure in (mark.low, mark.high)]
        heights += [] if level is None else [level[1]]
        self.x_ticks = _ticks(0.0, max(mark.x for mark in marks))
        self.y_ticks = _ticks(min(heights), max(heights))

    def x(self, value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / self.x_ticks[-1]

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)


def _ticks(low: float, high: float) -> list[float]:
    """Round figures around a range, about six."""
    span = max(high - low, 1e-9)
    unit = 10.0 ** math.floor(math.log10(span / 5))
    unit *= next(factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [number * unit for number in range(first, max(last, first + 1) + 1)]


def _axes(scale: _Scale, x: str, y: str) -> list[str]:
    drawn = []
    for tick in scale.y_ticks:
        drawn.append(_line(_LEFT, scale.y(tick), WIDTH - _RIGHT, scale.y(tick), "line"))
        drawn.append(_text(_LEFT - 8, scale.y(tick) + 4, f"{tick:g}{y}", anchor="end", color="muted"))
    below = HEIGHT - _BOTTOM + 18
    drawn += [_text(scale.x(tick), below, f"{tick:g}", anchor="middle", color="muted") for tick in scale.x_ticks]
    drawn.append(_text((WIDTH + _LEFT - _RIGHT) / 2, HEIGHT - 10, x, anchor="middle", color="muted"))
    return drawn


def _curve(curve: Curve, scale: _Scale, color: str, dash: str) -> list[str]:
    marks = sorted(curve.marks, key=lambda mark: mark.x)
    path = " ".join(f"{scale.x(mark.x):.1f},{scale.y(mark.y):.1f}" for mark in marks)
    drawn = [
        f'<polyline points="{path}" fill="none" stroke="{LIGHT[color]}" stroke-width="2.4" stroke-dasharray="{dash}"/>'
    ]
    for mark in marks:
        where = scale.x(mark.x)
        drawn.append(_line(where, scale.y(mark.low), where, scale.y(mark.high), color, width=1.4))
        drawn.append(f'<circle cx="{where:.1f}" cy="{scale.y(mark.y):.1f}" r="4" fill="{LIGHT[color]}"/>')
    return drawn


def _line(x1: float, y1: float, x2: float, y2: float, color: str, dash: str = "", *, width: float = 1.0) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{LIGHT[color]}" '
        f'stroke-width="{width}" stroke-dasharray="{dash}"/>'
    )


def _text(x: float, y: float, words: str, *, anchor: str = "start", color: str = "ink", weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{LIGHT[color]}" font-weight="{weight}">'
        f"{html.escape(words)}</text>"
    )
