"""Nissa's alerts of a run as the run hears them: those that stand when a decision is due.

A thread listens, so that a bus that is away holds no step and no decision up; the alerts are then as they stood.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from esper.leyline.alerts import Alert
from esper.leyline.flags import AlertFlag
from esper.leyline.messages import Topic
from esper.leyline.ports import Bus, Delivery, Subscription

_LOG = logging.getLogger(__name__)
MAX_STANDING = 64
_POLL_S, _PAUSE_S = 0.5, 2.0


class Alarms:
    """The alerts of one run.

    Args:
        bus: they come over.
        run_id: the run.
    """

    def __init__(self, bus: Bus, *, run_id: str) -> None:
        self._bus = bus
        self._run_id = run_id
        self._lock = threading.Lock()
        self._standing: dict[str, AlertFlag] = {}
        self._epoch = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="alarms", daemon=True)

    def begin(self) -> None:
        """Listens from here on; beginning twice is harmless."""
        if self._thread.ident is None:
            self._thread.start()

    def standing(self, epoch: int) -> tuple[AlertFlag, ...]:
        """The alerts that stand, as far as the run has heard.

        Args:
            epoch: that has just ended; what is heard from now on is noted as of it.
        """
        self.begin()  # a run that was resumed before a decision begins with it
        with self._lock:
            self._epoch = epoch
            return tuple(self._standing.values())

    def close(self) -> None:
        """Listens no more; waits for its thread, but not for a bus that is away."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(2 * _POLL_S)

    def _listen(self) -> None:
        subscription: Subscription | None = None
        is_deaf = False
        while not self._over.is_set():
            try:
                subscription = subscription or self._bus.listen([Topic.ALERTS], key=self._run_id)
                deliveries = subscription.poll(timeout_s=_POLL_S)
                self._take(deliveries)
                subscription.ack(deliveries)
                is_deaf = False
            except Exception as error:  # noqa: BLE001 - the thread's edge: a run goes on without
                subscription = None
                if not is_deaf and not self._over.is_set():  # once, however long it lasts
                    _LOG.warning("alerts.unheard", extra={"run": self._run_id, "reason": str(error)})
                is_deaf = True
                self._over.wait(_PAUSE_S)
        if subscription is not None:
            try:
                subscription.close()
            except Exception as error:  # noqa: BLE001 - Oona forgets a listener that says nothing
                _LOG.debug("alerts.unclosed", extra={"reason": str(error)})

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            body = delivery.message.body()
            if isinstance(body, Alert):
                with self._lock:
                    self._note(body)

    def _note(self, alert: Alert) -> None:
        self._standing.pop(alert.alert_id, None)
        if not alert.is_open:
            return
        self._standing[alert.alert_id] = AlertFlag(
            alert_id=alert.alert_id,
            kind=alert.kind,
            severity=alert.severity,
            site=alert.site,
            seed_id=alert.seed_id,
            epoch=self._epoch,
            summary=alert.summary,
            evidence=alert.evidence,
        )
        while len(self._standing) > MAX_STANDING:  # the one that was not heard of for longest
            del self._standing[next(iter(self._standing))]
