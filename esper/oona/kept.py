"""The records that one shard keeps: by offset, with the time at which each batch came, and how long they stay.

Knows nothing of groups: what somebody still needs is said by the caller.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from esper.leyline.bus import TopicStats
from esper.oona.wire import Record

READ_AHEAD = 20_000
"""Records that one `read` looks at."""


class Kept:
    """Records of ascending offsets, without a gap but for what a damaged log has lost.

    Args:
        retain: records kept that nobody needs, at least where the other two allow it; at most about twice as many.
        retain_bytes: of all records together; what is needed stays beyond it. None is no limit.
        retain_s: seconds that a record stays, if nobody needs it. None is no limit.
    """

    def __init__(
        self, *, retain: int = 200_000, retain_bytes: int | None = None, retain_s: float | None = None
    ) -> None:
        self.retain = retain
        self.retain_bytes = retain_bytes
        self.retain_s = retain_s
        self.next_offset = 0
        self.num_bytes = 0
        self._records: dict[int, Record] = {}
        self._stamps: list[tuple[float, int]] = []  # when a batch came, and its first offset; both ascend
        self._count_limit = 2 * retain
        self._bytes_limit = retain_bytes
        self._look_at = 0.0  # when some may be too old

    def __getitem__(self, offset: int) -> Record:
        return self._records[offset]

    def get(self, offset: int) -> Record | None:
        """The record, if it is kept."""
        return self._records.get(offset)

    @property
    def first_offset(self) -> int:
        """The lowest offset kept."""
        return next(iter(self._records), self.next_offset)

    @property
    def newest_at(self) -> float:
        """When the last batch came; 0 if there is none."""
        return self._stamps[-1][0] if self._stamps else 0.0

    def from_offset(self, start: int) -> Iterator[tuple[int, Record]]:
        """Records from an offset on; what is no longer kept is passed over."""
        offsets = range(max(start, self.first_offset), self.next_offset)
        return ((offset, record) for offset in offsets if (record := self._records.get(offset)) is not None)

    def skip_to(self, offset: int) -> None:
        """The next record has this offset, if it would have a lower one."""
        self.next_offset = max(self.next_offset, offset)

    def append(self, records: Sequence[Record], at: float) -> int:
        """Takes records that came at a time; returns the offset of the first. A clock set back stands still here."""
        start = self.next_offset
        self.next_offset += len(records)
        self._records.update(zip(range(start, self.next_offset), records, strict=True))
        self.num_bytes += sum([len(record.data) for record in records])
        self._stamps.append((max(at, self.newest_at), start))
        return start

    # ---- how long

    def is_due(self, at: float) -> bool:
        """Whether there is so much, or something so old, that `trim` may find something."""
        return (
            len(self._records) > self._count_limit
            or (self._bytes_limit is not None and self.num_bytes > self._bytes_limit)
            or (self.retain_s is not None and at >= self._look_at)
        )

    def trim(self, needed: int, at: float) -> None:
        """Drops the oldest records.

        Args:
            needed: the lowest offset that somebody needs.
            at: the present, seconds since the epoch.
        """
        first = self.first_offset
        keep = self.next_offset - self.retain
        if self.retain_s is not None:
            keep = max(keep, self.offset_at(at - self.retain_s))
            self._look_at = at + self.retain_s / 100
        stop = min(needed, max(keep, first))
        for offset in range(first, stop):
            self._drop(offset)
        if self.retain_bytes is not None:
            while self.num_bytes > self.retain_bytes and stop < needed:
                self._drop(stop)
                stop += 1
        self._count_limit = len(self._records) + self.retain
        if self.retain_bytes is not None:
            self._bytes_limit = max(self.retain_bytes, self.num_bytes) + self.retain_bytes // 4
        first = self.first_offset
        passed = next((at for at, (_, start) in enumerate(self._stamps) if start > first), len(self._stamps))
        del self._stamps[: max(0, passed - 1)]  # the last of these may hold the first record

    def _drop(self, offset: int) -> None:
        record = self._records.pop(offset, None)
        self.num_bytes -= 0 if record is None else len(record.data)

    # ---- looking

    def offset_at(self, at: float) -> int:
        """The first offset that came at or after this time, in seconds since the epoch."""
        index = bisect_left(self._stamps, (at, -1))
        return self._stamps[index][1] if index < len(self._stamps) else self.next_offset

    def time_of(self, offset: int) -> float | None:
        """When a record came; None if that is not known."""
        index = bisect_left(self._stamps, offset + 1, key=lambda stamp: stamp[1]) - 1
        return self._stamps[index][0] or None if offset >= 0 and index >= 0 else None

    def read(
        self, start: int, topics: Sequence[str], key: str | None, max_records: int
    ) -> tuple[list[tuple[int, bytes]], int]:
        """Records from an offset on, and where to go on; looks at `READ_AHEAD` records at most.

        Args:
            start: an offset; what is no longer kept is passed over.
            topics: none means all.
            key: None means all.
            max_records: at most so many.
        """
        found: list[tuple[int, bytes]] = []
        offset = max(start, self.first_offset)
        end = min(self.next_offset, offset + READ_AHEAD)
        while offset < end and len(found) < max_records:
            record = self._records.get(offset)
            if record is not None and (not topics or record.topic in topics) and key in (None, record.key):
                found.append((offset, record.data))
            offset += 1
        return found, offset

    def topic_stats(self, published: dict[str, int]) -> list[TopicStats]:
        """Figures by topic; reads every record once.

        Args:
            published: messages of each topic since the log began.
        """
        kept: dict[str, list[int]] = {}  # number, bytes, first and last offset
        for offset, record in self._records.items():
            row = kept.setdefault(record.topic, [0, 0, offset, offset])
            row[0] += 1
            row[1] += len(record.data)
            row[3] = offset
        stats = []
        for topic in sorted(published.keys() | kept):
            number, size, first, last = kept.get(topic, (0, 0, -1, -1))
            stats.append(
                TopicStats(
                    topic=topic,
                    published=published.get(topic, 0),
                    kept=number,
                    kept_bytes=size,
                    oldest_at=self.time_of(first),
                    newest_at=self.time_of(last),
                )
            )
        return stats
