"""Copies topics from the bus to the archive, in a thread: a message is acknowledged once it is durable there.

Killed at any point it loses nothing: what it had not acknowledged comes again to the next one, and the archive knows
what it has. Knows nothing of Delta.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from esper.leyline.messages import Topic
from esper.leyline.ports import Bus, Delivery

COMMIT_EVERY_S = 1.0
"""From one commit to the next, at least: each makes a file."""
MAX_MESSAGES = 4096
"""Of one commit."""
POLL_S = 0.2
MAX_BACKOFF_S = 5.0

logger = logging.getLogger(__name__)


class Archiving(Protocol):
    """Where messages end: each once, however often it is given."""

    def append(self, deliveries: Sequence[Delivery]) -> int: ...


def archive_group(topics: Sequence[Topic]) -> str:
    """The group that copies these topics; another selection is another group, which starts at the start."""
    names = ",".join(sorted(Topic(topic).value for topic in topics))
    return f"archive-{zlib.crc32(names.encode()):08x}"


class Archivist:
    """Follows the bus until `stop`.

    Args:
        topics: what is copied.
        open_bus: connects to the bus; called again after a failure.
        open_archive: likewise for the archive.
    """

    def __init__(
        self, topics: Sequence[Topic], open_bus: Callable[[], Bus], open_archive: Callable[[], Archiving]
    ) -> None:
        self._topics = tuple(topics)
        self._open_bus = open_bus
        self._open_archive = open_archive
        self._stopping = threading.Event()
        self.state = "starting"
        """`following`, `stopped`, or `reconnecting` with the reason."""
        self._thread = threading.Thread(target=self._run, name="oona-archivist", daemon=True)
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> bool:
        """Archives what the bus has now, then ends. Returns whether all of that went well within `timeout_s`; what is
        left stays with the bus.
        """
        self._stopping.set()
        self._thread.join(timeout_s)
        return self.state == "stopped"

    def _run(self) -> None:
        backoff_s = 0.1
        while True:
            try:
                self._follow()
            except Exception as error:  # the loop edge: logged, a state, and tried again
                self.state = f"reconnecting: {error}"
                logger.warning("oona.archive.failed", extra={"reason": str(error)}, exc_info=True)
                if self._stopping.wait(backoff_s):
                    return
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            else:
                self.state = "stopped"
                return

    def _follow(self) -> None:
        archive, bus = self._open_archive(), self._open_bus()
        try:
            subscription = bus.subscribe(self._topics, group=archive_group(self._topics), from_start=True)
            try:
                self.state = "following"
                while True:
                    is_last = self._stopping.is_set()  # what was published before that is there to be polled
                    deliveries = subscription.poll(max_messages=MAX_MESSAGES, timeout_s=0.0 if is_last else POLL_S)
                    if deliveries:
                        archive.append(deliveries)
                        subscription.ack(deliveries)
                        self._stopping.wait(COMMIT_EVERY_S)
                    elif is_last:
                        return
            finally:
                subscription.close()
        finally:
            bus.close()
