"""Rows and trees as text for a terminal."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], nothing: str) -> str:
    """Rows as text, a column a key; numbers stand to the right. `nothing` is said where there are none."""
    if not rows:
        return nothing
    columns = [[key, *(cell(key, row[key]) for row in rows)] for key in rows[0]]
    widths = [max(map(len, column)) for column in columns]
    is_number = [
        not key.endswith("_at") and all(isinstance(row[key], int | float | None) for row in rows) for key in rows[0]
    ]
    lines = zip(*columns, strict=True)
    return "\n".join(
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in lines
    )


def cell(key: str, value: Any) -> str:
    """One value; keys that end with `_at` are times."""
    if value is None:
        return "-"
    if key.endswith("_at"):
        return time_of(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def time_of(seconds: float) -> str:
    """Seconds since the epoch as UTC."""
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC).isoformat(sep=" ", timespec="seconds")[:19]


def fields(values: Mapping[str, Any]) -> str:
    """One thing as text, a line a key; what is empty is left out."""
    shown = {key: cell(key, value) for key, value in values.items() if value not in (None, "", (), [])}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{key.ljust(width)}  {text}" for key, text in shown.items())
