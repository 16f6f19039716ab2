"""A policy from logged runs alone: nothing is played for it.

What a run came to is judged by other logged runs of the same task and seed: by one that did not grow (policy `none`)
where there is such a run, which is the truth of what growth was worth (`reward.whole_gain`), else by the mean of the
others. Shadow evidence would be in every run, but pays nothing while the host still learns (docs/adr/0018). Rents and
prices are those of `reward`.

Then three steps, of which the last two may be left out:

1. All runs are cloned, so that how probable each choice was is known of every policy, those too that have no
   probabilities (`behaviour`).
2. Runs are imitated again, each as often as `exp(advantage / temperature)` says, `max_weight` at most:
   advantage-weighted regression (Peng et al. 2019) with whole runs for samples. The advantage is over the mean of the
   run's group, in deviations of its task.
3. Updates of PPO from the same runs, with V-trace's truncated ratios between the net and the behaviour. Runs that are
   worth less than `ppo.min_effective` of fresh ones (Kish) are left out, and nothing is updated once all are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from esper.config import PositiveFloat, RewardConfig, Section
from esper.leyline import DataError
from esper.leyline.policies import PolicyCard, PolicyOrigin
from esper.simic.experience import code_digest
from esper.simic.gae import effective_share
from esper.simic.imitation import imitate
from esper.simic.lessons import Lessons, lessons_of, split
from esper.simic.moments import Episode
from esper.simic.ppo import Ppo, Samples
from esper.simic.reward import Twin
from esper.simic.rollouts import NET, twin_of
from esper.simic.sampling import estimates_again, evaluated, forecasts, joined, samples_of
from esper.simic.settings import ImitationConfig, PpoConfig
from esper.simic.weighing import advantages_of
from esper.tamiyo.batch import collate
from esper.tamiyo.calibration import teach
from esper.tamiyo.net import PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.tamiyo.shape import NetShape


class OfflineConfig(Section):
    """`esper policy offline`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]{0,40}$")] = "offline"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    policies: tuple[str, ...] = ()
    """Whose logged runs are used; empty for all. Those of `none` are what the others are judged by."""
    weighting: Literal["advantage", "none"] = "advantage"
    """`none`: all runs are imitated alike, and step 2 is left out."""
    temperature: PositiveFloat = 0.5
    """In deviations of what runs of a task came to: the smaller, the more the best of them count."""
    max_weight: PositiveFloat = 10.0
    """How often a run is imitated at most, beside one that came to the mean of its group."""
    updates: Annotated[int, Field(ge=0)] = 0
    """Of PPO by V-trace; 0 leaves step 3 out."""
    net: dict[str, Any] = Field(default_factory=dict)
    """Hyper-parameters of the net (`esper.tamiyo.shape.NetShape`)."""
    reward: RewardConfig = RewardConfig()
    imitation: ImitationConfig = ImitationConfig()
    ppo: PpoConfig = PpoConfig()


@dataclass(frozen=True, slots=True)
class Judged:
    """A logged run and what it came to.

    Attributes:
        lessons: with rewards that sum to `total`.
        total: beyond the run or runs that it is judged by, less the prices.
        advantage: over the mean of its group, in deviations of the task.
        beside: what it was judged by, in words.
        seed, task, host: of the run.
    """

    lessons: Lessons
    total: float
    advantage: float
    beside: str
    seed: int
    task: str
    host: str


def judge(episodes: Sequence[Episode], prices: RewardConfig) -> list[Judged]:
    """Returns what each run came to beside others of its task and seed; those that have no others are left out.

    Args:
        episodes: whole ones, with validation losses.
        prices: of the reward.
    """
    groups: dict[tuple[Any, ...], list[Episode]] = {}
    for episode in episodes:
        groups.setdefault((task_of(episode), episode.about.seed), []).append(episode)
    found: list[tuple[tuple[Any, ...], Episode, Lessons, str]] = []
    for (task, _), group in groups.items():
        if len(group) < 2:
            continue
        for episode in group:
            twin, words = _beside(episode, group)
            found.append((task, episode, lessons_of(episode, prices, twin=twin), words))
    advantages = advantages_of([(task, episode.about.seed, one.total) for task, episode, one, _ in found])
    return [
        Judged(
            lessons=one,
            total=one.total,
            advantage=advantage,
            beside=words,
            seed=episode.about.seed,
            task=f"{episode.about.task} on {episode.about.data}",
            host=episode.about.host,
        )
        for (_, episode, one, words), advantage in zip(found, advantages.tolist(), strict=True)
        if one.items
    ]


def task_of(episode: Episode) -> tuple[Any, ...]:
    """What runs must have in common to be compared: task, data, host and its size, and how long they train."""
    first, about = episode.moments[0].packet, episode.about
    return about.task, about.data, about.host, first.budget.params_used, first.epoch.num_epochs


def weights_of(judged: Sequence[Judged], *, temperature: float, max_weight: float) -> np.ndarray:
    """How often each run is imitated, as shares that sum to 1, (N,)."""
    weights = np.exp(np.minimum([one.advantage / temperature for one in judged], math.log(max_weight)))
    return weights / weights.sum()


def repeated(judged: Sequence[Judged], shares: np.ndarray, num: int, *, seed: int) -> list[Lessons]:
    """Draws `num` runs by their shares, by systematic resampling: each comes share * num times, rounded up or down."""
    places = (np.arange(num) + np.random.default_rng(seed).random()) / num
    return [
        judged[i].lessons for i in np.searchsorted(np.cumsum(shares), places, side="right").clip(max=len(judged) - 1)
    ]


def train_offline(
    episodes: Sequence[Episode], config: OfflineConfig, *, told: Callable[[dict[str, Any]], None]
) -> tuple[PolicyCard, bytes]:
    """Trains a policy from episodes alone.

    Args:
        episodes: that were logged.
        config: see there.
        told: hears of each step, as a plain dict with `stage`.

    Returns:
        The policy's card and weights.

    Raises:
        DataError: if no two runs are of the same task and seed.
    """
    judged = judge(episodes, config.reward)
    if not judged:
        raise DataError(
            f"of {len(episodes)} logged runs no two are of the same task and seed: nothing can be compared",
            remedy="log runs of several policies on the same seeds (esper policy gather)",
        )
    told({"stage": "judged", "runs": len(judged), "of": len(episodes), "totals": _totals(judged)})
    net = PolicyNet(NetShape.model_validate(config.net), seed=config.seed)
    own, other = split([one.lessons for one in judged], config.imitation.held_out, seed=config.seed)
    report = imitate(net, collate, own, other, config.imitation, seed=config.seed)
    told({"stage": "cloned", **asdict(report)})
    behaviour = copy.deepcopy(net)
    if config.weighting == "advantage":
        shares = weights_of(judged, temperature=config.temperature, max_weight=config.max_weight)
        again = repeated(judged, shares, 2 * len(judged), seed=config.seed)
        report = imitate(net, collate, again, [], config.imitation, seed=config.seed + 1)
        effective = float(1.0 / (len(shares) * (shares**2).sum()))
        told({"stage": "weighted", "effective": effective, **asdict(report)})
    _improve(net, behaviour, judged, config, told)
    try:
        calibration = teach(net, forecasts(one.lessons for one in judged), seed=config.seed)
    except DataError as error:
        calibration = {"refused": str(error)}
    return _card(net, judged, config, calibration)


def _beside(episode: Episode, group: Sequence[Episode]) -> tuple[Twin, str]:
    """What a run is judged by: the runs of its group that did not grow, else all others."""
    bare = [one for one in group if one.about.policy == "none"]
    others = bare or [one for one in group if one is not episode]
    twins = [twin_of(one) for one in others]
    length = min(len(twin.val_losses) for twin in twins)
    # of runs that were not equally long the ends are compared
    ends = [twin.val_losses[len(twin.val_losses) - length :] for twin in twins]
    losses = tuple(math.fsum(epoch) / len(twins) for epoch in zip(*ends, strict=True))
    words = "the same run without growth" if bare else f"the mean of {len(others)} others"
    return Twin(losses, sum(twin.total_flops for twin in twins) // len(twins)), words


def _improve(
    net: PolicyNet,
    behaviour: PolicyNet,
    judged: Sequence[Judged],
    config: OfflineConfig,
    told: Callable[[dict[str, Any]], None],
) -> None:
    """Step 3."""
    then = [evaluated(behaviour, one.lessons)[0] for one in judged]
    ppo = Ppo(net, collate, config.ppo, seed=config.seed)
    for i in range(config.updates):
        parts: list[Samples] = []
        shares = []
        for one, old in zip(judged, then, strict=True):
            log_probs, values = evaluated(net, one.lessons)
            share = effective_share(log_probs - old)
            shares.append(share)
            if share >= config.ppo.min_effective:
                worth = estimates_again(one.lessons, values, log_probs - old, config.ppo)
                parts.append(samples_of(one.lessons, old, worth, np.zeros(len(old))))
        row = {"stage": "v-trace", "update": i + 1, "effective": math.fsum(shares) / len(shares)}
        if not parts:
            told({**row, "runs": 0, "words": "all runs are too far from the net: no more updates"})
            return
        told({**row, "runs": len(parts), **asdict(ppo.update(joined(parts)))})


def _totals(judged: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """By policy: how many runs, and the mean of what they came to."""
    found: dict[str, list[float]] = {}
    for one in judged:
        found.setdefault(one.lessons.policy, []).append(one.total)
    return {policy: {"runs": len(own), "mean": math.fsum(own) / len(own)} for policy, own in sorted(found.items())}


def _card(
    net: PolicyNet, judged: Sequence[Judged], config: OfflineConfig, calibration: dict[str, Any]
) -> tuple[PolicyCard, bytes]:
    weights = net.to_bytes()
    steps = [f"logged runs of {', '.join(sorted({one.lessons.policy for one in judged}))}"]
    if config.weighting == "advantage":
        steps.append(f"advantage-weighted at {config.temperature:g}")
    if config.updates:
        steps.append(f"{config.updates} updates by V-trace")
    card = PolicyCard.of(
        weights,
        name=config.name,
        kind=NET,
        shape=net.shape.model_dump(mode="json"),
        observation_version=OBSERVATION_VERSION,
        trained_on=PolicyOrigin(
            runs=tuple(dict.fromkeys(one.lessons.of for one in judged)),
            hosts=tuple(sorted({one.host for one in judged})),
            tasks=tuple(sorted({one.task for one in judged})),
            episodes=len(judged),
            seeds=tuple(sorted({one.seed for one in judged})),
            code_digest=code_digest(),
        ),
        parents=tuple(steps),
        calibration=calibration,
        notes=f"from logged runs alone, judged by {'; '.join(sorted({one.beside for one in judged}))}",
    )
    return card, weights
