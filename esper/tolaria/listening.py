"""A run that does not ask: it tells its state on the bus, and hears there what Tamiyo, who watches, wants of it.

A command counts only if it was decided from the very memory that the run still has: whatever was overtaken by another
decision, its own fallback's or an earlier command's, is left alone. What came too late for its epoch is heard at the
next one, if it still holds then.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from esper.config import TamiyoConfig
from esper.leyline.errors import UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import Bus, Subscription
from esper.leyline.signals import AdaptationSignal, RunState, SystemStatePacket

WATCHER = "tamiyo-watcher"
"""Who sends commands that nobody asked for."""
MAX_AGE_EPOCHS = 3
_POLL_S = 0.02


class ListeningController:
    """A `Controller` that listens.

    Args:
        bus: where it tells and hears; the caller closes it.
        config: of the run; travels with its state.
        initial_state: of a run that has not begun.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        bus: Bus,
        config: TamiyoConfig,
        *,
        initial_state: Callable[[], dict[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus, self._config, self._initial_state, self._clock = bus, config, initial_state, clock
        self._subscription: Subscription | None = None
        self._told: dict[int, str] = {}
        self._heard: dict[int, AdaptationSignal] = {}
        self._waiting_since: float | None = None
        self._has_heard = False

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]:
        """Tells the state, and returns the newest command that still holds; else a signal that waits.

        Raises:
            UnavailableError: if nobody has told this run anything for `config.deadline_s`, at first `startup_s`, or the
                bus does not answer.
        """
        state = state or self._initial_state()
        epoch, memory = packet.epoch.epoch, _digest(state)
        if self._subscription is None:
            self._subscription = self._bus.listen([Topic.KASMINA_COMMANDS], key=packet.run_id)
        self._tell(state, packet, memory)
        self._hear(self._subscription, epoch)
        usable = [
            told
            for told, signal in self._heard.items()
            if told >= epoch - MAX_AGE_EPOCHS and self._told.get(told) == memory and signal.memory is not None
        ]
        if not usable:
            self._complain()
            return state, _wait(packet)
        signal = self._heard[max(usable)]
        self._heard.clear()
        assert signal.memory is not None
        late = "" if signal.epoch == epoch else f" (decided after epoch {signal.epoch + 1})"
        obeyed = signal.model_copy(update={"epoch": epoch, "memory": None, "reason": f"{signal.reason}{late}"})
        return signal.memory, obeyed

    def close(self) -> None:
        """Listens no more."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None

    def _tell(self, state: dict[str, Any], packet: SystemStatePacket, memory: str) -> None:
        epoch = packet.epoch.epoch
        told = RunState(
            run_id=packet.run_id,
            epoch=epoch,
            sites=tuple(layer.layer_id for layer in packet.layers),
            memory=state,
            config=self._config.model_dump(mode="json"),
            options=packet.options,
            budget=packet.budget,
            embargoed=packet.embargoed,
            governor=packet.governor,
            missing=packet.missing,
            words=packet.words,
            ended=packet.ended,
            alerts=packet.alerts,
        )
        self._bus.publish([OonaMessage.of(Topic.RUN_STATE, told, sender_id="tolaria", key=packet.run_id)])
        self._told = {one: digest for one, digest in self._told.items() if one >= epoch - MAX_AGE_EPOCHS}
        self._told[epoch] = memory
        self._waiting_since = self._clock() if self._waiting_since is None else self._waiting_since

    def _hear(self, subscription: Subscription, epoch: int) -> None:
        """Takes in what was told; waits for this epoch's, but not for long."""
        deadline = self._clock() + self._config.listen_s
        while True:
            deliveries = subscription.poll(timeout_s=_POLL_S)
            subscription.ack(deliveries)
            for delivery in deliveries:
                body = delivery.message.body()
                if delivery.message.sender_id == WATCHER and isinstance(body, AdaptationSignal):
                    self._heard[body.epoch] = body
                    self._has_heard, self._waiting_since = True, None
            if epoch in self._heard or (not deliveries and self._clock() >= deadline):
                return

    def _complain(self) -> None:
        """Raises if nobody seems to watch."""
        limit_s = self._config.deadline_s if self._has_heard else max(self._config.deadline_s, self._config.startup_s)
        if self._waiting_since is not None and self._clock() - self._waiting_since > limit_s:
            raise UnavailableError(f"nobody who watches has told this run anything for {limit_s:g} s")


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _wait(packet: SystemStatePacket) -> AdaptationSignal:
    return AdaptationSignal(
        run_id=packet.run_id,
        epoch=packet.epoch.epoch,
        policy="watched",
        reason="no command has come: whoever watches has not decided about this epoch yet",
    )
