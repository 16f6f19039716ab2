"""A run's folder whose storage may fail for a while: all is tried again, for a minute, before the run gives up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from threading import Event
from typing import TypeVar

from esper.leyline.errors import StorageError
from esper.storage import Storage

log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


class PatientStorage(Storage):
    """A storage that outlasts failures of up to `LIMIT_S` seconds each, whatever is done to its files."""

    def write(self, name: str, data: bytes | memoryview) -> None:
        """As `Storage.write`."""
        _patiently(lambda: Storage.write(self, name, data), name)

    def append(self, name: str, data: bytes) -> None:
        """As `Storage.append`."""
        _patiently(lambda: Storage.append(self, name, data), name)

    def read(self, name: str) -> bytes:
        """As `Storage.read`."""
        return _patiently(lambda: Storage.read(self, name), name)

    def names(self, below: str = "") -> list[str]:
        """As `Storage.names`."""
        return _patiently(lambda: Storage.names(self, below), below)

    def remove(self, name: str) -> None:
        """As `Storage.remove`."""
        _patiently(lambda: Storage.remove(self, name), name)


def _patiently(deed: Callable[[], T], name: str) -> T:
    began, pause_s = time.monotonic(), _FIRST_PAUSE_S
    pause = Event()  # never set: a wait that a signal handler can interrupt
    while True:
        try:
            return deed()
        except StorageError as error:
            if time.monotonic() - began + pause_s > LIMIT_S:
                raise
            log.warning("storage.failing", extra={"file": name, "reason": str(error)})
            pause.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
