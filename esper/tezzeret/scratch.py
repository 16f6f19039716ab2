"""The folder that one compiler writes to: it goes with its compiler, or, where its worker was killed, with the next.

So does what still runs there: a compiler that stood still for a trainer when its worker was killed never goes on.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PREFIX = "esper-compiler-"
LOCK = ".in-use"
SETTLED_S = 60.0
"""A folder this old has its lock, if its worker lives; a younger one may be about to get it."""

_LOG = logging.getLogger(__name__)


class Scratch:
    """A new folder, held by a lock that the system drops when this process ends, however it ends.

    Args:
        parent: where it is made, and where others like it are looked for that nobody holds; None is the system's place.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        sweep(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes the folder and all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(parent: Path) -> int:
    """Removes this user's folders that no living worker holds, and ends what runs in them; returns how many."""
    removed = 0
    for path in parent.glob(f"{PREFIX}*"):
        try:
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > SETTLED_S and not _is_held(path):
                for pid in _running_in(path):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                shutil.rmtree(path)
                removed += 1
        except FileNotFoundError:
            continue  # another sweeps too
        except OSError as error:
            _LOG.warning("compiler.scratch.left", extra={"path": str(path), "reason": str(error)})
    return removed


def environment(path: Path) -> dict[str, str]:
    """What a compiler is told so that it, and all it starts, write to the folder; by it they are found again."""
    return {"HOME": str(path), "TMPDIR": str(path)}


def _running_in(path: Path) -> Iterator[int]:
    """Processes of this user that were given the folder; none where the system does not tell."""
    mark = f"TMPDIR={path}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:  # it has ended, or is another user's
            continue


def _is_held(path: Path) -> bool:
    try:
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # its worker was killed before it could lock it
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
