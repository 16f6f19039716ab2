"""What a run counts beside others of its own kind: the same task, and the same seed. Pure numpy."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from esper.simic.ppo import Samples
from esper.simic.settings import ImitationConfig


def advantages_of(runs: Sequence[tuple[Hashable, int, float]]) -> np.ndarray:
    """Returns what each run came to beyond the mean of its task and seed, in deviations of its task, (N,); 0 where all
    runs of a task came to the mean of their seed.

    Args:
        runs: task, seed and return of each.
    """
    totals = np.array([total for _, _, total in runs], dtype=float)
    beyond = totals - _means(totals, [(task, seed) for task, seed, _ in runs])
    spread = np.sqrt(_means(beyond**2, [task for task, _, _ in runs]))
    return np.divide(beyond, spread, out=np.zeros_like(beyond), where=spread > 1e-8)


def run_weights(runs: Sequence[tuple[int, int, float]], config: ImitationConfig) -> list[float]:
    """Returns what each run counts where it is imitated: 1 on the average over those of a task.

    Args:
        runs: task, seed and return of each.
        config: `temperature` and `max_weight`.
    """
    if config.temperature is None:
        return [1.0] * len(runs)
    tasks = [task for task, _, _ in runs]
    raw = np.exp(np.minimum(advantages_of(runs) / config.temperature, 50.0))
    raw = np.minimum(raw / _means(raw, tasks), config.max_weight)
    return (raw / _means(raw, tasks)).tolist()


def levelled(samples: Sequence[Samples], beyond: Sequence[float], groups: Sequence[str]) -> list[Samples]:
    """Returns samples of episodes whose advantages compare.

    Args:
        samples: of each episode.
        beyond: what each came to beyond the value of its beginning.
        groups: of each, `task/seed`. Of an advantage is taken off the mean of `beyond` of the others in its group; no
            choice of this episode had a part in that. Those of a task are divided by their own spread.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        members[group].append(place)
    found = []
    for place, (one, group) in enumerate(zip(samples, groups, strict=True)):
        others = [beyond[i] for i in members[group] if i != place]
        found.append(one.advantages - (math.fsum(others) / len(others) if others else 0.0))
    tasks: dict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        tasks[group.partition("/")[0]].append(place)
    for places in tasks.values():
        spread = float(np.sqrt(np.mean(np.concatenate([found[i] for i in places]) ** 2)))
        for i in places:
            found[i] = found[i] / spread if spread > 1e-8 else np.zeros_like(found[i])
    return [replace(one, advantages=advantages) for one, advantages in zip(samples, found, strict=True)]


def _means(values: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """The mean of each value's group, (N,)."""
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    of = np.array([places[group] for group in groups], dtype=np.int64)
    return (np.bincount(of, weights=values) / np.bincount(of))[of] if len(values) else values
