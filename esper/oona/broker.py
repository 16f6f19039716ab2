"""The broker of one shard as a state machine: records, groups, leases, producers. No I/O, no clock, no threads.

Order within (topic, key) holds for a whole group, not only for a member: what a group has of one (topic, key) is a
*lane*, and while records of a lane are out with a member, the lane's next ones go to that member alone. When a lease
of a lane runs out, all that is out of this lane goes back, oldest first.

Offsets are handled as spans (`esper.oona.spans`): what a batch brings for a lane is one run, leased and acknowledged as
one as long as nobody takes it apart. Methods that take offsets take them one by one, too.

A record that came back too often is *spent*: `exhausted` names it and `bury` takes it from the group. Its last delivery
is of it alone, so that what merely travelled with it is not given up too. Where a topic drops its oldest, `surplus`
names what has to go before a batch and `drop` lets it go. What decides and what acts are apart, because a log must
repeat the acts without deciding again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any

from esper.config import OonaConfig
from esper.leyline.bus import BusStats
from esper.leyline.errors import ConflictError
from esper.leyline.messages import Topic
from esper.leyline.summary import BusCounts
from esper.oona.groups import Group, Lane
from esper.oona.kept import Kept
from esper.oona.packed import joined
from esper.oona.producers import Producers
from esper.oona.readers import Readers
from esper.oona.spans import Run, add, overlap, spans_of, without
from esper.oona.tallies import Tallies
from esper.oona.wire import Batch, Block, Leased, Record, blocks_of

_LETTERS = Topic.DEAD_LETTERS.value

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
        kept: fresh; how long records stay that every group has acknowledged is its matter.
        max_deliveries: of one record to one group; None is no limit.
        drop_oldest: topics that are never FULL.
    """

    def __init__(
        self,
        *,
        lease_s: float = 30.0,
        backlog: int = 100_000,
        kept: Kept | None = None,
        max_deliveries: int | None = None,
        drop_oldest: Iterable[str] = (),
    ) -> None:
        self.lease_s = lease_s
        self.backlog = backlog
        self.kept = Kept() if kept is None else kept
        self.max_deliveries = max_deliveries
        self.drop_oldest = frozenset(drop_oldest)
        self._readers = Readers(max_deliveries)
        self._producers = Producers()
        self._left: dict[str, None] = {}  # members, the newest last
        self._tallies = Tallies()
        self._published: Counter[str] = Counter()  # by topic
        self._expiry = math.inf  # no lease runs out before

    @classmethod
    def of(cls, config: OonaConfig) -> Broker:
        """A fresh broker with these settings."""
        return cls(
            lease_s=config.lease_s,
            backlog=config.backlog,
            max_deliveries=config.max_deliveries,
            drop_oldest=config.drop_oldest,
            kept=Kept(
                retain_bytes=int(config.retain_mb * 2**20),
                retain_s=None if config.retain_hours is None else config.retain_hours * 3600,
            ),
        )

    # ---- producers

    def admit(self, batch: Batch) -> Admission:
        """Says whether `append` may take this batch now."""
        lead = self._producers.lead(batch)
        if lead:
            return Admission.DUPLICATE if lead < 0 else Admission.EARLY
        added: Counter[tuple[str, str]] = Counter()
        for topic, key, count in batch.runs:
            if topic in self.drop_oldest:
                continue
            for group in self._readers.of(topic, key):
                added[group.name, topic] += count
                held = group.pending[topic]
                # a batch larger than the backlog passes alone
                if held and held + added[group.name, topic] > self.backlog:
                    return Admission.FULL
        return Admission.ACCEPT

    def surplus(self, batch: Batch) -> dict[str, list[range]]:
        """What has to give way to this batch, by group: the oldest records of topics that drop, if none has them."""
        if not self.drop_oldest:
            return {}
        added: Counter[tuple[str, str]] = Counter()
        for topic, key, count in batch.runs:
            if topic in self.drop_oldest:
                for group in self._readers.of(topic, key):
                    added[group.name, topic] += count
        surplus: dict[str, list[range]] = {}
        for (name, topic), count in added.items():
            group = self._readers[name]
            excess = group.pending[topic] + count - self.backlog
            if excess > 0 and (oldest := group.oldest_ready(topic, excess)):
                surplus.setdefault(name, []).extend(oldest)
        return surplus

    def drop(self, name: str, offsets: Iterable[int | range]) -> None:
        """Lets records go that `surplus` named."""
        group = self._readers[name]
        for lane, spans in self._by_lane(group, spans_of(offsets)):
            count = group.remove(lane, spans)
            group.num_dropped += count
            self._tallies.dropped(lane.key, count)

    def append(self, batch: Batch, at: float = 0.0) -> None:
        """Takes an admitted batch; the records get the next offsets, in order.

        Args:
            batch: what `admit` accepted.
            at: the time, seconds since the epoch; 0 if it is not known. A clock that was set back stands still here.
        """
        self._producers.note(batch)
        self._append(batch.blocks, at)

    def takers(self, batch: Batch) -> set[str]:
        """The groups that want any of it."""
        runs = {(topic, key) for topic, key, _ in batch.runs}
        return {group.name for topic, key in runs for group in self._readers.of(topic, key)}

    def _append(self, blocks: Sequence[Block], at: float) -> None:
        offset = self.kept.append(blocks, at)
        for topic, key, records in blocks:
            count = len(records)
            self._published[topic] += count
            if topic != _LETTERS:  # told by `dead`; they were published once already
                self._tallies.published(key, count)
            for group in self._readers.of(topic, key):
                group.offer(topic, key, offset, offset + count)
            offset += count
        if self.kept.is_due(at):
            self.trim(at)

    # ---- groups

    def join(self, name: str, topics: Sequence[str], *, key: str | None, start: int, now: float) -> bool:
        """Makes a group known; returns whether it is new. A known group keeps its position, a new one gets the kept
        records from offset `start` on.

        Raises:
            ConflictError: if the group exists with other topics or another key.
        """
        group = self._readers.get(name)
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
        group = self._readers.enter(name, topics, key, now)
        for its_topic, its_key, first, stop in self.kept.places([range(start, self.next_offset)]):
            if group.wants(its_topic, its_key):
                group.offer(its_topic, its_key, first, stop)
        return True

    def poll(self, name: str, member: str, number: int, max_records: int, now: float) -> list[Leased]:
        """Leases the next records to a member, lanes in turn; see `next_for`.

        Raises:
            NotFoundError: if there is no such group.
        """
        chosen, is_new = self.next_for(name, member, number, max_records, now)
        if chosen and is_new:
            self.lease(name, member, number, chosen, now + self.lease_s)
        return self.leased(name, chosen)

    def next_for(self, name: str, member: str, number: int, max_records: int, now: float) -> tuple[list[range], bool]:
        """What a member would get, lane by lane, and whether it is to be leased to it for that.

        A repeated `number` means that the last answer was lost: the same records are given again, as the same
        attempt.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        group.seen_at = now
        if member in self._left:
            return [], False
        last, spans = group.polls.get(member, (-1, []))
        if last == number:
            again = [
                range(run.start, run.stop)
                for lane, few in self._by_lane(group, spans)
                if lane.owner == member
                for run in overlap(lane.leased, few)
            ]
            if again:
                return again, False
        return group.choose(member, max_records), True

    def leased(self, name: str, spans: Sequence[range]) -> list[Leased]:
        """Records that are out, as their member gets them: as few pieces as may be."""
        group = self._readers[name]
        return [
            Leased(run.start, run.attempts, joined([held.records for held in self.kept.within(run.start, run.stop)]))
            for lane, few in self._by_lane(group, spans)
            for run in overlap(lane.leased, few)
        ]

    def lease(self, name: str, member: str, number: int, spans: Sequence[range], deadline: float) -> None:
        """Marks records as out with a member. `next_for` says which; a replayed log calls this directly.

        Raises:
            ValueError: if some of them are not before the group.
        """
        group = self._readers[name]
        touched: list[Lane] = []
        for lane, few in self._by_lane(group, spans):
            # only in a replay: the log does not tell that a lease ran out, but the next lease of the lane does
            if lane.owner not in (None, member) or next(overlap(lane.leased, few), None) is not None:
                group.revoke(lane)
            num, num_again = group.hand_out(lane, few, member, deadline)
            if lane.topic != _LETTERS:
                self._tallies.delivered(lane.key, num, again=num_again)
            touched.append(lane)
        for lane in touched:
            group.runnable.pop((lane.topic, lane.key), None)  # to the end of the turn
            group.settle(lane)
        group.polls[member] = (number, list(spans))
        self._expiry = min(self._expiry, deadline)

    def ack(self, name: str, offsets: Iterable[int | range], now: float) -> list[range]:
        """Acknowledges records, whoever holds them now; returns those that were not acknowledged before.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        group.seen_at = now
        done = self.outstanding(name, offsets)
        for lane, spans in self._by_lane(group, done):
            group.num_acknowledged += group.remove(lane, spans)
        return done

    def outstanding(self, name: str, offsets: Iterable[int | range]) -> list[range]:
        """Those that were delivered to the group and are not acknowledged, each once.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        lanes = self._by_lane(group, spans_of(offsets))
        return spans_of(range(run.start, run.stop) for lane, spans in lanes for run in group.outstanding(lane, spans))

    def exhausted(self, name: str) -> list[range]:
        """Records that came back after their last delivery.

        Raises:
            NotFoundError: if there is no such group.
        """
        return list(self._readers[name].spent)

    def held(self, name: str, offsets: Iterable[int | range]) -> list[tuple[int, int, Record]]:
        """(offset, attempts, record) of those that were delivered to the group and are not acknowledged.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        return [
            (offset, run.attempts, Record(held.topic, held.key, data))
            for lane, spans in self._by_lane(group, spans_of(offsets))
            for run in group.outstanding(lane, spans)
            for held in self.kept.within(run.start, run.stop)
            for offset, data in enumerate(held.records, held.start)
        ]

    def bury(self, name: str, offsets: Iterable[int | range], letters: Sequence[Record], at: float = 0.0) -> None:
        """Takes records from a group for good, and appends the letters that tell of them.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        for lane, spans in self._by_lane(group, self.outstanding(name, offsets)):
            count = group.remove(lane, spans)
            group.num_dead += count
            group.dead = spans_of([*group.dead, *spans])
            if lane.topic != _LETTERS:
                self._tallies.dead(lane.key, count)
        self.append_letters(letters, at)

    def dead(self, name: str, offsets: Iterable[int | range]) -> list[range]:
        """Those that the group gave up and that are kept: `requeue` can bring them back.

        Raises:
            NotFoundError: if there is no such group.
        """
        asked = [range(max(span.start, self.first_offset), span.stop) for span in spans_of(offsets)]
        dead = [Run(span.start, span.stop) for span in self._readers[name].dead]
        return [range(run.start, run.stop) for run in overlap(dead, [span for span in asked if span])]

    def requeue(self, name: str, spans: Sequence[range]) -> None:
        """Gives the group records again that `dead` named, in their order, with all their deliveries before them.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        for topic, key, start, stop in self.kept.places(spans):
            group.offer_again(topic, key, [range(start, stop)])
            group.num_dead -= stop - start
            if topic != _LETTERS:
                self._tallies.dead(key, start - stop)
        group.dead = without(group.dead, spans)

    def append_letters(self, letters: Sequence[Record], at: float) -> None:
        """Takes dead letters, which no producer sends."""
        if letters:
            self._append(blocks_of(letters), at)

    def leave(self, name: str, member: str) -> None:
        """Takes back at once what a member holds, for good: a poll of it that comes late gets nothing.

        Leaving twice, or a group that is gone, is harmless.
        """
        self._left[member] = None
        if len(self._left) > MAX_LEFT:
            del self._left[next(iter(self._left))]
        group = self._readers.get(name)
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
        for group in self._readers:
            for lane in list(group.lanes.values()):
                deadline = lane.deadline if lane.leased else math.inf
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
        return self._readers.idle(now, idle_s, pending=pending)

    def seen(self, name: str, at: float) -> None:
        """Says when a group was last used, on the clock of the other calls; one that is not there is passed over."""
        group = self._readers.get(name)
        if group is not None:
            group.seen_at = at

    def holders(self, at: float) -> list[str]:
        """The groups that need the oldest record, where much more is kept for them than anybody else asks for.

        Args:
            at: seconds since the epoch; 0 if it is not known.
        """
        if not self.kept.is_held_back(at):
            return []
        end = self.next_offset
        firsts = {group.name: group.oldest(end) for group in self._readers}
        first = min(firsts.values(), default=end)
        return [name for name, oldest in firsts.items() if oldest == first < end]

    def forget(self, name: str) -> None:
        """Drops a group and its position."""
        self._readers.forget(name)

    # ---- what is kept

    @property
    def first_offset(self) -> int:
        """The lowest offset kept."""
        return self.kept.first_offset

    @property
    def next_offset(self) -> int:
        """The offset of the next record."""
        return self.kept.next_offset

    @property
    def next_expiry(self) -> float:
        """No lease runs out before this time."""
        return self._expiry

    @property
    def groups(self) -> list[str]:
        return [group.name for group in self._readers]

    def counts(self, key: str) -> BusCounts:
        """Messages with this key; see `Tallies`."""
        return self._tallies.of(key)

    def stats(self, now: float) -> BusStats:
        """Figures of this shard; reads every kept record once.

        Args:
            now: on the clock of the other calls.
        """
        groups = [group.stats(now) for group in sorted(self._readers, key=lambda group: group.name)]
        return BusStats(num_shards=1, topics=tuple(self.kept.topic_stats(self._published)), groups=tuple(groups))

    def trim(self, at: float = 0.0) -> None:
        """Lets records go that every group has acknowledged, where there are too many or they are too old.

        Args:
            at: seconds since the epoch; 0 if it is not known, then none is too old.
        """
        firsts = (group.oldest(self.next_offset) for group in self._readers)
        self.kept.trim(min(firsts, default=self.next_offset), at)

    def snapshot(self) -> dict[str, Any]:
        """All that the kept records do not tell, as JSON values."""
        return {
            "next_offset": self.next_offset,
            "producers": self._producers.numbers(),
            "counts": self._tallies.counters(),
            "groups": [
                (group.name, sorted(group.topics), group.key, group.counters(), self._kept_dead(group))
                for group in self._readers
            ],
            "published": self._published,
        }

    def restore(self, snapshot: dict[str, Any], *, now: float) -> None:
        """Takes over a snapshot; records from its `next_offset` on are to be appended again.

        What groups had before them of earlier records is not in it: it must have been acknowledged, as it is when
        `first_offset` has passed the snapshot.
        """
        self.kept.next_offset = snapshot["next_offset"]
        self._readers.clear()
        for name, topics, key, *_ in snapshot["groups"]:
            self._readers.enter(name, topics, key, now)
        self.recount(snapshot)

    def recount(self, snapshot: dict[str, Any]) -> None:
        """Takes over the counts of a snapshot that comes later in the log. Those that were made from the log fall short
        where it tells of records that are not in it any more.
        """
        self._producers = Producers(snapshot["producers"])
        self._tallies = Tallies(snapshot["counts"])
        self._published = Counter(snapshot.get("published", {}))  # logs of the first form have none
        for name, _, _, *counters in snapshot["groups"]:
            group = self._readers.get(name)
            if counters and group is not None:
                group.restore(counters[0])
                group.dead = [range(start, stop) for pairs in counters[1:] for start, stop in pairs]

    def reconcile(self, snapshot: dict[str, Any], *, now: float) -> None:
        """Makes the groups known that a snapshot knows, where what made them known was lost: they get all that is kept.
        Those that it does not know are gone. The counts are not touched; see `recount`.
        """
        self.kept.skip_to(snapshot["next_offset"])
        known = {name for name, *_ in snapshot["groups"]}
        for name in [group.name for group in self._readers if group.name not in known]:
            self.forget(name)
        for name, topics, key, *_ in snapshot["groups"]:
            if name not in self._readers:
                self.join(name, topics, key=key, start=self.first_offset, now=now)

    def before(self, name: str, offsets: Iterable[int | range]) -> list[range]:
        """Those of some records that the group has before it, out or not.

        Raises:
            NotFoundError: if there is no such group.
        """
        group = self._readers[name]
        return spans_of(
            range(run.start, run.stop)
            for lane, spans in self._by_lane(group, spans_of(offsets))
            for runs in (lane.leased, lane.ready)
            for run in overlap(runs, spans)
        )

    # ---- within

    def _kept_dead(self, group: Group) -> list[tuple[int, int]]:
        first = self.first_offset
        return [(max(span.start, first), span.stop) for span in group.dead if span.stop > first]

    def _by_lane(self, group: Group, spans: Iterable[range]) -> list[tuple[Lane, list[range]]]:
        """Spans by lane, as they follow each other; what the group does not have is passed over."""
        found: dict[tuple[str, str], tuple[Lane, list[range]]] = {}
        for topic, key, start, stop in self.kept.places(spans):
            known = found.get((topic, key))
            if known is None:
                lane = group.lanes.get((topic, key))
                if lane is None:
                    continue
                known = found[topic, key] = (lane, [])
            add(known[1], start, stop)
        return list(found.values())
