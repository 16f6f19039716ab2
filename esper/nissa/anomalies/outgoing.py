"""Alerts on their way to the bus: each is told there once, also by a Nissa that was restarted and reads it anew."""

from __future__ import annotations

from collections import OrderedDict

from esper.leyline.alerts import Alert
from esper.leyline.messages import OonaMessage, Topic

SENDER = "nissa"
PLATFORM_KEY = "platform"
"""Key of alerts of no run."""
MAX_WAITING = 512


def message_of(alert: Alert) -> OonaMessage:
    """An alert as a message, whose id follows from what it says: told again it is the same message."""
    state = "over" if alert.ended_at is not None else str(alert.count)
    message = OonaMessage.of(Topic.ALERTS, alert, sender_id=SENDER, key=alert.run_id or PLATFORM_KEY)
    return message.model_copy(update={"event_id": f"{alert.alert_id}-{state}", "timestamp": alert.updated_at})


class Outgoing:
    """What waits to be published. Not thread-safe; its owner serialises calls.

    Attributes:
        num_dropped: alerts that gave way to newer ones, as the bus took none for long.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, OonaMessage] = OrderedDict()
        self.num_dropped = 0

    def add(self, message: OonaMessage) -> None:
        """Has it wait."""
        self._waiting[message.event_id] = message
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
            self.num_dropped += 1

    def seen(self, event_id: str) -> None:
        """It is on the bus."""
        self._waiting.pop(event_id, None)

    def waiting(self) -> list[OonaMessage]:
        """All that waits, oldest first; stays until it is `seen`."""
        return list(self._waiting.values())
