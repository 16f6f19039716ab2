"""How benchmarks measure and what they report. Figures are ratios of CPU time, taken side by side in one process."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

HALF_WIDTH = 0.01
"""A goal that lies inside the interval is met if the interval is no wider than this on each side."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Model):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float
    num_samples: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


class Goal(_Model):
    """A figure that was promised, and whether it is met."""

    name: str
    value: float
    goal: float
    met: bool
    interval: tuple[float, float]


class BenchResult(_Model):
    """What a benchmark found: the documented form of `esper bench NAME --json`.

    Attributes:
        rows: one measurement each; all rows have the same keys.
        verdict: the result in words, where figures alone would mislead.
        parts: the benchmarks that this one consists of, each with its own table.
    """

    name: str
    machine: dict[str, str]
    rows: tuple[dict[str, Any], ...] = ()
    goals: tuple[Goal, ...] = ()
    verdict: str = ""
    parts: tuple[BenchResult, ...] = ()


def interleaved(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    rounds: int,
    block_s: float = 0.004,
    multiple: int = 1,
    seed: int = 0,
) -> Estimate:
    """Measures how much CPU time `b` takes, as a ratio to `a`.

    A round is four short blocks in the order a b b a, so that what disturbs the machine disturbs both, and a drift
    cancels. Both are warmed up first.

    Args:
        a: one call of the base.
        b: one call of what is compared; comparable work.
        rounds: at least 10.
        block_s: CPU seconds of one block, about; at least one call.
        multiple: calls of a block are a multiple of this, for work that comes every so many calls.
        seed: of the bootstrap.

    Returns:
        The median ratio over rounds, with a bootstrap interval.
    """
    if rounds < 10:
        raise ValueError(f"{rounds} rounds give no interval; at least 10")
    calls = _calibrate(a, b, block_s, multiple)
    ratios = []
    gc_was_on = gc.isenabled()
    gc.disable()  # a collection would fall into one block or the other
    try:
        for _ in range(rounds):
            a_first, b_first, b_last, a_last = (_cpu_seconds(call, calls) for call in (a, b, b, a))
            ratios.append((b_first + b_last) / (a_first + a_last))
    finally:
        if gc_was_on:
            gc.enable()
    return median_interval(ratios, seed=seed)


def median_interval(samples: Sequence[float], *, seed: int = 0, draws: int = 4000) -> Estimate:
    """The median of independent samples, with its 95% percentile bootstrap interval (Efron 1979)."""
    values = np.asarray(samples, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return Estimate(value=statistics.median(samples), low=float(low), high=float(high), num_samples=len(samples))


def mean_interval(samples: Sequence[float]) -> Estimate:
    """The mean of paired differences, with its 95% interval by Student's t; needs two samples."""
    from scipy import stats

    values = np.asarray(samples, dtype=float)
    mean, stderr = float(values.mean()), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * stderr
    return Estimate(value=mean, low=mean - reach, high=mean + reach, num_samples=len(values))


def goal_at_most(name: str, estimate: Estimate, goal: float) -> Goal:
    """Met when the interval lies below the goal, or includes it and is narrow."""
    includes = estimate.low <= goal <= estimate.high
    met = estimate.high < goal or (includes and estimate.half_width <= HALF_WIDTH)
    return Goal(name=name, value=estimate.value, goal=goal, met=met, interval=(estimate.low, estimate.high))


def goal_above(name: str, estimate: Estimate, goal: float) -> Goal:
    """Met when the whole interval lies above the goal."""
    met = estimate.low > goal
    return Goal(name=name, value=estimate.value, goal=goal, met=met, interval=(estimate.low, estimate.high))


def machine() -> dict[str, str]:
    """What the figures were taken on; no names of hosts or people."""
    facts = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return facts | {name: metadata.version(name) for name in ("torch", "numpy")}


def show(result: BenchResult) -> None:
    """Prints the result as tables, those of its parts first."""
    for part in result.parts:
        show(part)
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    table = Table(title=f"bench {result.name}", caption=facts, title_justify="left", caption_justify="left")
    shown = [key for key in (result.rows[0] if result.rows else ()) if any(row[key] is not None for row in result.rows)]
    for key in shown:
        table.add_column(key, no_wrap=True)
    for row in result.rows:
        table.add_row(*(_cell(row[key]) for key in shown))
    if not console.is_terminal:  # a file or a pipe has no edge at which figures would be cut
        console = Console(width=max(80, Console(width=10_000).measure(table).maximum))
    if result.rows:
        console.print(table)
    for goal in result.goals:
        state = "met" if goal.met else "not met"
        low, high = goal.interval
        console.print(
            f"{goal.name}: {goal.value:.4f} [{low:.4f}, {high:.4f}], goal {goal.goal:g}: {state}", markup=False
        )
    if result.verdict:
        console.print(result.verdict, markup=False)


def _calibrate(a: Callable[[], object], b: Callable[[], object], block_s: float, multiple: int) -> int:
    for _ in range(max(5, multiple)):
        a()
        b()
    one = _cpu_seconds(a, 3) / 3
    return multiple * max(1, round(block_s / max(one, 1e-7) / multiple))


def _cpu_seconds(call: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        call()
    return time.process_time() - start


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
