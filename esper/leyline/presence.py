"""Which trainers are on this machine, and whether they are in the middle of an epoch: for who could get in their way.

Each trainer keeps a small file in a folder of this user's; what a dead trainer left says nothing, and is removed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainerOnMachine:
    """A trainer that lives.

    Attributes:
        is_busy: whether it takes steps; else it validates, saves, decides or waits.
    """

    pid: int
    is_busy: bool


class Presence:
    """A trainer's own sign. It says nothing where the folder cannot be written: that is logged, and training goes on.

    Args:
        folder: where signs are; None is the machine's usual place.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._path = (folder or _folder()) / str(os.getpid())
        self._file: int | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Others see this process as a trainer meanwhile."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.pwrite(self._file, b"-" + _started(os.getpid()).encode(), 0)
        except OSError as error:
            _LOG.warning("trainer.unseen", extra={"reason": str(error)})
        try:
            yield
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None
                self._path.unlink(missing_ok=True)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Others see it taking steps meanwhile."""
        self._say(b"+")
        try:
            yield
        finally:
            self._say(b"-")

    def _say(self, what: bytes) -> None:
        if self._file is not None:
            os.pwrite(self._file, what, 0)


def trainers(folder: Path | None = None) -> list[TrainerOnMachine]:
    """The trainers of this user on this machine."""
    found = []
    folder = folder or _folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(OSError, ValueError):
            pid, text = int(path.name), path.read_text()
            if text[1:] == _started(pid):
                found.append(TrainerOnMachine(pid, text.startswith("+")))
            elif text:  # one that has just begun has said nothing yet
                path.unlink(missing_ok=True)
    return found


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"esper-{os.getuid()}" / "trainers"


def _started(pid: int) -> str:
    """When a process began, so that another of the same id is not taken for it; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
