"""Rests of a thread that works beside a trainer.

Python runs one thread of a process at a time, and calls of native code hold on to that: a loader that computes for
30 ms on end holds up the step beside it by as much. In pieces of a few milliseconds, with rests between them, it holds
up several steps by a little.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Rest = Callable[[], None]
"""To be called between pieces of work."""

FACTOR = 2.0
"""A rest is so many times as long as the processor was used since the last."""
LONGEST_S = 0.1


def never() -> None:
    """For work that somebody waits for."""


class Rests:
    """Sleeps in proportion to what this thread computed; to be made and called in one thread."""

    def __init__(self) -> None:
        self._since = time.thread_time()

    def __call__(self) -> None:
        worked = time.thread_time() - self._since
        time.sleep(min(FACTOR * worked, LONGEST_S))
        self._since = time.thread_time()
