"""The broker of one shard as a state machine: records, groups, leases, producers. No I/O, no clock, no threads.

Order within (topic, key) holds for a whole group, not only for a member: what a group has of one (topic, key) is a
*lane*, and while records of a lane are out with a member, the lane's next ones go to that member alone. When a lease
of a lane runs out, all that is out of this lane goes back, oldest first.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice
from typing import Any

from esper.leyline.errors import ConflictError, NotFoundError
from esper.leyline.summary import BusCounts
from esper.oona.wire import Batch, Leased, Record, runs_of

MAX_PRODUCERS = 10_000
"""Producers whose batch numbers are remembered; the longest silent is forgotten first."""

MAX_LEFT = 10_000
"""Members that left whose late polls are still recognised."""


class Admission(Enum):
    """What the broker would do with a batch now."""

    ACCEPT = auto()
    DUPLICATE = auto()  # appended before: acknowledge it again
    EARLY = auto()  # a batch of the same producer before it is not here yet
    FULL = auto()  # a topic's backlog has no room


@dataclass(slots=True)
class _Lane:
    """What a group has before it of one (topic, key)."""

    topic: str
    key: str
    ready: deque[int] = field(default_factory=deque)
    leased: dict[int, float] = field(default_factory=dict)  # offset -> deadline, in order of delivery
    owner: str | None = None


@dataclass(slots=True)
class _Group:
    name: str
    topics: frozenset[str]
    key: str | None
    seen_at: float
    lanes: dict[tuple[str, str], _Lane] = field(default_factory=dict)
    runnable: dict[tuple[str, str], None] = field(default_factory=dict)  # lanes with ready records, next one first
    attempts: dict[int, int] = field(default_factory=dict)  # of what was delivered and not acknowledged
    polls: dict[str, tuple[int, list[int]]] = field(default_factory=dict)  # member -> its last poll and what it got
    pending: Counter[str] = field(default_factory=Counter)  # topic -> not acknowledged

    def wants(self, topic: str, key: str) -> bool:
        return topic in self.topics and self.key in (None, key)

    def offer(self, topic: str, key: str, offsets: Iterable[int]) -> None:
        at = (topic, key)
        lane = self.lanes.get(at)
        if lane is None:
            lane = self.lanes[at] = _Lane(topic, key)
        before = len(lane.ready)
        lane.ready.extend(offsets)
        self.pending[topic] += len(lane.ready) - before
        self.runnable.setdefault(at)

    def revoke(self, lane: _Lane) -> None:
        """Takes back all that is out of this lane."""
        if lane.owner is not None:
            self.polls.pop(lane.owner, None)
        lane.ready.extendleft(sorted(lane.leased, reverse=True))
        lane.leased.clear()
        self.settle(lane)

    def settle(self, lane: _Lane) -> None:
        """Frees a lane that nothing is out of, and forgets one that holds nothing at all."""
        at = (lane.topic, lane.key)
        if not lane.leased:
            lane.owner = None
        if lane.ready:
            self.runnable.setdefault(at)
            return
        self.runnable.pop(at, None)
        if not lane.leased:
            self.lanes.pop(at, None)

    def oldest(self, default: int) -> int:
        """The lowest offset not acknowledged."""
        firsts = ((*lane.leased, *islice(lane.ready, 1)) for lane in self.lanes.values())
        return min((offset for lane in firsts for offset in lane), default=default)


class Broker:
    """The state of one shard.

    Args:
        lease_s: seconds a member has to acknowledge.
        backlog: records of a topic that a group may have before it until `admit` says FULL.
        retain: acknowledged records kept for groups that start from the start, at least; at most about twice as many.
    """

    def __init__(self, *, lease_s: float = 30.0, backlog: int = 100_000, retain: int = 200_000) -> None:
        self.lease_s = lease_s
        self.backlog = backlog
        self.retain = retain
        self.next_offset = 0
        self._records: dict[int, Record] = {}
        self._groups: dict[str, _Group] = {}
        self._producers: dict[str, int] = {}  # next batch number, longest silent first
        self._left: dict[str, None] = {}  # members, the newest last
        self._counts: dict[str, list[int]] = {}  # key -> published, delivered, redelivered
        self._expiry = math.inf  # no lease runs out before
        self._trim_at = 2 * retain

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
            for group in self._groups.values():
                if group.wants(topic, key):
                    added[group.name, topic] += count
                    held = group.pending[topic]
                    # a batch larger than the backlog passes alone
                    if held and held + added[group.name, topic] > self.backlog:
                        return Admission.FULL
        return Admission.ACCEPT

    def append(self, batch: Batch) -> None:
        """Takes an admitted batch; the records get the next offsets, in order."""
        self._producers.pop(batch.producer, None)
        self._producers[batch.producer] = batch.seq + 1
        if len(self._producers) > MAX_PRODUCERS:
            del self._producers[next(iter(self._producers))]
        start = offset = self.next_offset
        self.next_offset += len(batch.records)
        self._records.update(zip(range(start, self.next_offset), batch.records, strict=True))
        for topic, key, count in runs_of(batch.records):
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
        group = self._groups[name] = _Group(name, frozenset(topics), key, now)
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
        touched: dict[tuple[str, str], _Lane] = {}
        for offset in offsets:
            lane = self._lane(group, offset)
            if lane is None:
                continue
            # only in a replay: the log does not tell that a lease ran out, but the next lease of the lane does
            if lane.owner not in (None, member) or offset in lane.leased:
                group.revoke(lane)
            lane.ready.remove(offset)  # it is the first
            lane.leased[offset] = deadline
            lane.owner = member
            attempt = group.attempts[offset] = group.attempts.get(offset, 0) + 1
            count = self._count(lane.key)
            count[1] += 1
            count[2] += attempt > 1
            touched[lane.topic, lane.key] = lane
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
            if offset in lane.leased:
                del lane.leased[offset]
            else:
                lane.ready.remove(offset)
            del group.attempts[offset]
            group.pending[lane.topic] -= 1
            group.settle(lane)
            done.append(offset)
        return done

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
        published, delivered, redelivered = self._counts.get(key, (0, 0, 0))
        return BusCounts(published=published, delivered=delivered, redelivered=redelivered)

    def trim(self) -> None:
        """Drops the oldest records that every group has acknowledged, but keeps `retain`."""
        oldest = min((group.oldest(self.next_offset) for group in self._groups.values()), default=self.next_offset)
        keep = min(oldest, self.next_offset - self.retain)
        for offset in range(self.first_offset, keep):
            del self._records[offset]
        self._trim_at = len(self._records) + self.retain

    def snapshot(self) -> dict[str, Any]:
        """All that the kept records do not tell, as JSON values."""
        return {
            "next_offset": self.next_offset,
            "producers": self._producers,
            "counts": self._counts,
            "groups": [(group.name, sorted(group.topics), group.key) for group in self._groups.values()],
        }

    def restore(self, snapshot: dict[str, Any], *, now: float) -> None:
        """Takes over a snapshot; records from its `next_offset` on are to be appended again.

        What groups had before them of earlier records is not in it: it must have been acknowledged, as it is when
        `first_offset` has passed the snapshot.
        """
        self.next_offset = snapshot["next_offset"]
        self._producers = dict(snapshot["producers"])
        self._counts = {key: list(values) for key, values in snapshot["counts"].items()}
        self._groups = {name: _Group(name, frozenset(topics), key, now) for name, topics, key in snapshot["groups"]}

    # ---- within

    def _group(self, name: str) -> _Group:
        group = self._groups.get(name)
        if group is None:
            raise NotFoundError(f"no group {name}; it never joined, or was idle for too long and forgotten")
        return group

    def _count(self, key: str) -> list[int]:
        return self._counts.setdefault(key, [0, 0, 0])

    def _lane(self, group: _Group, offset: int) -> _Lane | None:
        record = self._records.get(offset)
        return None if record is None else group.lanes.get((record.topic, record.key))

    def _is_leased(self, group: _Group, offset: int, member: str) -> bool:
        lane = self._lane(group, offset)
        return lane is not None and lane.owner == member and offset in lane.leased

    def _choose(self, group: _Group, member: str, max_records: int) -> list[int]:
        chosen: list[int] = []
        for at in group.runnable:
            lane = group.lanes[at]
            if lane.owner in (None, member):
                chosen.extend(islice(lane.ready, max_records - len(chosen)))
                if len(chosen) >= max_records:
                    break
        return chosen

    def _leased(self, group: _Group, offsets: Sequence[int]) -> list[Leased]:
        return [Leased(offset, group.attempts[offset], self._records[offset].data) for offset in offsets]
