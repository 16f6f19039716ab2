"""Sends spans to an OpenTelemetry collector for Nissa, in a thread of its own. Nothing waits for it but its end.

What becomes a span, and how it is sent, is in `esper.nissa`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from esper.leyline import ConflictError, EsperError
from esper.nissa.spans import Span

_LOG = logging.getLogger("esper.nissa")

SEND_EVERY_S = 2.0
TIMEOUT_S = 2.0
MAX_WAITING = 4096
_BATCH = 512
_OLD_S = 60.0


class Receiver(Protocol):
    """Where spans go."""

    def send(self, spans: Sequence[Span]) -> None:
        """Hands them over; raises `UnavailableError` if they were not taken, `ConflictError` if they never will be."""
        ...

    def close(self) -> None:
        """Ends what it is doing."""
        ...


class SpanSender:
    """Sends until `stop`. Without the collector spans wait, the oldest go when there are too many, and it says once
    that it is missing.

    A Nissa reads the bus from its start, and with it the spans of runs that were over long ago: what ended more than a
    minute before this began is left out.

    Args:
        receiver: where they go.
        every_s: from one try to the next.
    """

    def __init__(self, receiver: Receiver, *, every_s: float = SEND_EVERY_S) -> None:
        self._receiver, self._every_s = receiver, every_s
        self._since = time.time() - _OLD_S
        self._waiting: deque[Span] = deque()
        self._lock = threading.Lock()  # of what waits
        self._sending = threading.Lock()
        self._num_dropped = 0
        self._is_silent, self._reason = False, ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nissa-traces", daemon=True)
        self._thread.start()

    def add(self, spans: Sequence[Span]) -> None:
        """Has them wait; returns at once."""
        with self._lock:
            self._waiting.extend(span for span in spans if span.end >= self._since)
            while len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._num_dropped += 1

    def missing(self) -> str:
        """Sends what waits; what could not be delivered since it was last asked, in words; empty where all was."""
        self._send()
        with self._lock:
            lost, self._num_dropped = len(self._waiting) + self._num_dropped, 0
        return f"OpenTelemetry: {lost} spans were not delivered: {self._reason}" if lost else ""

    def stop(self) -> None:
        """Tries a last time and ends it."""
        self._stopped.set()
        self._thread.join(2 * TIMEOUT_S + self._every_s)
        self._receiver.close()

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._send()
        self._send()

    def _send(self) -> None:
        with self._sending:
            while True:
                with self._lock:
                    batch = [self._waiting[i] for i in range(min(_BATCH, len(self._waiting)))]
                    dropped = self._num_dropped
                if not batch:
                    return
                try:
                    self._receiver.send(batch)
                except ConflictError as error:  # it would refuse them again, and all behind them would wait
                    _LOG.warning("traces.refused", extra={"num": len(batch), "reason": str(error)})
                    self._reason, self._num_dropped = str(error), self._num_dropped + len(batch)
                    with self._lock:
                        for _ in range(min(len(batch), len(self._waiting))):
                            self._waiting.popleft()
                    continue
                except EsperError as error:
                    if not self._is_silent:
                        _LOG.warning("traces.undelivered", extra={"reason": str(error)})
                    self._is_silent, self._reason = True, str(error)
                    return
                self._is_silent = False
                with self._lock:
                    gone = self._num_dropped - dropped  # of these, for want of room meanwhile
                    self._num_dropped -= min(gone, len(batch))
                    for _ in range(len(batch) - gone):
                        self._waiting.popleft()
