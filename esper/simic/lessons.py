"""Episodes as a learner wants them: what was seen, what was chosen, what came of it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from esper.config import RewardConfig, TamiyoConfig
from esper.simic.moments import Episode
from esper.simic.reward import Twin, harms, rewards
from esper.tamiyo.actions import ActionChoice, choice_of
from esper.tamiyo.memory import initial_state
from esper.tamiyo.observation import Observation, observation_of


@dataclass(frozen=True, slots=True)
class Lesson:
    """One choice.

    Attributes:
        observation: what was seen.
        choice: what was chosen.
        reward: what came to pass until the next choice.
        harm: likewise, see `reward.harms`.
    """

    observation: Observation
    choice: ActionChoice
    reward: float
    harm: float


@dataclass(frozen=True, slots=True)
class Lessons:
    """One episode.

    Attributes:
        of: its run.
        policy, policy_version: who chose.
        items: its choices, oldest first.
        num_beyond: choices that the masks do not hold; what came of them is counted to the one before.
        weight: how much it counts where it is imitated.
    """

    of: str
    policy: str
    policy_version: str
    items: tuple[Lesson, ...]
    num_beyond: int = 0
    weight: float = 1.0

    @property
    def total(self) -> float:
        """The sum of rewards."""
        return sum(item.reward for item in self.items)

    @property
    def harm(self) -> float:
        """The sum of harms."""
        return sum(item.harm for item in self.items)

    def returns(self, gamma: float = 1.0) -> np.ndarray:
        """What came after each choice, itself included, (N,)."""
        found, ahead = np.zeros(len(self.items)), 0.0
        for i in reversed(range(len(self.items))):
            ahead = self.items[i].reward + gamma * ahead
            found[i] = ahead
        return found


def lessons_of(
    episode: Episode, prices: RewardConfig, *, twin: Twin | None = None, config: TamiyoConfig | None = None
) -> Lessons:
    """Returns the lessons of an episode that has one choice at least.

    Args:
        episode: see there.
        prices: of the reward.
        twin: the run without growth.
        config: Tamiyo's configuration; None for the one the episode was played with.
    """
    config = config or TamiyoConfig.model_validate(episode.about.tamiyo)
    items: list[Lesson] = []
    num_beyond, paid, harmed = 0, rewards(episode, prices, twin), harms(episode)
    waiting = (0.0, 0.0)  # of choices before the first that the masks hold
    for moment, reward, harm in zip(episode.moments, paid, harmed, strict=True):
        state = moment.state or initial_state(config, episode.about.seed)  # a run begins without one
        observation = observation_of(state, moment.packet, config)
        choice = choice_of(observation, moment.signal)
        if choice is not None:
            items.append(Lesson(observation, choice, reward + waiting[0], harm + waiting[1]))
            waiting = (0.0, 0.0)
            continue
        num_beyond += 1
        if items:
            items[-1] = replace(items[-1], reward=items[-1].reward + reward, harm=items[-1].harm + harm)
        else:
            waiting = (waiting[0] + reward, waiting[1] + harm)
    about = episode.about
    return Lessons(about.run_id, about.policy, about.policy_version, tuple(items), num_beyond)


def split(lessons: Sequence[Lessons], held_out: float, *, seed: int) -> tuple[list[Lessons], list[Lessons]]:
    """Returns what is learned from and what only judges: whole episodes, of one at least one is learned from."""
    order = np.random.default_rng(seed).permutation(len(lessons)).tolist()
    num = min(round(held_out * len(lessons)), max(0, len(lessons) - 1))
    return [lessons[i] for i in sorted(order[num:])], [lessons[i] for i in sorted(order[:num])]
