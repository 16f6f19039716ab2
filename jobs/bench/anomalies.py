"""How well Nissa tells faults from what a run does by itself: precision, recall, delay, and false alarms an hour.

Made-up runs (see `streams`), of seeds that nothing was tuned on: clean ones, and ones with one fault each. An alert is
right if its kind names the fault, its place is the fault's, and it begins while the fault lasts or just after. A fault
is found if one alert is right.

    precision = right alerts / all alerts       recall = faults found / faults

The cost is measured on the clean runs: microseconds of CPU for each step's telemetry, all detectors together.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from esper.leyline.alerts import Alert
from esper.leyline.bus import BusStats
from esper.nissa.anomalies import Watch
from jobs.bench.harness import BenchResult, Goal, machine
from jobs.bench.streams import FAULTS, GROUP_FAULTS, SITE_FAULTS, Episode, Fault, episode

FIRST_SEED = 100_000
"""Tuned was on seeds below."""
GRACE_S = 60.0
PRECISION, RECALL, FALSE_AN_HOUR = 0.9, 0.9, 1.0


@dataclass
class Score:
    """What came of the episodes of one kind."""

    faults: int = 0
    found: int = 0
    right: int = 0
    wrong: list[Alert] = field(default_factory=list)
    hours: float = 0.0
    delays_s: list[float] = field(default_factory=list)
    ended: int = 0
    signals: int = 0
    seconds: float = 0.0

    @property
    def precision(self) -> float:
        told = self.right + len(self.wrong)
        return self.right / told if told else 1.0

    @property
    def recall(self) -> float:
        return self.found / self.faults if self.faults else 1.0

    def add(self, other: Score) -> None:
        """Takes another one's counts in."""
        for name in ("faults", "found", "right", "wrong", "hours", "delays_s", "ended", "signals", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def is_right(alert: Alert, told_at: float, fault: Fault, grace_s: float) -> bool:
    """Whether an alert names a fault."""
    place = (alert.site if fault.name in SITE_FAULTS else alert.group if fault.name in GROUP_FAULTS else "") or ""
    return alert.kind in fault.kinds and place == fault.place and fault.begin - 1.0 <= told_at <= fault.end + grace_s


def judge(made: Episode, *, grace_s: float = GRACE_S) -> Score:
    """Watches one episode."""
    score, watch = Score(hours=made.hours, faults=int(made.fault is not None)), Watch()
    begun: dict[str, tuple[Alert, float]] = {}
    began = time.process_time()
    for at, body in made.signals:
        told = watch.look(body, at) if isinstance(body, BusStats) else watch.apply(body, at)
        for alert in told:
            begun.setdefault(alert.alert_id, (alert, at))
            score.ended += not alert.is_open
    score.seconds = time.process_time() - began
    score.signals = sum(len(getattr(body, "losses", ())) for _, body in made.signals)
    right = [at for alert, at in begun.values() if made.fault is not None and is_right(alert, at, made.fault, grace_s)]
    score.right = len(right)
    score.wrong = [
        alert for alert, at in begun.values() if made.fault is None or not is_right(alert, at, made.fault, grace_s)
    ]
    if made.fault is not None and right:
        score.found, score.delays_s = 1, [max(min(right) - made.fault.begin, 0.0)]
    return score


def evaluate(
    names: Iterable[str | None], seeds: Iterable[int], *, hours: float, say: Callable[[str], None] = lambda _: None
) -> dict[str | None, Score]:
    """Scores by fault; None is the clean runs."""
    scores: dict[str | None, Score] = {}
    seeds = list(seeds)
    for name in names:
        score = scores[name] = Score()
        for seed in seeds:
            # the far side of an epoch: health and cache are told once an epoch
            made = episode(seed, hours=hours, fault=name)
            score.add(judge(made, grace_s=GRACE_S + 3 * hours * 3600 / 30))
        say(f"{name or 'clean'}: recall {score.recall:.2f}, precision {score.precision:.2f}, {len(score.wrong)} wrong")
    return scores


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="esper bench anomalies", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=20, help="runs of each fault")
    parser.add_argument("--clean-hours", type=int, default=30, help="clean runs of one hour each")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="of the runs")
    options = parser.parse_args(arguments)
    first = options.first_seed
    scores = evaluate(FAULTS, range(first, first + options.episodes), hours=0.5, say=say)
    clean = evaluate([None], range(first, first + options.clean_hours), hours=1.0, say=say)[None]
    rows = tuple(_row(name or "clean", score) for name, score in [*scores.items(), (None, clean)])
    together = Score()
    for score in scores.values():
        together.add(score)
    an_hour = len(clean.wrong) / clean.hours
    cost = 1e6 * clean.seconds / clean.signals
    goals = (
        _at_least("precision on all faults together", together.precision, PRECISION),
        _at_least("recall on all faults together", together.recall, RECALL),
        _at_least("lowest recall of a fault", min(score.recall for score in scores.values()), RECALL),
        Goal(name="false alarms in a clean hour", value=an_hour, goal=FALSE_AN_HOUR, met=an_hour <= FALSE_AN_HOUR,
             interval=(an_hour, an_hour)),
    )  # fmt: skip
    verdict = f"{cost:.1f} microseconds of CPU a step, all detectors together, over {clean.signals:,} steps"
    return BenchResult(name="anomalies", machine=machine(), rows=rows, goals=goals, verdict=verdict)


def _at_least(name: str, value: float, goal: float) -> Goal:
    return Goal(name=name, value=value, goal=goal, met=value >= goal, interval=(value, value))


def _row(name: str, score: Score) -> dict[str, object]:
    return {
        "fault": name,
        "runs": score.faults or None,
        "hours": score.hours,
        "precision": score.precision if score.faults else None,
        "recall": score.recall if score.faults else None,
        "delay_s": statistics.median(score.delays_s) if score.delays_s else None,
        "longest_s": max(score.delays_s, default=None),
        "wrong": len(score.wrong),
        "wrong_an_hour": len(score.wrong) / score.hours,
    }
