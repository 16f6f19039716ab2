"""Going on with a damaged log: what cannot be read is cut out and set aside, and a frame in its place says so.

Only bytes are moved here; what the loss means is the journal's matter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from esper.leyline.errors import StorageError
from esper.oona.frames import frame_of, next_frame, whole_until
from esper.oona.journal import Kind
from esper.oona.log import locked, segments_in, sync_directory

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

    A tail that a crash tore is left to the next start, which cuts it.

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
    data = path.read_bytes()
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
        if following is None and is_last:
            pieces.append(data[end:])
            break
        at = len(data) if following is None else following
        cuts.append(Cut(path, end, at - end, original))
        pieces.append(frame_of(Kind.GAP, json.dumps({"num_bytes": at - end}).encode()))
    if cuts:
        _replace(path, b"".join(pieces), original)
    return cuts


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
