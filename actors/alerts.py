"""Looks at the bus every few seconds for Nissa, and publishes the alerts that she has to tell. Holds nothing up.

What an alert is follows in `esper.nissa.anomalies`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from esper.leyline import Bus, BusStats, EsperError, OonaMessage

_LOG = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


class Teller(Protocol):
    """Who has alerts to tell."""

    def looked(self, stats: BusStats) -> None:
        """Takes in the figures of the bus."""
        ...

    def to_tell(self) -> Sequence[OonaMessage]:
        """The alerts that are not on the bus yet; none while it reads what was there before."""
        ...

    def told(self, messages: Sequence[OonaMessage]) -> None:
        """The bus has them."""
        ...


class AlertSender:
    """Runs in a thread of its own until `stop`; without the bus it tries again, and says once that it is missing.

    Args:
        teller: who has alerts.
        bus: connects to the bus.
        every_s: from one look to the next.
    """

    def __init__(self, teller: Teller, bus: Callable[[], Bus], *, every_s: float = LOOK_EVERY_S) -> None:
        self._teller, self._connect, self._every_s = teller, bus, every_s
        self._bus: Bus | None = None
        self._is_silent = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nissa-alerts", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it; what has not been told yet is told by the next Nissa, from the log."""
        self._stopped.set()
        self._thread.join(timeout=5.0)
        if self._bus is not None:
            self._bus.close()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            try:
                self._once()
            except EsperError as error:
                if not self._is_silent:
                    _LOG.warning("alerts.bus.silent", extra={"reason": str(error)})
                self._is_silent, self._bus = True, None
            else:
                self._is_silent = False

    def _once(self) -> None:
        if self._bus is None:
            self._bus = self._connect()
        self._teller.looked(self._bus.stats())
        messages = self._teller.to_tell()
        if messages:
            self._bus.publish(messages)
            self._bus.flush(timeout_s=self._every_s)
            self._teller.told(messages)
