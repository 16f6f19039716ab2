"""Checkpoints written behind the trainer's back: the trainer waits for a copy in memory, not for the storage."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.tree import clone


class BackgroundWriter:
    """Writes one checkpoint at a time; the next one waits for the one before, so that they cannot pile up.

    What goes wrong is raised by the next call. A process that is killed meanwhile leaves an unfinished checkpoint,
    which nobody takes for a whole one, and the one before it.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None

    def save(self, epoch: int, state: dict[str, Any], *, best: bool = False) -> None:
        """See `Checkpoints.save`; `state` may change as soon as this returns.

        Raises:
            StorageError: if the checkpoint before could not be written.
        """
        self.wait()
        self._writing = self._threads.submit(self._checkpoints.save, epoch, clone(state), best=best)

    def wait(self) -> None:
        """Returns once all is written; raises like `save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits, and ends the thread; raises like `save`."""
        try:
            self.wait()
        finally:
            self._threads.shutdown()
