"""The records that one shard keeps: blocks by offset, with the time at which each batch came, and how long they stay.

Knows nothing of groups: what somebody still needs is said by the caller.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from esper.leyline.bus import TopicStats
from esper.oona.packed import Packed
from esper.oona.wire import Block, Record

READ_AHEAD = 20_000
"""Records that one `read` looks at."""
FEW = 16
"""A block with fewer records is kept apart from what it came with."""


class Held(NamedTuple):
    """What is kept of consecutive offsets of one block."""

    start: int
    topic: str
    key: str
    records: Packed

    @property
    def stop(self) -> int:
        """The offset behind the last."""
        return self.start + len(self.records)


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
        self._first = 0  # records below it are gone, though their block may be there
        self._starts: list[int] = []  # offset of each block's first record
        self._blocks: list[Block] = []
        self._num_records = 0
        self._stamps: list[tuple[float, int]] = []  # when a batch came, and its first offset; both ascend
        self._count_limit = 2 * retain
        self._bytes_limit = retain_bytes
        self._look_at = 0.0  # when some may be too old

    def get(self, offset: int) -> Record | None:
        """The record, if it is kept."""
        return next(
            (Record(topic, key, records[0]) for _, topic, key, records in self.within(offset, offset + 1)), None
        )

    def within(self, start: int, stop: int) -> Iterator[Held]:
        """What is kept of offsets from `start` to before `stop`, by blocks."""
        start = max(start, self._first)
        index = max(0, bisect_right(self._starts, start) - 1)
        for at in range(index, len(self._starts)):
            first = self._starts[at]
            if first >= stop:
                return
            topic, key, records = self._blocks[at]
            begin, end = max(0, start - first), min(len(records), stop - first)
            if begin < end:
                yield Held(first + begin, topic, key, records.part(begin, end))

    def places(self, spans: Iterable[range]) -> Iterator[tuple[str, str, int, int]]:
        """(topic, key, start, stop) of what is kept of the spans, by blocks; `within` without the bytes."""
        starts, blocks = self._starts, self._blocks
        for span in spans:
            start = max(span.start, self._first)
            at = max(0, bisect_right(starts, start) - 1)
            while at < len(starts) and (first := starts[at]) < span.stop:
                topic, key, records = blocks[at]
                begin, end = max(start, first), min(first + len(records), span.stop)
                if begin < end:
                    yield topic, key, begin, end
                at += 1

    @property
    def first_offset(self) -> int:
        """The lowest offset kept."""
        return max(self._first, self._starts[0]) if self._starts else self.next_offset

    @property
    def newest_at(self) -> float:
        """When the last batch came; 0 if there is none."""
        return self._stamps[-1][0] if self._stamps else 0.0

    def skip_to(self, offset: int) -> None:
        """The next record has this offset, if it would have a lower one."""
        self.next_offset = max(self.next_offset, offset)

    def append(self, blocks: Sequence[Block], at: float) -> int:
        """Takes records that came at a time; returns the offset of the first. A clock set back stands still here."""
        start = self.next_offset
        for block in blocks:
            self._starts.append(self.next_offset)
            few = len(block.records) < FEW
            self._blocks.append(block._replace(records=block.records.apart()) if few else block)
            self.next_offset += len(block.records)
            self.num_bytes += block.records.num_bytes
        self._num_records += self.next_offset - start
        self._stamps.append((max(at, self.newest_at), start))
        return start

    # ---- how long

    def is_due(self, at: float) -> bool:
        """Whether there is so much, or something so old, that `trim` may find something."""
        return (
            self._num_records > self._count_limit
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
        if self.retain_bytes is not None:
            stop = max(stop, self._offset_of_last(self.retain_bytes, stop, needed))
        self._drop_below(stop)
        self._count_limit = self._num_records + self.retain
        if self.retain_bytes is not None:
            self._bytes_limit = max(self.retain_bytes, self.num_bytes) + self.retain_bytes // 4
        first = self.first_offset
        passed = next((at for at, (_, start) in enumerate(self._stamps) if start > first), len(self._stamps))
        del self._stamps[: max(0, passed - 1)]  # the last of these may hold the first record

    def is_held_back(self, at: float) -> bool:
        """Whether there is twice as much, or something twice as old, as would be kept if nobody needed it.

        Args:
            at: the present, seconds since the epoch; 0 if it is not known.
        """
        if self.retain_bytes is not None and self.num_bytes > 2 * self.retain_bytes:
            return True
        oldest_at = self._stamps[0][0] if self._stamps else 0.0
        return self.retain_s is not None and bool(oldest_at) and at - oldest_at > 2 * self.retain_s

    def _offset_of_last(self, num_bytes: int, start: int, stop: int) -> int:
        """The lowest offset from `start` to `stop` from which on the records have at most so many bytes, or `stop`."""
        excess = self.num_bytes - num_bytes
        for held in self.within(self._first, stop):
            size = held.records.num_bytes
            if held.stop > start and excess < size:
                sizes = (len(data) for data in held.records)
                dropped = next((n for n, total in enumerate(accumulate(sizes, initial=0)) if total >= excess), 0)
                return max(start, held.start + dropped)
            excess -= size
        return stop

    def _drop_below(self, offset: int) -> None:
        passed = 0
        for held in self.within(self._first, offset):
            self.num_bytes -= held.records.num_bytes
            self._num_records -= len(held.records)
        self._first = max(self._first, offset)
        while passed < len(self._starts) and self._starts[passed] + len(self._blocks[passed].records) <= self._first:
            passed += 1
        del self._starts[:passed], self._blocks[:passed]

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
        start = max(start, self.first_offset)
        end = min(self.next_offset, start + READ_AHEAD)
        for held in self.within(start, end):
            if (topics and held.topic not in topics) or key not in (None, held.key):
                continue
            few = held.records.part(0, min(len(held.records), max_records - len(found)))
            found.extend(enumerate(few, held.start))
            if len(found) == max_records:
                return found, held.start + len(few)
        return found, max(start, end)

    def topic_stats(self, published: dict[str, int]) -> list[TopicStats]:
        """Figures by topic; looks at every block once.

        Args:
            published: messages of each topic since the log began.
        """
        kept: dict[str, list[int]] = {}  # number, bytes, first and last offset
        for held in self.within(self._first, self.next_offset):
            row = kept.setdefault(held.topic, [0, 0, held.start, held.start])
            row[0] += len(held.records)
            row[1] += held.records.num_bytes
            row[3] = held.stop - 1
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
