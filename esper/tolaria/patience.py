"""A run's folder whose storage may fail for a while: writes are tried again, for a minute, before the run gives up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event

from esper.leyline.errors import StorageError
from esper.storage import Storage

log = logging.getLogger(__name__)

LIMIT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class PatientStorage(Storage):
    """A storage whose writes outlast failures of up to `LIMIT_S` seconds each."""

    def write(self, name: str, data: bytes | memoryview) -> None:
        """As `Storage.write`."""
        _patiently(lambda: Storage.write(self, name, data), name)

    def append(self, name: str, data: bytes) -> None:
        """As `Storage.append`."""
        _patiently(lambda: Storage.append(self, name, data), name)


def _patiently(write: Callable[[], None], name: str) -> None:
    began, pause_s = time.monotonic(), _FIRST_PAUSE_S
    pause = Event()  # never set: a wait that a signal handler can interrupt
    while True:
        try:
            write()
        except StorageError as error:
            if time.monotonic() - began + pause_s > LIMIT_S:
                raise
            log.warning("storage.failing", extra={"file": name, "reason": str(error)})
            pause.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        else:
            return
