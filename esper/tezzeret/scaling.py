"""How many workers a pool should have: a pure decision from what is to be done and who is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

WORK_PER_WORKER_S = 15.0
"""A worker more is worth its start-up (seconds, and 200 MB) where each of those there has so much before it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a pool.

    Attributes:
        min_workers: that stay without work.
        max_workers: at most.
        idle_s: a worker beyond the least goes after so long without work.
    """

    min_workers: int = 1
    max_workers: int = 2
    idle_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers:
            raise ValueError(f"{self.min_workers} to {self.max_workers} workers")


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be compiled.

    Attributes:
        num_jobs: that wait or are under way.
        work_s: seconds that one worker would take for them.
    """

    num_jobs: int = 0
    work_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Resize:
    """What to change.

    Attributes:
        start: so many more.
        stop: these.
    """

    start: int = 0
    stop: tuple[str, ...] = ()


def resize(demand: Demand, idle_s: Mapping[str, float], bounds: Bounds) -> Resize:
    """Decides how a pool changes.

    It grows at once, to as many as each have `WORK_PER_WORKER_S` before them and never more than there are jobs. It
    shrinks by who has been idle for `Bounds.idle_s`, the longest idle first, and only while that is not too few.

    Args:
        demand: what is to be done.
        idle_s: of each worker that is there, by name: seconds without work; 0 while it works or starts.
        bounds: of the pool.
    """
    enough = min(demand.num_jobs, math.ceil(demand.work_s / WORK_PER_WORKER_S), bounds.max_workers)
    wanted = max(bounds.min_workers, enough)
    if len(idle_s) < wanted:
        return Resize(start=wanted - len(idle_s))
    longest = sorted(idle_s, key=lambda name: (-idle_s[name], name))
    surplus = longest[: len(idle_s) - wanted]
    return Resize(stop=tuple(name for name in surplus if idle_s[name] >= bounds.idle_s))
