"""An append-only log of frames in segment files of one directory. Knows nothing of what a frame means.

Written frames survive the death of the process; `sync` makes them
survive the death of the host, and when to call it is the caller's choice. A segment starts with a frame that holds
the whole state, so that older segments can be dropped.

A disk that refuses leaves the log as it was, and what it refused may be tried again. After a failed `fsync` the system
may have thrown away what it could not write, and a second one would succeed all the same (Rebello et al., "Can
applications recover from fsync failures?", 2020): so all that was not synced is written again first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.leyline.errors import FencedError, StorageError, UnavailableError
from esper.oona.frames import Frame, frame_of, frames_in, next_frame, whole_until
from esper.storage import Storage

_SUFFIX, _LOCK = ".log", "lock"
MAX_TORN_BYTES = 16 << 20
"""So much of a torn tail is searched for whole frames."""

logger = logging.getLogger(__name__)


class SegmentLog:
    """The log in `directory`, locked against a second writer until `close`.

    Args:
        directory: made if missing.
        segment_bytes: a segment that has grown beyond it asks to be rolled.
        is_synced: whether `sync` is called often; what it has not taken yet is then held, to be written again.
        wait_s: how long to wait for the lock of a writer that is about to end.
        is_read_only: a log that is there is only read, and stays as it is; writers are kept out meanwhile.

    Raises:
        FencedError: if another process writes here.
        StorageError: if the directory cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        segment_bytes: int = 64 << 20,
        wait_s: float = 0.0,
        is_synced: bool = True,
        is_read_only: bool = False,
    ) -> None:
        self.directory = directory
        self.is_read_only = is_read_only
        self.segment_bytes = segment_bytes
        self._is_synced = is_synced
        self._guard = threading.Lock()  # `sync` may run beside `write`, but not beside `roll` and `close`
        self._path = directory
        self._fd = -1
        self._size = self._synced_size = 0
        self._unsynced: list[bytes] = []  # frames, the oldest first
        self._is_dirty = False
        self._is_torn = False  # a part of a frame may lie behind the last whole one
        self._is_doubtful = False  # a sync has failed
        try:
            if not is_read_only:
                directory.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(directory / _LOCK, os.O_RDWR | (0 if is_read_only else os.O_CREAT), 0o600)
        except OSError as error:
            raise StorageError(f"cannot use {directory}: {error.strerror}", field="storage") from error
        try:
            _lock(self._lock_fd, directory, wait_s)
            self.cut_bytes = self._cut_torn_tail()
        except BaseException:
            os.close(self._lock_fd)
            raise

    # ---- reading

    @property
    def segments(self) -> list[Path]:
        """The segment files, oldest first."""
        return segments_in(self.directory)

    def replay(self) -> Iterator[Frame]:
        """Yields every frame, oldest first.

        Raises:
            StorageError: if a segment cannot be read, or one before the last is damaged: its loss is no torn tail.
        """
        for path in (paths := self.segments):
            data = _read(path)
            end = 0
            for frame in frames_in(data):
                end += frame.size
                yield frame
            is_torn_tail = self.is_read_only and path == paths[-1] and len(data) - end == self.cut_bytes
            if end != len(data) and not is_torn_tail:
                raise _damaged(path, end)

    # ---- writing

    @property
    def is_full(self) -> bool:
        """Whether the caller should roll. True of a log without a segment."""
        return not self.is_open or self._size >= self.segment_bytes

    @property
    def is_open(self) -> bool:
        """Whether there is a segment to write to."""
        return self._fd >= 0

    def write(self, kind: int, body: bytes) -> None:
        """Appends one frame; it has left this process when this returns.

        Raises:
            UnavailableError: if it could not be written whole; the log is as it was before, and goes on when it can.
        """
        assert self.is_open, "roll first"
        frame = frame_of(kind, body)
        try:
            self._cut()
            self._is_torn = True
            _write_all(self._fd, frame)
            self._is_torn = False
        except OSError as error:
            with contextlib.suppress(OSError):  # then before the next frame
                self._cut()
            raise self._failure("write to", error) from error
        self._size += len(frame)
        if self._is_synced:
            self._unsynced.append(frame)
        self._is_dirty = True

    def _cut(self) -> None:
        """Ends the segment after its last whole frame."""
        if self._is_torn:
            os.ftruncate(self._fd, self._size)
            self._is_torn = False

    def roll(self, offset: int, kind: int, body: bytes) -> None:
        """Starts a segment with a frame of the whole state; `offset` is the first it may hold.

        Raises:
            UnavailableError: if it cannot be made; the segment before stays in use.
        """
        paths = self.segments
        index = int(paths[-1].name.split("-")[0]) + 1 if paths else 0
        path = self.directory / f"{index:08d}-{offset:020d}{_SUFFIX}"
        frame = frame_of(kind, body)
        unfinished = path.with_suffix(".new")
        fd = -1
        try:
            self._cut()
            self.sync()
            fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            _write_all(fd, frame)
            os.fsync(fd)
            unfinished.rename(path)  # the segment before is whole and synced before this one exists
            sync_directory(self.directory)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            for made in (unfinished, path):
                with contextlib.suppress(OSError):
                    made.unlink(missing_ok=True)
            raise self._failure("write to", error) from error
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._path = fd, path
            self._size = self._synced_size = len(frame)
            self._unsynced.clear()
            self._is_dirty = self._is_doubtful = False

    def sync(self) -> None:
        """Makes all that is written survive the host's death. May be called from another thread.

        Raises:
            UnavailableError: if the disk refuses; the next call writes again what it may have lost.
        """
        with self._guard:
            if self._fd < 0 or not self._is_dirty:
                return
            self._is_dirty = False
            frames = self._unsynced[:]  # more may come meanwhile
            try:
                if self._is_doubtful:
                    _write_at(self._path, self._synced_size, b"".join(frames))
                os.fsync(self._fd)
            except OSError as error:
                self._is_dirty = self._is_doubtful = True
                raise self._failure("sync", error) from error
            self._is_doubtful = False
            self._synced_size += sum(map(len, frames))
            del self._unsynced[: len(frames)]

    def drop_below(self, offset: int) -> None:
        """Deletes segments that hold only offsets below `offset`."""
        paths = self.segments
        for path, following in itertools.pairwise(paths):
            if int(following.stem.split("-")[1]) > offset:
                break
            try:
                path.unlink()
            except OSError as error:  # the next call tries again
                logger.warning("oona.log.kept", extra={"path": str(path), "reason": error.strerror})
                break

    def close(self) -> None:
        """Syncs and unlocks.

        Raises:
            UnavailableError: if the disk refuses; it is unlocked all the same.
        """
        try:
            self.sync()
        finally:
            with self._guard:
                if self._fd >= 0:
                    os.close(self._fd)
                    self._fd = -1
                if self._lock_fd >= 0:
                    os.close(self._lock_fd)
                    self._lock_fd = -1

    def _failure(self, doing: str, error: OSError) -> UnavailableError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return UnavailableError(
            f"cannot {doing} {self.directory}: {error.strerror}",
            field="storage",
            remedy=f"{'make room' if is_full else 'mend the disk'}: it goes on by itself, nothing is lost",
        )

    def _cut_torn_tail(self) -> int:
        """Cuts the last segment after its last whole frame, but of a log that is only read; returns how many bytes lie
        behind it.

        Raises:
            StorageError: if a whole frame follows: then it is damaged, not torn, and what follows was acknowledged.
        """
        paths = self.segments
        if not paths:
            return 0
        data = _read(paths[-1])
        end = whole_until(data)
        if end < len(data):
            if next_frame(data, end + 1, end + MAX_TORN_BYTES) is not None:
                raise _damaged(paths[-1], end)
            if self.is_read_only:
                return len(data) - end
            os.truncate(paths[-1], end)
            logger.warning("oona.log.cut", extra={"path": str(paths[-1]), "at": end, "num_bytes": len(data) - end})
        return len(data) - end


def _damaged(path: Path, at: int) -> StorageError:
    remedy = "restore the file from a copy, or go on without what cannot be read: esper bus repair"
    return StorageError(f"{path} is damaged at byte {at}", field="storage", remedy=remedy)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}", field="storage") from error


def directory_of(storage: Storage) -> Path:
    """Where the logs of a platform's bus lie, on the node that it started on: with the rest of a local storage."""
    return Path(storage.path("oona")) if storage.is_local else Path(f"~/.cache/esper/oona-{storage.key}").expanduser()


def segments_in(directory: Path) -> list[Path]:
    """The segment files of a log, oldest first."""
    return sorted(directory.glob(f"*{_SUFFIX}"))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps writers out of a log that is there.

    Raises:
        FencedError: if a process writes it.
        StorageError: if there is none.
    """
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR)
    except OSError as error:
        raise StorageError(f"cannot use {directory}: {error.strerror}", field="storage") from error
    try:
        _lock(fd, directory, 0.0)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, directory: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise FencedError(f"another process writes the log in {directory}") from error
            time.sleep(0.02)  # flock has no deadline of its own
        else:
            return


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Writes there, also where a descriptor that only appends would not."""
    fd = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
    finally:
        os.close(fd)


def sync_directory(directory: Path) -> None:
    """Makes names that changed in it survive the host's death."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
