"""What one consumer group has before it, lane by lane. The broker decides what goes in and who gets it."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from esper.leyline.bus import GroupStats

LISTENER = "listener-"
"""How the names of groups begin that are one listener's alone."""


@dataclass(slots=True)
class Lane:
    """What a group has before it of one (topic, key)."""

    topic: str
    key: str
    ready: deque[int] = field(default_factory=deque)
    leased: dict[int, float] = field(default_factory=dict)  # offset -> deadline, in order of delivery
    owner: str | None = None


@dataclass(slots=True)
class Group:
    """A group's selection, its position in every lane, and its figures."""

    name: str
    topics: frozenset[str]
    key: str | None
    seen_at: float
    limit: int | None = None  # deliveries, then a record is spent
    lanes: dict[tuple[str, str], Lane] = field(default_factory=dict)
    runnable: dict[tuple[str, str], None] = field(default_factory=dict)  # lanes with ready records, next one first
    attempts: dict[int, int] = field(default_factory=dict)  # of what was delivered and not acknowledged
    polls: dict[str, tuple[int, list[int]]] = field(default_factory=dict)  # member -> its last poll and what it got
    pending: Counter[str] = field(default_factory=Counter)  # topic -> not acknowledged
    spent: dict[int, None] = field(default_factory=dict)  # came back after their last delivery
    num_delivered: int = 0
    num_redelivered: int = 0
    num_acknowledged: int = 0
    num_dropped: int = 0
    num_dead: int = 0

    def wants(self, topic: str, key: str) -> bool:
        return topic in self.topics and self.key in (None, key)

    def offer(self, topic: str, key: str, offsets: Iterable[int]) -> None:
        at = (topic, key)
        lane = self.lanes.get(at)
        if lane is None:
            lane = self.lanes[at] = Lane(topic, key)
        before = len(lane.ready)
        lane.ready.extend(offsets)
        self.pending[topic] += len(lane.ready) - before
        self.runnable.setdefault(at)

    def stats(self, now: float) -> GroupStats:
        """Its figures."""
        return GroupStats(
            group=self.name,
            topics=tuple(sorted(self.topics)),
            key=self.key,
            members=len({lane.owner for lane in self.lanes.values()} - {None}),
            pending=self.pending.total(),
            leased=sum(len(lane.leased) for lane in self.lanes.values()),
            delivered=self.num_delivered,
            redelivered=self.num_redelivered,
            acknowledged=self.num_acknowledged,
            dropped=self.num_dropped,
            dead=self.num_dead,
            idle_s=max(0.0, now - self.seen_at),
        )

    def counters(self) -> tuple[int, ...]:
        """What a snapshot keeps of it."""
        return self.num_delivered, self.num_redelivered, self.num_dropped, self.num_dead, self.num_acknowledged

    def restore(self, counters: Sequence[int]) -> None:
        """Takes over what a snapshot kept; those of earlier logs have four."""
        self.num_delivered, self.num_redelivered, self.num_dropped, self.num_dead = counters[:4]
        self.num_acknowledged = counters[4] if len(counters) > 4 else 0

    def is_last_out(self, lane: Lane) -> bool:
        """Whether a record of this lane is out for its last delivery."""
        first = next(iter(lane.leased), None)
        return self.limit is not None and first is not None and self.attempts[first] >= self.limit

    def next_of(self, lane: Lane, count: int) -> tuple[list[int], bool]:
        """The next records of a lane, and whether it is one alone, for its last delivery."""
        few = list(islice(lane.ready, count))
        if self.limit is None or (self.limit > 1 and few[0] not in self.attempts):
            return few, False  # what came back lies before what never was out
        last = next((i for i, offset in enumerate(few) if self.attempts.get(offset, 0) + 1 >= self.limit), None)
        return (few[:1], True) if last == 0 else (few[:last], False)

    def revoke(self, lane: Lane) -> None:
        """Takes back all that is out of this lane."""
        if lane.owner is not None:
            self.polls.pop(lane.owner, None)
        if self.limit is not None:
            self.spent.update((offset, None) for offset in lane.leased if self.attempts[offset] >= self.limit)
        lane.ready.extendleft(sorted(lane.leased, reverse=True))
        lane.leased.clear()
        self.settle(lane)

    def settle(self, lane: Lane) -> None:
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

    def hand_out(self, lane: Lane, offsets: Sequence[int], member: str, deadline: float) -> int:
        """Gives the first of a lane to a member; returns how many of them were out before."""
        ready, attempts, num_again = lane.ready, self.attempts, 0
        for offset in offsets:
            if ready[0] == offset:
                ready.popleft()
            else:
                ready.remove(offset)
            before = attempts.get(offset, 0)
            attempts[offset] = before + 1
            num_again += before > 0
        lane.leased.update(dict.fromkeys(offsets, deadline))
        lane.owner = member
        self.num_delivered += len(offsets)
        self.num_redelivered += num_again
        return num_again

    def remove(self, lane: Lane, offsets: Sequence[int]) -> None:
        """Ends records of a lane for this group, wherever they are."""
        for offset in offsets:
            if offset in lane.leased:
                del lane.leased[offset]
            else:
                lane.ready.remove(offset)
            self.attempts.pop(offset, None)
        if self.spent:
            for offset in offsets:
                self.spent.pop(offset, None)
        self.pending[lane.topic] -= len(offsets)
        self.settle(lane)

    def oldest_ready(self, topic: str, count: int) -> list[int]:
        """The oldest records of a topic that are with no member."""
        ready = (lane.ready for lane in self.lanes.values() if lane.topic == topic)
        return list(islice(heapq.merge(*ready), count))

    def oldest(self, default: int) -> int:
        """The lowest offset not acknowledged."""
        firsts = ((*lane.leased, *islice(lane.ready, 1)) for lane in self.lanes.values())
        return min((offset for lane in firsts for offset in lane), default=default)
