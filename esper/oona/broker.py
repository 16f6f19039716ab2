"""The broker of one shard as a state machine: records, groups, leases, producers. No I/O, no clock, no threads.

Order within (topic, key) holds for a whole group, not only for a member: what a group has of one (topic, key) is a
*lane*, and while records of a lane are out with a member, the lane's next ones go to that member alone. When a lease
of a lane runs out, all that is out of this lane goes back, oldest first.

A record that came back too often is *spent*: `exhausted` names it and `bury` takes it from the group. Its last delivery
is of it alone, so that what merely travelled with it is not given up too. Where a topic drops its oldest, `surplus`
names what has to go before a batch and `drop` lets it go. What decides and what acts are apart, because a log must
repeat the acts without deciding again.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any

from esper.config import OonaConfig
from esper.leyline.bus import BusStats, GroupStats, TopicStats
from esper.leyline.errors import ConflictError, NotFoundError
from esper.leyline.messages import Topic
from esper.leyline.summary import BusCounts
from esper.oona.groups import Group, Lane
from esper.oona.wire import Batch, Leased, Record, runs_of

MAX_PRODUCERS = 10_000
"""Producers whose batch numbers are remembered; the longest silent is forgotten first."""

_LETTERS = Topic.DEAD_LETTERS.value

READ_AHEAD = 20_000
"""Records that one `read` looks at."""

MAX_LEFT = 10_000
"""Members that left whose late polls are still recognised."""


class Admission(Enum):
    """What the broker would do with a batch now."""

    ACCEPT = auto()
    DUPLICATE = auto()  # appended before: acknowledge it again
    EARLY = auto()  # a batch of the same producer before it is not here yet
    FULL = auto()  # a topic's backlog has no room


class Broker:
    """The state of one shard.

    Args:
        lease_s: seconds a member has to acknowledge.
        backlog: records of a topic that a group may have before it until `admit` says FULL.
        retain: acknowledged records kept for groups that start from the start, at least; at most about twice as many.
        max_deliveries: of one record to one group; None is no limit.
        drop_oldest: topics that are never FULL.
    """

    def __init__(
        self,
        *,
        lease_s: float = 30.0,
        backlog: int = 100_000,
        retain: int = 200_000,
        max_deliveries: int | None = None,
        drop_oldest: Iterable[str] = (),
    ) -> None:
        self.lease_s = lease_s
        self.backlog = backlog
        self.retain = retain
        self.max_deliveries = max_deliveries
        self.drop_oldest = frozenset(drop_oldest)
        self.next_offset = 0
        self._records: dict[int, Record] = {}
        self._groups: dict[str, Group] = {}
        self._producers: dict[str, int] = {}  # next batch number, longest silent first
        self._left: dict[str, None] = {}  # members, the newest last
        self._counts: dict[str, list[int]] = {}  # key -> published, delivered, redelivered, dropped, dead
        self._published: Counter[str] = Counter()  # by topic
        self._stamps: list[tuple[float, int]] = []  # when a batch came, and its first offset; both ascend
        self._expiry = math.inf  # no lease runs out before
        self._trim_at = 2 * retain

    @classmethod
    def of(cls, config: OonaConfig) -> Broker:
        """A fresh broker with these settings."""
        return cls(
            lease_s=config.lease_s,
            backlog=config.backlog,
            max_deliveries=config.max_deliveries,
            drop_oldest=config.drop_oldest,
        )

    # ---- producers

    def admit(self, batch: Batch) -> Admission:
        """Says whether `append` may take this batch now."""
        expected = max(self._producers.get(batch.producer, batch.base), batch.base)
        if batch.seq < expected:
            return Admission.DUPLICATE
        if batch.seq > expected:
            return Admission.EARLY
        added: Counter[tuple[str, str]] = Counter()
        for topic, key, count in runs_of(batch.records):
            if topic in self.drop_oldest:
                continue
            for group in self._groups.values():
                if group.wants(topic, key):
                    added[group.name, topic] += count
                    held = group.pending[topic]
                    # a batch larger than the backlog passes alone
                    if held and held + added[group.name, topic] > self.backlog:
                        return Admission.FULL
        return Admission.ACCEPT

    def surplus(self, batch: Batch) -> dict[str, list[int]]:
        """What has to give way to this batch, by group: the oldest records of topics that drop, if none has them."""
        if not self.drop_oldest:
            return {}
        added: Counter[tuple[str, str]] = Counter()
        for topic, key, count in runs_of(batch.records):
            if topic in self.drop_oldest:
                for group in self._groups.values():
                    added[group.name, topic] += count * group.wants(topic, key)
        surplus: dict[str, list[int]] = {}
        for (name, topic), count in added.items():
            group = self._groups[name]
            excess = group.pending[topic] + count - self.backlog
            if count and excess > 0 and (oldest := group.oldest_ready(topic, excess)):
                surplus.setdefault(name, []).extend(oldest)
        return surplus

    def drop(self, name: str, offsets: Sequence[int]) -> None:
        """Lets records go that `surplus` named."""
        group = self._group(name)
        for offset in offsets:
            lane = self._lane(group, offset)
            if lane is not None:
                group.remove(lane, offset)
                group.num_dropped += 1
                self._count(lane.key)[3] += 1

    def append(self, batch: Batch, at: float = 0.0) -> None:
        """Takes an admitted batch; the records get the next offsets, in order.

        Args:
            batch: what `admit` accepted.
            at: the time, seconds since the epoch; 0 if it is not known. A clock that was set back stands still here.
        """
        self._producers.pop(batch.producer, None)
        self._producers[batch.producer] = batch.seq + 1
        if len(self._producers) > MAX_PRODUCERS:
            del self._producers[next(iter(self._producers))]
        self._append(batch.records, at)

    def _append(self, records: Sequence[Record], at: float) -> None:
        start = offset = self.next_offset
        self.next_offset += len(records)
        self._records.update(zip(range(start, self.next_offset), records, strict=True))
        self._stamps.append((max(at, self._stamps[-1][0] if self._stamps else 0.0), start))
        for topic, key, count in runs_of(records):
            self._published[topic] += count
            if topic != _LETTERS:  # told by `dead`; they were published once already
                self._count(key)[0] += count
            for group in self._groups.values():
                if group.wants(topic, key):
                    group.offer(topic, key, range(offset, offset + count))
            offset += count
        if len(self._records) > self._trim_at:
            self.trim()

    # ---- groups

    def join(self, name: str, topics: Sequence[str], *, key: str | None, start: int, now: float) -> bool:
        """Makes a group known; returns whether it is new. A known group keeps its position, a new one gets the kept
        records from offset `start` on.

        Raises:
            ConflictError: if the group exists with other topics or another key.
        """
        group = self._groups.get(name)
        if group is not None:
            if group.topics != frozenset(topics) or group.key != key:
                known = ", ".join(sorted(group.topics))
                raise ConflictError(
                    f"group {name} reads {known} with key {group.key}",
                    field="group",
                    remedy="use another group name for another selection",
                )
            group.seen_at = now
            return False
        group = self._groups[name] = Group(name, frozenset(topics), key, now, self.max_deliveries)
        for offset in range(max(start, self.first_offset), self.next_offset):
            record = self._records[offset]
            if group.wants(record.topic, record.key):
                group.offer(record.topic, record.key, (offset,))
        return True

    def poll(self, name: str, member: str, number: int, max_records: int, now: float) -> list[Leased]:
        """Leases the next records to a member, lanes in turn.

        A repeated `number` means that the last answer was lost: the same records are given again, as the same
        attempt.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._group(name)
        group.seen_at = now
        if member in self._left:
            return []
        last, offsets = group.polls.get(member, (-1, []))
        if last == number:
            again = [offset for offset in offsets if self._is_leased(group, offset, member)]
            if again:
                return self._leased(group, again)
        chosen = self._choose(group, member, max_records)
        if chosen:
            self.lease(name, member, number, chosen, now + self.lease_s)
        return self._leased(group, chosen)

    def lease(self, name: str, member: str, number: int, offsets: Sequence[int], deadline: float) -> None:
        """Marks records as out with a member. `poll` decides which; a replayed log calls this directly."""
        group = self._group(name)
        touched: dict[tuple[str, str], Lane] = {}
        num_delivered, num_redelivered = 0, 0
        for offset in offsets:
            lane = self._lane(group, offset)
            if lane is None:
                continue
            # only in a replay: the log does not tell that a lease ran out, but the next lease of the lane does
            if lane.owner not in (None, member) or offset in lane.leased:
                group.revoke(lane)
            num_delivered += 1
            lane.ready.remove(offset)  # it is the first
            lane.leased[offset] = deadline
            lane.owner = member
            attempt = group.attempts[offset] = group.attempts.get(offset, 0) + 1
            num_redelivered += attempt > 1
            if lane.topic != _LETTERS:
                count = self._count(lane.key)
                count[1] += 1
                count[2] += attempt > 1
            touched[lane.topic, lane.key] = lane
        group.num_delivered += num_delivered
        group.num_redelivered += num_redelivered
        for at, lane in touched.items():
            group.runnable.pop(at, None)  # to the end of the turn
            group.settle(lane)
        group.polls[member] = (number, list(offsets))
        self._expiry = min(self._expiry, deadline)

    def ack(self, name: str, offsets: Sequence[int], now: float) -> list[int]:
        """Acknowledges records, whoever holds them now; returns those that were not acknowledged before.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._group(name)
        group.seen_at = now
        done: list[int] = []
        for offset in offsets:
            if offset not in group.attempts:
                continue
            lane = self._lane(group, offset)
            if lane is None:
                continue
            group.remove(lane, offset)
            done.append(offset)
        return done

    def exhausted(self, name: str) -> list[int]:
        """Records that came back after their last delivery.

        Raises:
            NotFoundError: if there is no such group.
        """
        return list(self._group(name).spent)

    def held(self, name: str, offsets: Iterable[int]) -> list[tuple[int, int, Record]]:
        """(offset, attempts, record) of those that were delivered to the group and are not acknowledged.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._group(name)
        known = ((offset, group.attempts.get(offset), self._records.get(offset)) for offset in offsets)
        return [(offset, attempts, record) for offset, attempts, record in known if attempts and record is not None]

    def bury(self, name: str, offsets: Sequence[int], letters: Sequence[Record], at: float = 0.0) -> None:
        """Takes records from a group for good, and appends the letters that tell of them.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._group(name)
        for offset in offsets:
            lane = self._lane(group, offset)
            if lane is not None and offset in group.attempts:
                group.remove(lane, offset)
                group.num_dead += 1
                if lane.topic != _LETTERS:
                    self._count(lane.key)[4] += 1
        if letters:
            self._append(letters, at)

    def leave(self, name: str, member: str) -> None:
        """Takes back at once what a member holds, for good: a poll of it that comes late gets nothing.

        Leaving twice, or a group that is gone, is harmless.
        """
        self._left[member] = None
        if len(self._left) > MAX_LEFT:
            del self._left[next(iter(self._left))]
        group = self._groups.get(name)
        if group is None:
            return
        for lane in [lane for lane in group.lanes.values() if lane.owner == member]:
            group.revoke(lane)
        group.polls.pop(member, None)

    def has_left(self, member: str) -> bool:
        """Whether the member is gone: it need not wait any longer."""
        return member in self._left

    def expire(self, now: float) -> int:
        """Takes back every lane with a lease that ran out; returns how many."""
        if now < self._expiry:
            return 0
        num_expired = 0
        self._expiry = math.inf
        for group in self._groups.values():
            for lane in list(group.lanes.values()):
                deadline = next(iter(lane.leased.values()), math.inf)
                if deadline <= now:
                    group.revoke(lane)
                    num_expired += 1
                else:
                    self._expiry = min(self._expiry, deadline)
        return num_expired

    def idle_groups(self, now: float, idle_s: float, *, pending: int = 0) -> list[str]:
        """Groups that nobody has joined, polled or acknowledged for so long.

        Args:
            now: seconds, on the clock of the other calls.
            idle_s: seconds.
            pending: only groups that hold at least so many records of one topic.
        """
        idle = (group for group in self._groups.values() if now - group.seen_at > idle_s)
        return [group.name for group in idle if max(group.pending.values(), default=0) >= pending]

    def forget(self, name: str) -> None:
        """Drops a group and its position."""
        self._groups.pop(name, None)

    # ---- what is kept

    @property
    def first_offset(self) -> int:
        """The lowest offset kept."""
        return next(iter(self._records), self.next_offset)

    @property
    def next_expiry(self) -> float:
        """No lease runs out before this time."""
        return self._expiry

    @property
    def groups(self) -> list[str]:
        return list(self._groups)

    def counts(self, key: str) -> BusCounts:
        """Messages with this key. `delivered` counts every delivery to every group, `redelivered` the repeated ones."""
        published, delivered, redelivered, dropped, dead = self._counts.get(key, (0, 0, 0, 0, 0))
        return BusCounts(published=published, delivered=delivered, redelivered=redelivered, dropped=dropped, dead=dead)

    def stats(self, now: float) -> BusStats:
        """Figures of this shard; reads every kept record once.

        Args:
            now: on the clock of the other calls.
        """
        kept: dict[str, list[int]] = {}  # number, bytes, first and last offset
        for offset, record in self._records.items():
            row = kept.setdefault(record.topic, [0, 0, offset, offset])
            row[0] += 1
            row[1] += len(record.data)
            row[3] = offset
        topics = []
        for topic in sorted(self._published | kept):
            number, size, first, last = kept.get(topic, (0, 0, -1, -1))
            topics.append(
                TopicStats(
                    topic=topic,
                    published=self._published[topic],
                    kept=number,
                    kept_bytes=size,
                    oldest_at=self._time_of(first),
                    newest_at=self._time_of(last),
                )
            )
        groups = [self._group_stats(group, now) for _, group in sorted(self._groups.items())]
        return BusStats(num_shards=1, topics=tuple(topics), groups=tuple(groups))

    # ---- reading without a group

    def offset_at(self, at: float) -> int:
        """The first offset that came at or after this time, in seconds since the epoch."""
        index = bisect_left(self._stamps, (at, -1))
        return self._stamps[index][1] if index < len(self._stamps) else self.next_offset

    def read(
        self, start: int, topics: Sequence[str], key: str | None, max_records: int
    ) -> tuple[list[tuple[int, bytes]], int]:
        """Kept records from an offset on, and where to go on; looks at `READ_AHEAD` records at most.

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
            record = self._records[offset]
            if (not topics or record.topic in topics) and key in (None, record.key):
                found.append((offset, record.data))
            offset += 1
        return found, offset

    def trim(self) -> None:
        """Drops the oldest records that every group has acknowledged, but keeps `retain`."""
        oldest = min((group.oldest(self.next_offset) for group in self._groups.values()), default=self.next_offset)
        keep = min(oldest, self.next_offset - self.retain)
        for offset in range(self.first_offset, keep):
            del self._records[offset]
        self._trim_at = len(self._records) + self.retain
        first = self.first_offset
        passed = next((at for at, (_, start) in enumerate(self._stamps) if start > first), len(self._stamps))
        del self._stamps[: max(0, passed - 1)]  # the last of these may hold the first record

    def snapshot(self) -> dict[str, Any]:
        """All that the kept records do not tell, as JSON values."""
        return {
            "next_offset": self.next_offset,
            "producers": self._producers,
            "counts": self._counts,
            "groups": [
                (group.name, sorted(group.topics), group.key, group.counters()) for group in self._groups.values()
            ],
            "published": self._published,
        }

    def restore(self, snapshot: dict[str, Any], *, now: float) -> None:
        """Takes over a snapshot; records from its `next_offset` on are to be appended again.

        What groups had before them of earlier records is not in it: it must have been acknowledged, as it is when
        `first_offset` has passed the snapshot.
        """
        self.next_offset = snapshot["next_offset"]
        self._producers = dict(snapshot["producers"])
        self._counts = {key: _padded(values) for key, values in snapshot["counts"].items()}
        self._published = Counter(snapshot.get("published", {}))  # logs of the first form have none
        self._groups = {}
        for name, topics, key, *counters in snapshot["groups"]:
            group = self._groups[name] = Group(name, frozenset(topics), key, now, self.max_deliveries)
            if counters:
                group.num_delivered, group.num_redelivered, group.num_dropped, group.num_dead = counters[0]

    # ---- within

    def _group(self, name: str) -> Group:
        group = self._groups.get(name)
        if group is None:
            raise NotFoundError(f"no group {name}; it never joined, or was idle for too long and forgotten")
        return group

    def _count(self, key: str) -> list[int]:
        return self._counts.setdefault(key, _padded(()))

    def _time_of(self, offset: int) -> float | None:
        """When a record came; None if that is not known."""
        index = bisect_left(self._stamps, offset + 1, key=lambda stamp: stamp[1]) - 1
        return self._stamps[index][0] or None if offset >= 0 and index >= 0 else None

    def _group_stats(self, group: Group, now: float) -> GroupStats:
        owners = {lane.owner for lane in group.lanes.values()} - {None}
        return GroupStats(
            group=group.name,
            topics=tuple(sorted(group.topics)),
            key=group.key,
            members=len(owners),
            pending=group.pending.total(),
            leased=sum(len(lane.leased) for lane in group.lanes.values()),
            delivered=group.num_delivered,
            redelivered=group.num_redelivered,
            dropped=group.num_dropped,
            dead=group.num_dead,
            idle_s=max(0.0, now - group.seen_at),
        )

    def _lane(self, group: Group, offset: int) -> Lane | None:
        record = self._records.get(offset)
        return None if record is None else group.lanes.get((record.topic, record.key))

    def _is_leased(self, group: Group, offset: int, member: str) -> bool:
        lane = self._lane(group, offset)
        return lane is not None and lane.owner == member and offset in lane.leased

    def _choose(self, group: Group, member: str, max_records: int) -> list[int]:
        chosen: list[int] = []
        for at in group.runnable:
            lane = group.lanes[at]
            if lane.owner not in (None, member) or group.is_last_out(lane):
                continue
            few, is_last = group.next_of(lane, max_records - len(chosen))
            if is_last:
                if chosen or lane.leased:  # it waits until nothing goes with it
                    continue
                return few
            chosen.extend(few)
            if len(chosen) >= max_records:
                break
        return chosen

    def _leased(self, group: Group, offsets: Sequence[int]) -> list[Leased]:
        return [Leased(offset, group.attempts[offset], self._records[offset].data) for offset in offsets]


def _padded(values: Sequence[int]) -> list[int]:
    """The five figures of a key; logs of the first form have three."""
    return [*values, *[0] * (5 - len(values))]
