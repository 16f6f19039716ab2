"""What growth costs on several workers, and what a graft costs on a large host.

`scale: step`: 1, 2 and 4 workers over gloo on this machine train one model under DDP (one worker: without it, as the
trainer does). In each worker four arms take turns in one run: `plain` is the model, `idle` a copy of it (what it
differs by is noise), `wrapped` the host with dormant seeds, `trainer` that in a session, with governor, ledger and
telemetry at their defaults. Ratios of wall time to `plain`, one a round, median with its 95% interval.

`scale: graft`: hosts of 1e5 to 1e8 parameters, with one site of the same width, take the same kernel in, graft it and
cull it, again and again. `graft` is the time of the boundary on which it is grafted, from Tamiyo's decision until the
next step may begin, in ms; `idle` that of a boundary without a decision. Its parts: `check` (may it be done here),
`attach` (the module's way onto the live path), `group` (of the optimizer), `agree` (of the ranks), `rebuild` (of DDP),
`count` (FLOPs of the new live path, for the ledger), and the `rest`. Beside it, what a graft does
to the steps after it: `first` is the extra of the first step, `watched` the ratio of the steps on which the governor
watches the weights' norm to a usual one. `snapshot` is taken at the end of every epoch, graft or not.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from jobs.bench.harness import BenchResult, Estimate, Goal, machine, median_interval
from jobs.bench.overhead import HOSTS
from jobs.bench.scale_ranks import ARMS, PARTS, GraftJob, Grafts, StepJob, spawned

GOAL = 2.0
"""So many times what it is on the smallest host may a graft cost on the largest, but for DDP's rebuild."""


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Measures steps, then grafts; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench scale", description=__doc__)
    parser.add_argument("--hosts", nargs="*", choices=tuple(HOSTS), default=("cnn", "gpt"), help="of the steps")
    parser.add_argument("--workers", nargs="+", type=int, default=(1, 2, 4), help="of the steps")
    parser.add_argument("--rounds", type=int, default=60, help="of the steps, at least 10 (default 60)")
    parser.add_argument(
        "--steps", type=int, default=4, help="of one block, two of which make an arm's round (default 4)"
    )
    parser.add_argument("--sizes", nargs="*", type=float, default=(1e5, 1e6, 1e7, 1e8), help="parameters of the hosts")
    parser.add_argument("--graft-workers", nargs="+", type=int, default=(1, 2), help="of the grafts")
    parser.add_argument("--grafts", type=int, default=12, help="onto each host (default 12)")
    options = parser.parse_args(arguments)
    if options.rounds < 10 or min((*options.workers, *options.graft_workers, options.steps, options.grafts)) < 1:
        parser.error("at least 10 rounds, and 1 of everything else")
    rows: list[dict[str, Any]] = []
    for host in options.hosts:
        for workers in options.workers:
            rows += step_rows(host, workers, spawned(StepJob(host, options.rounds, options.steps), workers))
            say(f"{host}, {workers} workers: " + ", ".join(f"{row['arm']} {row['ratio']:.3f}" for row in rows[-3:]))
    grafts: dict[tuple[int, float], Grafts] = {}
    for workers in options.graft_workers:
        for size in sorted(options.sizes):
            found = Grafts(**spawned(GraftJob(int(size), options.grafts), workers))
            grafts[workers, size] = found
            say(f"{size:.0e} parameters, {workers} workers: a graft takes {statistics.median(found.whole):.1f} ms")
    facts = machine()
    parts = (
        BenchResult(name="scale: step", machine=facts, rows=tuple(rows)),
        BenchResult(
            name="scale: graft",
            machine=facts,
            rows=tuple(graft_row(workers, found) for (workers, _), found in grafts.items()),
            goals=tuple(goals_of(grafts)),
        ),
    )
    return BenchResult(name="scale", machine=facts, parts=tuple(part for part in parts if part.rows))


def step_rows(host: str, workers: int, found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row an arm: its time over that of `plain` in the same round, with its interval."""
    rows = []
    for arm in ARMS[1:]:
        ratios = [one / base for one, base in zip(found[arm], found["plain"], strict=True)]
        estimate = median_interval(ratios)
        rows.append(
            {
                "host": host, "workers": workers, "arm": arm, "ratio": round(estimate.value, 4),
                "low": round(estimate.low, 4), "high": round(estimate.high, 4), "rounds": estimate.num_samples,
                "plain ms": round(statistics.median(found["plain"]), 2),
            }
        )  # fmt: skip
    return rows


def graft_row(workers: int, found: Grafts) -> dict[str, Any]:
    """Medians of one host, with the interval of the whole."""
    whole, idle = median_interval(found.whole), statistics.median(found.idle)
    rest = [one - sum(found.parts[part][n] for part in PARTS) for n, one in enumerate(found.whole)]
    usual = statistics.median(found.usual)
    return {
        "workers": workers, "params": found.params, "tensors": found.tensors, "graft": round(whole.value, 2),
        "low": round(whole.low, 2), "high": round(whole.high, 2), "idle": round(idle, 2),
        **{part: round(statistics.median(found.parts[part]), 2) for part in PARTS},
        "rest": round(statistics.median(rest), 2), "step": round(usual, 2),
        "first": round(statistics.median(found.first) - usual, 2),
        "watched": round(statistics.median(found.watched) / usual, 3),
        "snapshot": round(statistics.median(found.snapshots), 2), "grafts": len(found.whole),
    }  # fmt: skip


def goals_of(grafts: dict[tuple[int, float], Grafts]) -> list[Goal]:
    """For each number of workers: a graft without DDP's rebuild, on the largest host over that on the smallest."""
    goals = []
    for workers in sorted({workers for workers, _ in grafts}):
        sizes = sorted(size for one, size in grafts if one == workers)
        if len(sizes) < 2:
            continue
        small, large = (_without_rebuild(grafts[workers, size]) for size in (sizes[0], sizes[-1]))
        value = large.value / small.value
        goals.append(
            Goal(
                name=f"graft but for the rebuild, {sizes[-1]:.0e} over {sizes[0]:.0e} parameters, {workers} workers",
                value=value,
                goal=GOAL,
                met=value <= GOAL,
                interval=(large.low / small.high, large.high / small.low),
            )
        )
    return goals


def _without_rebuild(found: Grafts) -> Estimate:
    return median_interval(
        [whole - rebuild for whole, rebuild in zip(found.whole, found.parts["rebuild"], strict=True)]
    )
