"""What one consumer group has before it, lane by lane. The broker decides what goes in and who gets it."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from esper.leyline.bus import GroupStats
from esper.oona.spans import Run, cut, num_in, overlap, spans_of, without

LISTENER = "listener-"
"""How the names of groups begin that are one listener's alone."""


@dataclass(slots=True)
class Lane:
    """What a group has before it of one (topic, key)."""

    topic: str
    key: str
    ready: deque[Run] = field(default_factory=deque)  # ascending; what came back lies before what never was out
    leased: deque[Run] = field(default_factory=deque)  # ascending
    owner: str | None = None

    @property
    def deadline(self) -> float:
        """When the first of its leases runs out; there is one."""
        return min([run.deadline for run in self.leased])


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
    polls: dict[str, tuple[int, list[range]]] = field(default_factory=dict)  # member -> its last poll and what it got
    pending: Counter[str] = field(default_factory=Counter)  # topic -> not acknowledged
    spent: list[range] = field(default_factory=list)  # came back after their last delivery
    dead: list[range] = field(default_factory=list)  # given up, and not asked for again
    num_delivered: int = 0
    num_redelivered: int = 0
    num_acknowledged: int = 0
    num_dropped: int = 0
    num_dead: int = 0

    def wants(self, topic: str, key: str) -> bool:
        return topic in self.topics and self.key in (None, key)

    def offer(self, topic: str, key: str, start: int, stop: int) -> None:
        """New records of a lane."""
        at = (topic, key)
        lane = self.lanes.get(at)
        if lane is None:
            lane = self.lanes[at] = Lane(topic, key)
        ready = lane.ready
        if ready and ready[-1].stop == start and not ready[-1].attempts:
            ready[-1] = Run(ready[-1].start, stop)
        else:
            ready.append(Run(start, stop))
        self.pending[topic] += stop - start
        self.runnable.setdefault(at)

    def offer_again(self, topic: str, key: str, spans: Sequence[range]) -> None:
        """Records of a lane that were given up, in their place among the others, as if they never had been out."""
        for span in spans:
            self.offer(topic, key, span.start, span.stop)
        lane = self.lanes[topic, key]
        lane.ready = deque(sorted(lane.ready))

    def stats(self, now: float) -> GroupStats:
        """Its figures."""
        return GroupStats(
            group=self.name,
            topics=tuple(sorted(self.topics)),
            key=self.key,
            members=len({lane.owner for lane in self.lanes.values()} - {None}),
            pending=self.pending.total(),
            leased=sum(num_in(lane.leased) for lane in self.lanes.values()),
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
        return self.limit is not None and bool(lane.leased) and lane.leased[0].attempts >= self.limit

    def next_of(self, lane: Lane, count: int) -> tuple[list[range], bool]:
        """The next records of a lane, and whether it is one alone, for its last delivery."""
        few: list[range] = []
        for run in lane.ready:
            if self.limit is not None and run.attempts + 1 >= self.limit:
                return (few, False) if few else ([range(run.start, run.start + 1)], True)
            few.append(range(run.start, min(run.stop, run.start + count)))
            count -= len(few[-1])
            if count <= 0:
                break
        return few, False

    def choose(self, member: str, max_records: int) -> list[range]:
        """The next records for a member, lanes in turn; one alone where that is its last delivery."""
        chosen: list[range] = []
        for at in self.runnable:
            lane = self.lanes[at]
            if lane.owner not in (None, member) or self.is_last_out(lane):
                continue
            few, is_last = self.next_of(lane, max_records)
            if is_last:
                if chosen or lane.leased:  # it waits until nothing goes with it
                    continue
                return few
            chosen.extend(few)
            max_records -= num_in(few)
            if max_records <= 0:
                break
        return chosen

    def revoke(self, lane: Lane) -> None:
        """Takes back all that is out of this lane."""
        if lane.owner is not None:
            self.polls.pop(lane.owner, None)
        back = [run._replace(deadline=0.0) for run in lane.leased]
        if self.limit is not None and (spent := [run for run in back if run.attempts >= self.limit]):
            self.spent = spans_of([*self.spent, *(range(run.start, run.stop) for run in spent)])
        lane.leased.clear()
        lane.ready.extendleft(reversed(back))
        if back and len(lane.ready) > len(back) and lane.ready[len(back)].start < back[-1].stop:
            lane.ready = deque(sorted(lane.ready))  # only in a replay of a log of which a part was lost
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

    def hand_out(self, lane: Lane, spans: Sequence[range], member: str, deadline: float) -> tuple[int, int]:
        """Gives records of a lane to a member; returns how many, and how many of them were out before.

        Raises:
            ValueError: if some of them are not there.
        """
        num, num_again = 0, 0
        is_behind = True
        for start, stop, attempts, _ in self._taken(lane, cut(lane.ready, spans), spans):
            is_behind = is_behind and (not lane.leased or lane.leased[-1].stop <= start)
            lane.leased.append(Run(start, stop, attempts + 1, deadline))
            num += stop - start
            num_again += stop - start if attempts else 0
        if not is_behind:
            lane.leased = deque(sorted(lane.leased))
        lane.owner = member
        self.num_delivered += num
        self.num_redelivered += num_again
        return num, num_again

    def outstanding(self, lane: Lane, spans: Sequence[range]) -> list[Run]:
        """What of these was delivered and not acknowledged."""
        back = [run for run in overlap(lane.ready, spans) if run.attempts]
        return sorted([*overlap(lane.leased, spans), *back]) if back else list(overlap(lane.leased, spans))

    def remove(self, lane: Lane, spans: Sequence[range]) -> int:
        """Ends records of a lane for this group, wherever they are; returns how many.

        Raises:
            ValueError: if some of them are not there.
        """
        taken = cut(lane.leased, spans)
        if (count := num_in(taken)) < num_in(spans):
            taken += cut(lane.ready, spans)
            count = num_in(self._taken(lane, taken, spans))
        if self.spent:
            self.spent = without(self.spent, spans)
        self.pending[lane.topic] -= count
        self.settle(lane)
        return count

    def oldest_ready(self, topic: str, count: int) -> list[range]:
        """The oldest records of a topic that are with no member."""
        oldest: list[range] = []
        for run in heapq.merge(*(lane.ready for lane in self.lanes.values() if lane.topic == topic)):
            if count <= 0:
                break
            oldest.append(range(run.start, min(run.stop, run.start + count)))
            count -= len(oldest[-1])
        return oldest

    def oldest(self, default: int) -> int:
        """The lowest offset not acknowledged."""
        firsts = (runs[0].start for lane in self.lanes.values() for runs in (lane.leased, lane.ready) if runs)
        return min(firsts, default=default)

    @staticmethod
    def _taken(lane: Lane, taken: list[Run], spans: Sequence[range]) -> list[Run]:
        if num_in(taken) != num_in(spans):
            raise ValueError(f"of {lane.topic} {lane.key} there are {num_in(taken)} of {num_in(spans)} records")
        return taken
