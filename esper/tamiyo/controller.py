"""Tamiyo in the trainer's own process: for runs without a cluster, for deterministic ones and for tests."""

from __future__ import annotations

from typing import Any

from esper.config import TamiyoConfig
from esper.leyline import AdaptationSignal, SystemStatePacket
from esper.tamiyo.memory import initial_state
from esper.tamiyo.step import step


class LocalController:
    """A `Controller` that calls `step` directly.

    Args:
        config: policy and limits.
        seed: of the run; used where a decision is asked for with an empty state, which begins a new one.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0) -> None:
        self._config = config
        self._seed = seed

    def initial_state(self) -> dict[str, Any]:
        """Returns the state of a run that has not begun."""
        return initial_state(self._config, self._seed)

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """Decides about one epoch; see `step`."""
        return step(state or self.initial_state(), packet, self._config)
