"""The stream's semantics against a reference too simple to be wrong: sets of offsets, looked through each time.

A machine of hypothesis publishes, polls, acknowledges, leaves and lets time pass, in any order; after each step the
broker and the reference agree on what is where, and on every count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from oona_support import each

from esper.leyline.summary import BusCounts
from esper.oona import Admission, Batch, Broker, Record
from esper.oona.kept import Kept
from esper.oona.spans import flat

BACKLOG, LEASE_S = 6, 10.0
TOPICS, KEYS = ("waits", "drops"), ("a", "b")
GROUPS = {"all": (TOPICS, None), "waits": (("waits",), None), "a": (TOPICS, "a")}
MEMBERS, PRODUCERS = ("m", "n", "o"), ("p", "q")


@dataclass
class Out:
    """A record that is with a member."""

    member: str
    deadline: float


@dataclass
class Group:
    """What a group has before it: every offset is in `waiting` or in `out`."""

    waiting: set[int] = field(default_factory=set)
    out: dict[int, Out] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


class Stream(RuleBasedStateMachine):
    """The broker beside its reference."""

    @initialize(limit=st.sampled_from([None, 1, 2, 3]), retain=st.integers(0, 4))
    def begin(self, limit: int | None, retain: int) -> None:
        self.limit = limit
        self.broker = Broker(
            lease_s=LEASE_S, backlog=BACKLOG, max_deliveries=limit, drop_oldest=["drops"], kept=Kept(retain=retain)
        )
        self.now = 0.0
        self.records: list[Record] = []
        self.groups: dict[str, Group] = {}
        self.next_seq = dict.fromkeys(PRODUCERS, 0)
        self.polls = 0
        self.gone: set[str] = set()
        self.tallies = {key: Counter[str]() for key in KEYS}

    # ---- what may happen

    @rule(
        producer=st.sampled_from(PRODUCERS),
        step=st.sampled_from([-1, 0, 0, 0, 0, 1]),
        routes=st.lists(st.tuples(st.sampled_from(TOPICS), st.sampled_from(KEYS)), min_size=1, max_size=4),
    )
    def publish(self, producer: str, step: int, routes: list[tuple[str, str]]) -> None:
        first = len(self.records)
        some = tuple(Record(topic, key, b"%d" % (first + at)) for at, (topic, key) in enumerate(routes))
        batch = Batch(producer, self.next_seq[producer] + step, 0, some)
        admission = self.broker.admit(batch)
        if step:
            assert admission is (Admission.DUPLICATE if step < 0 else Admission.EARLY)
            return
        is_full = any(
            # who came late may have more than the backlog; only what adds to it has to wait
            (added := self.wanted(name, "waits", some))
            and (held := len(self.pending(name, "waits")))
            and held + added > BACKLOG
            for name in self.groups
        )
        assert (admission is Admission.FULL) == is_full
        if is_full:
            return
        surplus = self.broker.surplus(batch)
        for name, group in self.groups.items():
            count = self.wanted(name, "drops", some)
            excess = len(self.pending(name, "drops")) + count - BACKLOG if count else 0
            oldest = sorted(offset for offset in group.waiting if self.records[offset].topic == "drops")
            oldest = oldest[: max(excess, 0)]
            assert flat(surplus.get(name, [])) == oldest
            self.broker.drop(name, oldest)
            for offset in oldest:
                self.end(name, offset, "dropped")
        self.broker.append(batch)
        self.next_seq[producer] += 1
        self.records += some
        for offset in range(first, len(self.records)):
            self.tallies[self.records[offset].key]["published"] += 1
            for name, group in self.groups.items():
                if self.wants(name, self.records[offset]):
                    group.waiting.add(offset)

    @rule(name=st.sampled_from(list(GROUPS)), place=st.sampled_from(["start", "end", "middle"]))
    def join(self, name: str, place: str) -> None:
        topics, key = GROUPS[name]
        first, end = self.broker.first_offset, len(self.records)
        start = {"start": 0, "end": end, "middle": (first + end) // 2}[place]
        assert self.broker.join(name, topics, key=key, start=start, now=self.now) == (name not in self.groups)
        if name not in self.groups:
            kept = range(max(start, first), end)
            self.groups[name] = Group({offset for offset in kept if self.wants(name, self.records[offset])})

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), member=st.sampled_from(MEMBERS), count=st.integers(1, 4))
    def poll(self, data: st.DataObject, member: str, count: int) -> None:
        name = data.draw(st.sampled_from(list(self.groups)))
        group = self.groups[name]
        self.broker.expire(self.now)
        spent = {offset for offset in group.waiting if self.limit and group.attempts[offset] >= self.limit}
        assert set(flat(self.broker.exhausted(name))) == spent
        self.broker.bury(name, list(spent), [])
        for offset in spent:
            self.end(name, offset, "dead")
        could = self.could_get(name, member)
        self.polls += 1
        got = each(self.broker.poll(name, member, self.polls, count, self.now))
        assert bool(got) == (bool(could) and member not in self.gone)
        assert len(got) <= count
        for offset, attempt, its_data in got:
            assert offset in group.waiting
            lane = self.lane(offset)
            assert offset == min(other for other in group.waiting if self.lane(other) == lane)
            assert {out.member for at, out in group.out.items() if self.lane(at) == lane} <= {member}
            group.attempts[offset] += 1
            assert (attempt, its_data) == (group.attempts[offset], self.records[offset].data)
            if self.limit and group.attempts[offset] >= self.limit and self.limit > 1:
                assert len(got) == 1  # its last delivery is of it alone
            group.waiting.remove(offset)
            group.out[offset] = Out(member, self.now + LEASE_S)
            for counts in (group.counts, self.tallies[self.records[offset].key]):
                counts["delivered"] += 1
                counts["redelivered"] += attempt > 1

    @precondition(lambda self: any(group.attempts for group in self.groups.values()))
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        """Of whatever was ever delivered: what is out, what came back, what was acknowledged before."""
        name = data.draw(st.sampled_from([name for name, group in self.groups.items() if group.attempts]))
        group = self.groups[name]
        some = data.draw(st.lists(st.sampled_from(sorted(group.attempts)), max_size=4, unique=True))
        there = [offset for offset in some if offset in group.waiting or offset in group.out]
        assert flat(self.broker.ack(name, some, self.now)) == sorted(there)
        for offset in there:
            self.end(name, offset, "acknowledged")

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), member=st.sampled_from(MEMBERS))
    def leave(self, data: st.DataObject, member: str) -> None:
        """A member that dies, or goes; its name is not used again."""
        name = data.draw(st.sampled_from(list(self.groups)))
        if len(self.gone) == len(MEMBERS) - 1:
            return  # somebody stays
        self.broker.leave(name, member)
        for other in self.groups:
            self.broker.leave(other, member)
            self.give_back(other, {offset for offset, out in self.groups[other].out.items() if out.member == member})
        self.gone.add(member)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.broker.expire(self.now)
        for name, group in self.groups.items():
            late = {self.lane(offset) for offset, out in group.out.items() if self.lane_ends(group, offset) <= self.now}
            self.give_back(name, {offset for offset in group.out if self.lane(offset) in late})

    # ---- what always holds

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "broker"):
            return
        stats = {group.group: group for group in self.broker.stats(self.now).groups}
        assert stats.keys() == self.groups.keys()
        for name, group in self.groups.items():
            told = stats[name]
            assert (told.pending, told.leased) == (len(group.waiting) + len(group.out), len(group.out))
            for count in ("delivered", "redelivered", "acknowledged", "dropped", "dead"):
                assert getattr(told, count) == group.counts[count], count
        for key, counts in self.tallies.items():
            assert self.broker.counts(key) == BusCounts(**counts)
        needed = [offset for group in self.groups.values() for offset in (*group.waiting, *group.out)]
        assert self.broker.next_offset == len(self.records)
        assert self.broker.first_offset <= min(needed, default=len(self.records))

    # ---- the reference

    def wants(self, name: str, record: Record) -> bool:
        topics, key = GROUPS[name]
        return record.topic in topics and key in (None, record.key)

    def wanted(self, name: str, topic: str, records: tuple[Record, ...]) -> int:
        return sum(record.topic == topic and self.wants(name, record) for record in records)

    def lane(self, offset: int) -> tuple[str, str]:
        return self.records[offset].topic, self.records[offset].key

    def pending(self, name: str, topic: str) -> list[int]:
        group = self.groups[name]
        return [offset for offset in (*group.waiting, *group.out) if self.records[offset].topic == topic]

    def lane_ends(self, group: Group, offset: int) -> float:
        """A lane goes back as a whole, when the lease of what has been out of it for longest runs out."""
        return min(out.deadline for at, out in group.out.items() if self.lane(at) == self.lane(offset))

    def could_get(self, name: str, member: str) -> set[tuple[str, str]]:
        """The lanes of which a member may have the next record."""
        group, lanes = self.groups[name], set[tuple[str, str]]()
        for offset in group.waiting:
            lane = self.lane(offset)
            out = {at: one.member for at, one in group.out.items() if self.lane(at) == lane}
            first = min(other for other in group.waiting if self.lane(other) == lane)
            is_last = self.limit is not None and group.attempts[first] + 1 >= self.limit
            last_is_out = self.limit is not None and any(group.attempts[at] >= self.limit for at in out)
            if set(out.values()) <= {member} and not last_is_out and not (out and is_last):
                lanes.add(lane)
        return lanes

    def give_back(self, name: str, offsets: set[int]) -> None:
        """With each, all that is out of its lane."""
        group = self.groups[name]
        lanes = {self.lane(offset) for offset in offsets}
        back = {offset for offset in group.out if self.lane(offset) in lanes}
        group.waiting |= back
        for offset in back:
            del group.out[offset]

    def end(self, name: str, offset: int, how: str) -> None:
        group = self.groups[name]
        group.waiting.discard(offset)
        group.out.pop(offset, None)
        group.counts[how] += 1
        if how != "acknowledged":
            self.tallies[self.records[offset].key][how] += 1


TestStream = Stream.TestCase
TestStream.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
