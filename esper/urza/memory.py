"""An asset hub in memory: the same rules and the same catalog, events in a list, blobs in a dict."""

from __future__ import annotations

from collections.abc import Callable

from esper.leyline import now
from esper.urza.blobs import MemoryBlobs
from esper.urza.events import MemoryLog
from esper.urza.hub import Hub


class MemoryHub(Hub):
    """An `AssetHub` for tests and for runs without a cluster that need nothing to last."""

    def __init__(self, *, clock: Callable[[], float] = now) -> None:
        super().__init__(MemoryLog(clock), MemoryBlobs(clock), clock=clock)
