"""Playing what a training asks for: every run is logged, and settled with the run of its seed that did not grow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from esper.config import RewardConfig
from esper.simic.experience import append_episode
from esper.simic.lessons import Lessons, lessons_of
from esper.simic.reward import Twin
from esper.simic.rollouts import Ask, Played, Rollouts, twin_of
from esper.storage import Storage

_LOG = logging.getLogger(__name__)


class Playing:
    """What one training has played.

    Args:
        rollouts: plays the runs.
        storage: where experience goes.
        prices: of the reward.
        told: hears of each run that has ended, as a plain dict with `stage`.

    Attributes:
        twins: runs without growth, by `group_of`.
        seeds: of the runs that were logged.
    """

    def __init__(
        self, rollouts: Rollouts, storage: Storage, prices: RewardConfig, told: Callable[[dict[str, Any]], None]
    ) -> None:
        self._rollouts, self._storage, self._prices, self._told = rollouts, storage, prices, told
        self.twins: dict[str, Twin] = {}
        self.seeds: set[int] = set()

    def play(self, asks: Sequence[Ask], stage: str, heard: Callable[[Played], None] | None = None) -> list[Played]:
        """Plays runs and returns them in the order of `asks`; those that grow or may are logged.

        Args:
            asks: what is to be played.
            stage: of the training, in words.
            heard: takes each as it ends and is logged.

        Raises:
            StorageError: if the log cannot be written.
        """
        found = []
        for one in self._rollouts.play(asks):
            found.append(one)
            self._told({"stage": "rollout", "of": stage, "done": len(found), "all": len(asks), "problem": one.problem})
            if one.episode is None:
                _LOG.warning("rollout.failed", extra={"seed": one.ask.seed, "reason": one.problem})
            elif one.ask.policy != "none":
                self.seeds.add(one.ask.seed)
                append_episode(self._storage, one.episode, self._prices)
            if heard is not None:
                heard(one)
        # workers end in any order: what is learned must not hang on it
        places = {_place(ask): place for place, ask in enumerate(asks)}
        return sorted(found, key=lambda one: places[_place(one.ask)])

    def find_twins(self, asks: Sequence[Ask]) -> None:
        """Plays the runs without growth that are not known yet."""
        unknown = {group_of(ask): Ask(task=ask.task, seed=ask.seed, policy="none") for ask in asks}
        wanted = [ask for key, ask in unknown.items() if key not in self.twins]
        for one in self.play(wanted, "twins"):
            if one.episode is not None:
                self.twins[group_of(one.ask)] = twin_of(one.episode)

    def twin(self, ask: Ask) -> Twin | None:
        """The run without growth beside this one; None if it is not known."""
        return self.twins.get(group_of(ask))

    def settled(self, played: Sequence[Played]) -> list[tuple[Ask, Lessons]]:
        """The lessons of what was played, settled with twins. One whose twin failed is left out: by shadow evidence
        alone it would be paid on another scale, and nobody would see it.
        """
        whole = [(one.ask, one.episode, self.twin(one.ask)) for one in played if one.episode is not None]
        settled = [(ask, episode, twin) for ask, episode, twin in whole if twin is not None]
        if len(settled) < len(whole):
            _LOG.warning("rollout.unsettled", extra={"num": len(whole) - len(settled), "reason": "no twin was played"})
        lessons = [(ask, lessons_of(episode, self._prices, twin=twin)) for ask, episode, twin in settled]
        return [(ask, one) for ask, one in lessons if one.items]


def group_of(ask: Ask) -> str:
    """Task and seed: what runs that compare have in common."""
    return f"{ask.task}/{ask.seed}"


def _place(ask: Ask) -> tuple[int, int, str, bool, int]:
    """An ask without its weights."""
    return ask.task, ask.seed, ask.policy, ask.greedy, ask.draw
