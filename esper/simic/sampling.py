"""Episodes as what a net is updated with: what it makes of their choices, what those were worth, and the samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from esper.simic.gae import Estimates, gae, vtrace
from esper.simic.lessons import Lessons
from esper.simic.ppo import Samples
from esper.simic.settings import PpoConfig
from esper.tamiyo.batch import collate
from esper.tamiyo.calibration import Lesson as Forecast
from esper.tamiyo.net import PolicyNet


@torch.no_grad()
def evaluated(net: PolicyNet, lessons: Lessons) -> tuple[np.ndarray, np.ndarray]:
    """Returns log-probabilities and values of an episode's choices by the net as it is, (N,) each."""
    batch = collate([item.observation for item in lessons.items])
    log_probs, _, values = net.evaluate(batch, [item.choice for item in lessons.items])
    return log_probs.double().numpy(), values.double().numpy()


def fresh_estimates(lessons: Lessons, values: np.ndarray, config: PpoConfig) -> Estimates:
    """Returns what the choices of an episode were worth, by GAE.

    Args:
        lessons: played by the net that gave `values`.
        values: (N,).
        config: `gamma` and `lam`.
    """
    paid, ends = _paid(lessons)
    return gae(paid, np.append(values, 0.0), ends, gamma=config.gamma, lam=config.lam)


def estimates_again(lessons: Lessons, values: np.ndarray, log_ratios: np.ndarray, config: PpoConfig) -> Estimates:
    """Returns what the choices of an episode of another policy were worth, by V-trace.

    Args:
        lessons: see there.
        values: (N,), of the net as it is.
        log_ratios: (N,), see `vtrace`.
        config: `gamma`.
    """
    paid, ends = _paid(lessons)
    return vtrace(paid, np.append(values, 0.0), ends, log_ratios, gamma=config.gamma)


def harm_ahead(lessons: Lessons) -> np.ndarray:
    """Returns what harm came after each choice, beyond the mean of the episode, (N,)."""
    harm = np.array([item.harm for item in lessons.items])
    ahead = np.cumsum(harm[::-1])[::-1]
    return ahead - ahead.mean()


def samples_of(lessons: Lessons, log_probs: np.ndarray, worth: Estimates, harms: np.ndarray) -> Samples:
    """Returns the samples of one episode.

    Args:
        lessons: N choices.
        log_probs: (N,), see `Samples`.
        worth: of the choices.
        harms: (N,), see `Samples`.
    """
    observations = [item.observation for item in lessons.items]
    choices = [item.choice for item in lessons.items]
    return Samples(observations, choices, log_probs, worth.advantages, worth.returns, harms)


def joined(parts: Sequence[Samples]) -> Samples:
    """Returns the samples of several episodes as one."""
    arrays = ("log_probs", "advantages", "returns", "harms")
    return Samples(
        [seen for part in parts for seen in part.observations],
        [choice for part in parts for choice in part.choices],
        *(np.concatenate([getattr(part, name) for part in parts]) for name in arrays),
    )


def forecasts(episodes: Iterable[Lessons]) -> list[Forecast]:
    """Returns each choice with the return that came of it: what the net's doubt is taught from."""
    return [
        Forecast(item.observation, item.choice, outcome, one.of)
        for one in episodes
        for item, outcome in zip(one.items, one.returns().tolist(), strict=True)
    ]


def _paid(lessons: Lessons) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, and where the episode ends, (N,) each."""
    return np.array([item.reward for item in lessons.items]), np.arange(len(lessons.items)) == len(lessons.items) - 1
