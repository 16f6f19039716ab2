"""Lays a trained policy beside the heuristic, on seeds that nothing was learned from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from esper.config import RewardConfig, RunConfig
from esper.leyline import PolicyCard
from esper.simic.lessons import lessons_of
from esper.simic.rollouts import NET, Ask, Rollouts, twin_of

JUDGED_FROM = 100_000
"""Seeds from here on are never trained on."""

_WHO = (NET, "drawn", "heuristic")


def judge_beside_heuristic(
    rollouts: Rollouts,
    tasks: Sequence[RunConfig],
    policy: tuple[PolicyCard, bytes],
    prices: RewardConfig,
    *,
    num_seeds: int,
    flops: float | None,
) -> list[dict[str, Any]]:
    """Returns a row for each task: mean returns of the policy as a run would use it, with its own gates (`gnn`), of the
    same net as it draws (`drawn`), of the heuristic, and the paired difference of the first and the last.

    Args:
        rollouts: plays the runs.
        tasks: their configurations.
        policy: card and weights.
        prices: of the reward.
        num_seeds: of each task.
        flops: what a run may spend; see `Ask.flops`.
    """
    return [_row(rollouts, i, tasks[i].name, policy, prices, num_seeds, flops) for i in range(len(tasks))]


def _row(
    rollouts: Rollouts,
    place: int,
    name: str,
    policy: tuple[PolicyCard, bytes],
    prices: RewardConfig,
    num_seeds: int,
    flops: float | None,
) -> dict[str, Any]:
    seeds = range(JUDGED_FROM, JUDGED_FROM + num_seeds)
    own = [Ask(place, seed, NET, *policy, greedy=greedy, flops=flops) for seed in seeds for greedy in (True, False)]
    asks = [*own, *(Ask(place, seed, "heuristic", flops=flops) for seed in seeds)]
    twins = {
        one.ask.seed: twin_of(one.episode)
        for one in rollouts.play([Ask(place, seed, "none") for seed in seeds])
        if one.episode is not None
    }
    totals: Mapping[str, dict[int, float]] = {who: {} for who in _WHO}
    for one in rollouts.play(asks):
        if one.episode is not None and one.ask.seed in twins:
            whole = lessons_of(one.episode, prices, twin=twins[one.ask.seed])
            who = "drawn" if one.ask.policy == NET and not one.ask.greedy else one.ask.policy
            totals[who][one.ask.seed] = whole.total
    both = sorted(set.intersection(*(set(found) for found in totals.values())))
    pairs = [totals[NET][seed] - totals["heuristic"][seed] for seed in both]
    means = {who: _mean([found[seed] for seed in both]) for who, found in totals.items()}
    return {"task": name, "seeds": len(both), **means, "difference": _mean(pairs), "stderr": _stderr(pairs)}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
