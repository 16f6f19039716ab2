"""Tamiyo in the trainer's own process: for runs without a cluster, for deterministic ones and for tests."""

from __future__ import annotations

from typing import Any

from esper.config import TamiyoConfig
from esper.leyline import AdaptationSignal, SystemStatePacket
from esper.tamiyo.gnn import Policies
from esper.tamiyo.memory import initial_state
from esper.tamiyo.step import step

WITHOUT_WEIGHTS = frozenset({"heuristic", "bandit", "none", "random", "schedule"})
"""Policies that decide by their settings alone."""


def fallback_controller(config: TamiyoConfig, *, seed: int) -> LocalController:
    """What decides in the trainer where Tamiyo does not answer: the same policy, or `heuristic` where that one needs
    weights. A control group that shall not grow does not grow for it either.
    """
    own = config if config.policy in WITHOUT_WEIGHTS else config.model_copy(update={"policy": "heuristic"})
    return LocalController(own, seed=seed)


class LocalController:
    """A `Controller` that calls `step` directly.

    Args:
        config: policy and limits.
        seed: of the run; used where a decision is asked for with an empty state, which begins a new one.
        policies: where the weights of a learned policy come from.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0, policies: Policies | None = None) -> None:
        self._config = config
        self._seed = seed
        self._policies = policies

    def initial_state(self) -> dict[str, Any]:
        """Returns the state of a run that has not begun."""
        return initial_state(self._config, self._seed)

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """Decides about one epoch; see `step`."""
        return step(state or self.initial_state(), packet, self._config, self._policies)
