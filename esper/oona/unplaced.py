"""Where batches belong that do not tell their offset, as in logs of the first two forms, behind a part that was lost.

What stands between that part and the next thing that tells an offset has no gap in it: so it is counted from there
back. Where nothing follows that tells one, the records get offsets that no record had before: they come once more to
every group, and none is taken for another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from esper.oona.frames import Frame
from esper.oona.kinds import OF_OFFSETS, PLACE, Kind, batch_of, spans_in


def first_offsets(frames: Iterable[Frame]) -> dict[int, int]:
    """By the number of a frame: the offset of its first record, for the first that does not tell it behind each gap.

    Of a gap behind which another follows before an offset is told there is none: what lies between cannot be placed.

    Args:
        frames: of the whole log, oldest first.
    """
    found: dict[int, int] = {}
    first: int | None = None  # the frame in question
    num_records = 0  # behind it
    beyond = 0  # above all offsets that are named, counted, or may have been lost
    is_gapped = False
    for number, frame in enumerate(frames):
        kind = Kind(frame.kind)
        offset = _told(kind, frame)
        if offset is not None and first is not None:
            found[first] = offset - num_records
        if offset is not None or kind is Kind.GAP:
            first, num_records, is_gapped = None, 0, kind is Kind.GAP
        num = _num_untold(kind, frame)
        if num and is_gapped and first is None:
            first = number
        num_records += num if is_gapped else 0
        beyond = max(beyond + num, _beyond(kind, frame))
        if kind is Kind.GAP:  # no record is shorter than a byte
            beyond += json.loads(frame.body).get("num_bytes", 0)
    if first is not None:
        found[first] = beyond
    return found


def _told(kind: Kind, frame: Frame) -> int | None:
    """The offset that the next record has, or its own first one, where a frame tells it."""
    if kind in {Kind.PACKED_BATCH, Kind.PLACED_BATCH}:
        return PLACE.unpack_from(frame.body)[1]
    if kind is Kind.SNAPSHOT:
        return json.loads(frame.body)["next_offset"]
    if kind is Kind.BURY:
        values = json.loads(frame.body)
        return values[4] if len(values) > 4 and values[2] else None
    return None


def _num_untold(kind: Kind, frame: Frame) -> int:
    """Records of a frame that does not tell where they are."""
    if kind in {Kind.TIMED_BATCH, Kind.BATCH}:
        return _num_records(kind, frame)
    if kind is Kind.BURY:
        values = json.loads(frame.body)
        return len(values[2]) if len(values) <= 4 else 0
    return 0


def _beyond(kind: Kind, frame: Frame) -> int:
    """An offset above all that a frame names."""
    if kind in {Kind.PACKED_BATCH, Kind.PLACED_BATCH}:
        return PLACE.unpack_from(frame.body)[1] + _num_records(kind, frame)
    if kind is Kind.SNAPSHOT:
        return json.loads(frame.body)["next_offset"]
    if OF_OFFSETS.get(kind, kind) in {Kind.LEASE, Kind.ACK, Kind.DROP}:
        return max((span.stop for span in spans_in(kind, json.loads(frame.body))), default=0)
    if kind is Kind.BURY:
        return max(json.loads(frame.body)[1], default=-1) + 1
    return 0


def _num_records(kind: Kind, frame: Frame) -> int:
    return sum(count for *_, count in batch_of(kind, frame.body).runs)
