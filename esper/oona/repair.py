"""Going on with a damaged log: what cannot be read is cut out and set aside, and a frame in its place says so.

Only bytes are moved here; what the loss means is the journal's matter.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import NamedTuple

from esper.leyline.errors import StorageError
from esper.oona.frames import frame_of, next_frame, whole_until
from esper.oona.kinds import Kind
from esper.oona.log import locked, segments_in, sync_directory

BLOCK_BYTES, PIECE_BYTES = 4096, 1 << 20
"""A disk loses whole blocks; what can be read is read in pieces."""
DAMAGED = ".damaged"
"""What the name of a segment ends with that was set aside."""


class Cut(NamedTuple):
    """Bytes that were cut out.

    Attributes:
        path: of the segment.
        at: the first of them.
        num_bytes: how many.
        original: the segment as it was.
    """

    path: Path
    at: int
    num_bytes: int
    original: Path


def repair(directory: Path) -> list[Cut]:
    """Cuts what is damaged out of the log in `directory`; returns what was cut, nothing of a log that is whole.

    A tail that a crash tore is left to the next start, which cuts it. What the disk cannot read any more (EIO) is cut
    as what is damaged is; the segment that is set aside still has its unreadable blocks.

    Raises:
        FencedError: if a shard writes there.
        StorageError: if a file cannot be read or written; the log is as it was then.
    """
    cuts: list[Cut] = []
    with locked(directory):
        paths = segments_in(directory)
        for path in paths:
            try:
                cuts += _repair(path, is_last=path == paths[-1])
            except OSError as error:
                raise StorageError(f"cannot repair {path}: {error.strerror}", field="storage") from error
    return cuts


def _repair(path: Path, *, is_last: bool) -> list[Cut]:
    data, unreadable_until = _read(path)
    original = _free(path.with_suffix(DAMAGED))
    pieces: list[bytes] = []
    cuts: list[Cut] = []
    at = 0
    while at < len(data):
        end = whole_until(data, at)
        pieces.append(data[at:end])
        if end == len(data):
            break
        following = next_frame(data, end + 1)
        if following is None and is_last and end >= unreadable_until:
            pieces.append(data[end:])
            break
        at = len(data) if following is None else following
        cuts.append(Cut(path, end, at - end, original))
        pieces.append(frame_of(Kind.GAP, json.dumps({"num_bytes": at - end}).encode()))
    if cuts:
        _replace(path, b"".join(pieces), original)
    return cuts


def _read(path: Path) -> tuple[bytes, int]:
    """The segment's bytes, and where what the disk cannot read ends; of that there are zeros, which are no frame."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size, data, unreadable_until = os.fstat(fd).st_size, bytearray(), 0
        while len(data) < size:
            at = len(data)
            try:
                piece = os.pread(fd, PIECE_BYTES, at)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                piece, unreadable_until = _blocks(fd, at, min(PIECE_BYTES, size - at), unreadable_until)
            if not piece:
                break  # it has shrunk meanwhile
            data += piece
    finally:
        os.close(fd)
    return bytes(data), unreadable_until


def _blocks(fd: int, start: int, num_bytes: int, unreadable_until: int) -> tuple[bytes, int]:
    """The same of one piece, block by block."""
    data = bytearray()
    while len(data) < num_bytes:
        at = start + len(data)
        length = min(BLOCK_BYTES - at % BLOCK_BYTES, num_bytes - len(data))
        try:
            block = os.pread(fd, length, at)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            block, unreadable_until = bytes(length), at + length
        data += block
        if not block:
            break
    return bytes(data), unreadable_until


def _free(path: Path) -> Path:
    """A name that nothing has: what an earlier repair set aside stays."""
    number = 2
    free = path
    while free.exists():
        free = path.with_suffix(f"{DAMAGED}-{number}")
        number += 1
    return free


def _replace(path: Path, data: bytes, original: Path) -> None:
    mended = path.with_suffix(".new")
    with mended.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.link(path, original)
    mended.rename(path)
    sync_directory(path.parent)
