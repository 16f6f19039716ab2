"""What the cells of the exam come to: its rows, its goals, and the table for a README. Trains nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from jobs.bench.harness import Estimate, Goal, goal_above, mean_interval

BETTER = (("gnn", "heuristic"), ("heuristic", "random"))
"""Of each, the first is meant to be no worse on any task, and better over all of them."""


class ExamCell(BaseModel):
    """What one run came to.

    Attributes:
        settings: digest of all that it hangs on; a cell of others is not taken over.
        val, test: the task's headline metric at the end.
        flops: of everything, as a factor of the plain host's epochs.
        tried, kept: adaptations that began, and that became permanent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    policy: str
    seed: int
    settings: str
    val: float
    test: float
    val_loss: float
    flops: float
    params: int
    epochs: int
    tried: int
    kept: int
    seconds: float


Found = Mapping[tuple[str, str], Mapping[int, ExamCell]]
"""Cells by (task, policy) and seed."""


def compare(cells: Sequence[ExamCell]) -> tuple[list[dict[str, Any]], list[Goal]]:
    """The table, a row for each task and policy, and what was promised.

    `beyond` is the mean difference in the test metric to `against`, paired by seed, with its 95% interval and the p
    value of a two-sided paired t-test: of the heuristic to `random`, of all others to the heuristic.
    """
    found: dict[tuple[str, str], dict[int, ExamCell]] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.policy), {})[cell.seed] = cell
    rows = [_row(task, policy, found) for task, policy in found]
    return rows, list(_goals(found))


def markdown(rows: Sequence[Mapping[str, Any]], goals: Sequence[Goal]) -> str:
    """The same for a page: a line for each row, then the goals in words."""
    lines = [
        "| task | policy | seeds | test (95%) | val (95%) | FLOPs | parameters | tried | kept | beyond (95%) | p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    before = None
    for row in rows:
        beyond, p = "", ""
        if row["beyond"] is not None:
            low, high = (_points(float(end)) for end in row["beyond_95"].split(" to "))
            beyond = f"{row['against']} {_points(row['beyond'])} ({low} to {high})"
            p = "" if row["p"] is None else f"{row['p']:g}"
        cells = (
            row["task"] if row["task"] != before else "",
            row["policy"],
            str(row["seeds"]),
            f"{row['test']:.1%} ({_percents(row['test_95'])})",
            f"{row['val']:.1%} ({_percents(row['val_95'])})",
            f"{row['flops']:.2f}",
            str(row["params"]),
            f"{row['tried']:g}",
            f"{row['kept']:g}",
            beyond,
            p,
        )
        lines.append(f"| {' | '.join(cells)} |")
        before = row["task"]
    lines.append("")
    for goal in goals:
        low, high = goal.interval
        reach = f"{_points(low)} to {_points(high)}"
        lines.append(f"- {goal.name}: {_points(goal.value)} ({reach}): {'met' if goal.met else 'not met'}")
    return "\n".join(lines) + "\n"


def spent(cells: Iterable[ExamCell]) -> str:
    """How many FLOPs the runs of each policy took: who spent less did not lose for want of them."""
    found: dict[str, list[float]] = {}
    for cell in cells:
        found.setdefault(cell.policy, []).append(cell.flops)
    words = ", ".join(f"{policy} {statistics.fmean(flops):.2f}" for policy, flops in found.items())
    return f"FLOPs that were spent, in those of the plain host's epochs: {words}."


def over_all(pairs: Sequence[Sequence[float]]) -> Estimate:
    """The mean over tasks of their mean differences, each task of the same weight, with its 95% interval.

    The interval is that of a sum of independent means of different variances (Welch 1947, Satterthwaite 1946).
    """
    from scipy import stats

    num = len(pairs)
    mean = statistics.fmean(statistics.fmean(own) for own in pairs)
    variances = [statistics.variance(own) / len(own) / num**2 for own in pairs]
    whole = math.fsum(variances)
    if whole == 0.0:
        return Estimate(value=mean, low=mean, high=mean, num_samples=num)
    freedom = whole**2 / math.fsum(v**2 / (len(own) - 1) for v, own in zip(variances, pairs, strict=True))
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(whole)
    return Estimate(value=mean, low=mean - reach, high=mean + reach, num_samples=sum(map(len, pairs)))


def _row(task: str, policy: str, found: Found) -> dict[str, Any]:
    own = found[task, policy]
    row: dict[str, Any] = {"task": task, "policy": policy, "seeds": len(own)}
    for part in ("test", "val"):
        figure = mean_interval([getattr(cell, part) for cell in own.values()])
        row[part] = round(figure.value, 4)
        row[f"{part}_95"] = f"{figure.low:.4f} to {figure.high:.4f}"
    row["flops"] = round(statistics.fmean(cell.flops for cell in own.values()), 2)
    row["params"] = round(statistics.fmean(cell.params for cell in own.values()))
    row["tried"] = round(statistics.fmean(cell.tried for cell in own.values()), 1)
    row["kept"] = round(statistics.fmean(cell.kept for cell in own.values()), 1)
    return row | _beside(task, policy, found)


def _beside(task: str, policy: str, found: Found) -> dict[str, Any]:
    from scipy import stats

    # without the heuristic, a table of two compares them
    against = "random" if policy == "heuristic" or (task, "heuristic") not in found else "heuristic"
    row: dict[str, Any] = {"against": None, "beyond": None, "beyond_95": None, "p": None}
    if policy == against or (task, against) not in found:
        return row
    pairs = _pairs(found[task, policy], found[task, against])
    figure = mean_interval(pairs)
    row |= {"against": against, "beyond": round(figure.value, 4)}
    row["beyond_95"] = f"{figure.low:+.4f} to {figure.high:+.4f}"
    if any(pair != pairs[0] for pair in pairs):
        row["p"] = float(f"{stats.ttest_rel(pairs, [0.0] * len(pairs)).pvalue:.2g}")
    return row


def _goals(found: Found) -> Iterable[Goal]:
    tasks = list(dict.fromkeys(task for task, _ in found))
    pairs = BETTER if any(policy == "heuristic" for _, policy in found) else (("gnn", "random"),)
    for better, worse in pairs:
        known = [task for task in tasks if (task, better) in found and (task, worse) in found]
        differences = [_pairs(found[task, better], found[task, worse]) for task in known]
        for task, own in zip(known, differences, strict=True):
            figure = mean_interval(own)
            name = f"{task}: {better} no worse than {worse}, test"
            interval = (figure.low, figure.high)
            yield Goal(name=name, value=figure.value, goal=0.0, met=figure.value >= 0.0, interval=interval)
        if known:
            yield goal_above(f"all tasks: {better} better than {worse}, test", over_all(differences), 0.0)


def _pairs(one: Mapping[int, ExamCell], other: Mapping[int, ExamCell]) -> list[float]:
    return [one[seed].test - other[seed].test for seed in sorted(one.keys() & other.keys())]


def _points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * difference:+.2f}"


def _percents(interval: str) -> str:
    low, high = interval.split(" to ")
    return f"{100 * float(low):.1f} to {100 * float(high):.1f}"
