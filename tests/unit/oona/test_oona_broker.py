"""The broker against its promises: order, sharing, leases, backlog, producers' numbers, what is kept."""

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oona_support import each, offsets

from esper.leyline.errors import ConflictError, NotFoundError
from esper.leyline.summary import BusCounts
from esper.oona import Admission, Batch, Broker, Record
from esper.oona.kept import Kept
from esper.oona.spans import flat, spans_of


def batch(seq, *keys, producer="p", base=0, topic="t"):
    return Batch(producer, seq, base, tuple(Record(topic, key, f"{producer}{seq}{key}".encode()) for key in keys))


@pytest.fixture
def broker():
    broker = Broker(lease_s=10.0)
    broker.join("g", ["t"], key=None, start=0, now=0.0)
    return broker


def test_records_come_in_order_and_once(broker):
    broker.append(batch(0, "a", "a", "a"))
    assert offsets(broker.poll("g", "m", 0, 2, 0.0)) == [0, 1]
    assert offsets(broker.poll("g", "m", 1, 2, 0.0)) == [2]
    assert broker.poll("g", "m", 2, 2, 0.0) == []


def test_a_lane_is_out_with_one_member_until_all_of_it_is_acknowledged(broker):
    broker.append(batch(0, "a", "a", "a"))
    assert offsets(broker.poll("g", "m1", 0, 2, 0.0)) == [0, 1]
    assert broker.poll("g", "m2", 0, 2, 0.0) == []
    broker.ack("g", [0], 0.0)
    assert broker.poll("g", "m2", 1, 2, 0.0) == []
    broker.ack("g", [1], 0.0)
    assert offsets(broker.poll("g", "m2", 2, 2, 0.0)) == [2]


def test_members_share_keys(broker):
    broker.append(batch(0, "a", "b", "a", "b"))
    assert offsets(broker.poll("g", "m1", 0, 2, 0.0)) == [0, 2]
    assert offsets(broker.poll("g", "m2", 0, 2, 0.0)) == [1, 3]


def test_lanes_take_turns_so_that_a_busy_key_starves_no_other(broker):
    broker.append(batch(0, *["a"] * 10, "b"))
    first = offsets(broker.poll("g", "m", 0, 4, 0.0))
    assert first == [0, 1, 2, 3]
    assert 10 in offsets(broker.poll("g", "m", 1, 4, 0.0))


def test_a_lease_that_runs_out_takes_back_the_whole_lane_in_order(broker):
    broker.append(batch(0, "a", "a", "a"))
    broker.poll("g", "m1", 0, 2, 0.0)
    broker.poll("g", "m1", 1, 1, 5.0)
    assert broker.next_expiry == 10.0
    assert broker.expire(9.9) == 0
    assert broker.poll("g", "m2", 0, 9, 9.9) == []
    assert broker.expire(10.0) == 1
    again = broker.poll("g", "m2", 1, 9, 10.0)
    assert [one[:2] for one in each(again)] == [(0, 2), (1, 2), (2, 2)]
    assert broker.counts("a") == BusCounts(published=3, delivered=6, redelivered=3)


def test_who_was_late_may_still_acknowledge(broker):
    broker.append(batch(0, "a", "a"))
    broker.poll("g", "m1", 0, 9, 0.0)
    broker.expire(10.0)
    assert flat(broker.ack("g", [0], 10.0)) == [0]
    assert offsets(broker.poll("g", "m2", 0, 9, 10.0)) == [1]
    assert flat(broker.ack("g", [1], 10.0)) == [1]  # in m2's hands; the work is done all the same
    assert flat(broker.ack("g", [0, 1], 10.0)) == []
    broker.expire(1e9)
    assert broker.poll("g", "m2", 1, 9, 1e9) == []


def test_what_was_never_delivered_cannot_be_acknowledged(broker):
    broker.append(batch(0, "a"))
    assert flat(broker.ack("g", [0, 7], 0.0)) == []
    assert offsets(broker.poll("g", "m", 0, 9, 0.0)) == [0]


def test_leaving_gives_back_at_once(broker):
    broker.append(batch(0, "a", "b"))
    broker.poll("g", "m1", 0, 9, 0.0)
    broker.leave("g", "m1")
    assert [one[:2] for one in each(broker.poll("g", "m2", 0, 9, 0.0))] == [(0, 2), (1, 2)]
    broker.leave("g", "m1")
    broker.leave("unknown", "m1")


def test_a_repeated_poll_gets_the_lost_answer_again_as_the_same_attempt(broker):
    broker.append(batch(0, "a", "a", "b"))
    lost = each(broker.poll("g", "m", 0, 2, 0.0))
    assert each(broker.poll("g", "m", 0, 2, 1.0)) == lost
    broker.ack("g", [lost[0][0]], 1.0)
    assert each(broker.poll("g", "m", 0, 2, 1.0)) == lost[1:]
    assert broker.counts("a").redelivered == 0


def test_two_groups_each_get_all(broker):
    broker.join("other", ["t"], key=None, start=0, now=0.0)
    broker.append(batch(0, "a", "b"))
    assert offsets(broker.poll("g", "m", 0, 9, 0.0)) == [0, 1]
    assert offsets(broker.poll("other", "m", 0, 9, 0.0)) == [0, 1]
    assert broker.counts("a") == BusCounts(published=1, delivered=2, redelivered=0)


def test_a_group_filters_by_topic_and_key():
    broker = Broker()
    broker.join("g", ["t", "u"], key="a", start=0, now=0.0)
    broker.append(batch(0, "a", "b"))
    broker.append(batch(1, "a", "b", topic="u"))
    broker.append(batch(2, "a", topic="v"))
    assert offsets(broker.poll("g", "m", 0, 9, 0.0)) == [0, 2]


def test_a_new_group_starts_where_it_asks_and_a_known_one_where_it_was(broker):
    broker.append(batch(0, "a", "a"))
    assert broker.join("late", ["t"], key=None, start=broker.next_offset, now=0.0)
    assert broker.join("all", ["t"], key=None, start=broker.first_offset, now=0.0)
    assert broker.poll("late", "m", 0, 9, 0.0) == []
    assert offsets(broker.poll("all", "m", 0, 9, 0.0)) == [0, 1]
    broker.ack("all", [0, 1], 0.0)
    assert not broker.join("all", ["t"], key=None, start=0, now=0.0)
    assert broker.poll("all", "m", 1, 9, 0.0) == []


def test_a_group_cannot_be_joined_with_another_selection(broker):
    with pytest.raises(ConflictError, match="group g reads t"):
        broker.join("g", ["t"], key="a", start=0, now=0.0)
    with pytest.raises(ConflictError, match="another group name"):
        broker.join("g", ["u"], key=None, start=0, now=0.0)


def test_an_unknown_group_is_an_error(broker):
    with pytest.raises(NotFoundError, match="no group x"):
        broker.poll("x", "m", 0, 9, 0.0)
    with pytest.raises(NotFoundError):
        broker.ack("x", [0], 0.0)


def test_batches_of_a_producer_are_admitted_in_turn(broker):
    assert broker.admit(batch(1, "a")) is Admission.EARLY
    assert broker.admit(batch(0, "a")) is Admission.ACCEPT
    broker.append(batch(0, "a"))
    assert broker.admit(batch(0, "a")) is Admission.DUPLICATE
    assert broker.admit(batch(1, "a")) is Admission.ACCEPT
    assert broker.admit(batch(0, "a", producer="q")) is Admission.ACCEPT


def test_what_a_producer_knows_to_be_safe_is_not_waited_for():
    broker = Broker()
    assert broker.admit(batch(7, "a", base=6)) is Admission.EARLY
    assert broker.admit(batch(6, "a", base=6)) is Admission.ACCEPT
    broker.append(batch(6, "a", base=6))
    assert broker.admit(batch(5, "a", base=5)) is Admission.DUPLICATE
    # the broker's host lost 7 and 8, which it had acknowledged
    assert broker.admit(batch(9, "a", base=9)) is Admission.ACCEPT


def test_a_full_backlog_refuses_until_acknowledged():
    broker = Broker(backlog=3)
    broker.join("g", ["t"], key=None, start=0, now=0.0)
    broker.join("h", ["t"], key=None, start=0, now=0.0)
    broker.append(batch(0, "a", "a"))
    assert broker.admit(batch(1, "a")) is Admission.ACCEPT  # each group counts for itself
    assert broker.admit(batch(1, "a", "a")) is Admission.FULL
    assert broker.admit(batch(1, "a", "a", topic="u")) is Admission.ACCEPT  # nobody reads u
    broker.ack("g", offsets(broker.poll("g", "m", 0, 9, 0.0)), 0.0)
    assert broker.admit(batch(1, "a", "a")) is Admission.FULL  # the slowest group counts
    broker.ack("h", offsets(broker.poll("h", "m", 0, 9, 0.0)), 0.0)
    assert broker.admit(batch(1, *"aaaaa")) is Admission.ACCEPT  # larger than the backlog, but alone


def test_only_what_all_groups_acknowledged_is_dropped():
    broker = Broker(kept=Kept(retain=2))
    broker.join("g", ["t"], key=None, start=0, now=0.0)
    for seq in range(6):
        broker.append(batch(seq, "a"))
    assert broker.first_offset == 0
    broker.ack("g", offsets(broker.poll("g", "m", 0, 3, 0.0)), 0.0)
    broker.trim()
    assert broker.first_offset == 3
    broker.ack("g", offsets(broker.poll("g", "m", 1, 3, 0.0)), 0.0)
    broker.trim()
    assert broker.first_offset == 4
    broker.join("all", ["t"], key=None, start=0, now=0.0)
    assert offsets(broker.poll("all", "m", 0, 9, 0.0)) == [4, 5]


def test_memory_is_bounded_without_being_asked():
    broker = Broker(kept=Kept(retain=10))
    for seq in range(1000):
        broker.append(batch(seq, "a", "b"))
    assert broker.next_offset - broker.first_offset <= 22


def test_a_group_that_nobody_uses_can_be_found_and_forgotten(broker):
    broker.join("h", ["t"], key=None, start=0, now=50.0)
    assert broker.idle_groups(100.0, 60.0) == ["g"]
    broker.poll("g", "m", 0, 1, 90.0)
    assert broker.idle_groups(100.0, 60.0) == []
    broker.forget("g")
    assert broker.groups == ["h"]


def test_a_snapshot_is_json_and_keeps_numbers_counts_and_groups(broker):
    broker.append(batch(0, "a", "b"))
    broker.ack("g", offsets(broker.poll("g", "m", 0, 9, 0.0)), 0.0)
    fresh = Broker()
    fresh.restore(json.loads(json.dumps(broker.snapshot())), now=0.0)
    assert fresh.next_offset == 2
    assert fresh.counts("a") == broker.counts("a")
    assert fresh.admit(batch(0, "a")) is Admission.DUPLICATE
    fresh.append(batch(1, "a"))
    assert offsets(fresh.poll("g", "m", 1, 9, 0.0)) == [2]


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.lists(st.sampled_from("abc"), min_size=1, max_size=5)),
            st.tuples(st.just("poll"), st.sampled_from(["m1", "m2", "m3"])),
            st.tuples(st.just("ack"), st.sampled_from(["m1", "m2", "m3"])),
            st.tuples(st.just("leave"), st.sampled_from(["m1", "m2", "m3"])),
            st.tuples(st.just("time"), st.integers(1, 12)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_nothing_is_lost_and_firsts_come_in_order(steps):
    broker = Broker(lease_s=10.0)
    broker.join("g", ["t"], key=None, start=0, now=0.0)
    now, seq, number = 0.0, 0, 0
    keys: list[str] = []
    held = defaultdict(list)
    acked: set[int] = set()
    firsts = defaultdict(list)
    for what, value in [*steps, ("time", 100), *[("poll", "last")] * 80]:
        if what == "append":
            broker.append(batch(seq, *value))
            keys += value
            seq += 1
        elif what == "poll":
            number += 1
            broker.expire(now)
            for offset, attempt, _ in each(broker.poll("g", value, number, 4, now)):
                assert offset not in acked
                held[value].append(offset)
                if attempt == 1:
                    firsts[keys[offset]].append(offset)
            if what == "poll" and now >= 100:
                acked |= set(flat(broker.ack("g", held.pop(value, []), now)))
        elif what == "ack":
            acked |= set(flat(broker.ack("g", held.pop(value, []), now)))
        elif what == "leave":
            broker.leave("g", value)
        else:
            now += value
    assert acked == set(range(len(keys)))
    assert all(seen == sorted(seen) for seen in firsts.values())


def test_who_left_gets_nothing_any_more(broker):
    broker.leave("g", "m1")
    broker.append(batch(0, "a"))
    assert broker.has_left("m1")
    assert broker.poll("g", "m1", 9, 9, 0.0) == []
    assert offsets(broker.poll("g", "m2", 0, 9, 0.0)) == [0]


# ---- what is given up


def test_the_last_delivery_of_a_record_is_of_it_alone():
    broker = Broker(max_deliveries=2)
    broker.join("g", ["t"], key=None, start=0, now=0.0)
    broker.append(batch(0, "a", "a", "b"))
    assert offsets(broker.poll("g", "m1", 0, 9, 0.0)) == [0, 1, 2]
    broker.leave("g", "m1")
    got = [offsets(broker.poll("g", "m2", number, 9, 0.0)) for number in range(3)]
    assert got == [[0], [2], []]  # 1 waits for 0, the lane's first
    broker.ack("g", [2], 0.0)
    assert flat(broker.exhausted("g")) == []
    broker.leave("g", "m2")
    assert flat(broker.exhausted("g")) == [0]
    broker.bury("g", [0], [])
    assert flat(broker.exhausted("g")) == []
    assert offsets(broker.poll("g", "m3", 0, 9, 0.0)) == [1]


def test_who_acknowledges_late_saves_a_record():
    broker = Broker(max_deliveries=1)
    broker.join("g", ["t"], key=None, start=0, now=0.0)
    broker.append(batch(0, "a"))
    broker.poll("g", "m1", 0, 9, 0.0)
    broker.leave("g", "m1")
    assert flat(broker.ack("g", [0], 0.0)) == [0]
    assert flat(broker.exhausted("g")) == []


def test_stamps_are_trimmed_and_never_go_back():
    broker = Broker(kept=Kept(retain=9))
    for seq, at in enumerate([10.0, 20.0, 15.0, 30.0, 40.0]):
        broker.append(batch(seq, "a", "a"), at)
    assert [broker.kept.offset_at(at) for at in (0.0, 10.0, 10.5, 20.0, 25.0, 40.0, 41.0)] == [0, 0, 2, 2, 6, 8, 10]
    broker.kept.retain = 3
    broker.trim()
    assert broker.first_offset == 7
    assert [broker.kept.offset_at(at) for at in (0.0, 30.0, 40.0)] == [6, 6, 8]
    (topic,) = broker.stats(0.0).topics
    assert (topic.kept, topic.published, topic.oldest_at, topic.newest_at) == (3, 10, 30.0, 40.0)


def test_a_snapshot_of_the_first_form_is_still_read():
    old = {"next_offset": 2, "producers": {"p": 1}, "counts": {"a": [2, 3, 1]}, "groups": [["g", ["t"], None]]}
    broker = Broker()
    broker.restore(old, now=0.0)
    assert broker.counts("a") == BusCounts(published=2, delivered=3, redelivered=1)
    assert broker.groups == ["g"]


class Fates:
    """A broker with one group under random orders, and what became of each message."""

    def __init__(self, *, drops):
        self.broker = Broker(lease_s=10.0, max_deliveries=2, backlog=6, drop_oldest=("t",) if drops else ())
        self.broker.join("g", ["t"], key=None, start=0, now=0.0)
        self.now, self.seq, self.number, self.num_published = 0.0, 0, 0, 0
        self.held = defaultdict(list)
        self.fate: dict[int, str] = {}

    def end(self, spans, how):
        assert not self.fate.keys() & set(flat(spans))
        self.fate |= dict.fromkeys(flat(spans), how)

    def append(self, keys):
        one = batch(self.seq, *keys)
        if self.broker.admit(one) is Admission.FULL:
            assert not self.broker.drop_oldest
            return
        for name, surplus in self.broker.surplus(one).items():
            self.broker.drop(name, surplus)
            self.end(surplus, "dropped")
        self.broker.append(one)
        self.num_published += len(keys)
        self.seq += 1

    def poll(self, member):
        self.broker.expire(self.now)
        self.bury(self.broker.exhausted("g"))
        self.number += 1
        got = self.broker.poll("g", member, self.number, 3, self.now)
        assert not self.fate.keys() & set(offsets(got))
        assert all(one.attempt <= 2 for one in got)
        self.held[member] += offsets(got)

    def bury(self, dead):
        self.broker.bury("g", dead, [])
        self.end(dead, "dead")

    def ack(self, member):
        self.end(self.broker.ack("g", self.held.pop(member, []), self.now), "acknowledged")

    def reject(self, member):
        self.bury(spans_of(offset for offset, _, _ in self.broker.held("g", self.held.pop(member, []))))

    def leave(self, member):
        self.broker.leave("g", member)

    def wait(self, seconds):
        self.now += seconds


@settings(max_examples=80)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.lists(st.sampled_from("abc"), min_size=1, max_size=5)),
            st.tuples(st.sampled_from(["poll", "ack", "leave", "reject"]), st.sampled_from(["m1", "m2", "m3"])),
            st.tuples(st.just("wait"), st.integers(1, 12)),
        ),
        max_size=60,
    ),
    st.booleans(),
)
def test_every_message_is_acknowledged_dropped_dead_or_pending_and_only_one_of_them(steps, drops):
    fates = Fates(drops=drops)
    for what, value in steps:
        getattr(fates, what)(value)
    (group,) = fates.broker.stats(fates.now).groups
    assert len(fates.fate) + group.pending == fates.num_published
    how = list(fates.fate.values())
    assert (group.dropped, group.dead) == (how.count("dropped"), how.count("dead"))
    counts = [fates.broker.counts(key) for key in "abc"]
    for name in ("dropped", "dead", "delivered", "redelivered"):
        assert sum(getattr(each, name) for each in counts) == getattr(group, name)


def test_thousands_of_groups_each_get_their_own_and_late_ones_all_that_is_kept():
    broker = Broker()
    for number in range(3000):
        broker.join(f"g{number}", ["t"], key=f"k{number}", start=0, now=0.0)
    broker.append(batch(0, *(f"k{number}" for number in range(0, 3000, 3))))
    broker.join("late", ["t"], key=None, start=broker.first_offset, now=0.0)
    got = [len(offsets(broker.poll(f"g{number}", "m", 0, 9, 0.0))) for number in range(3000)]
    assert got == [1, 0, 0] * 1000
    assert len(offsets(broker.poll("late", "m", 0, 2000, 0.0))) == 1000
    looked_at = broker.takers(batch(1, "k6"))
    assert looked_at == {"g6", "late"}  # and at no other
    for number in range(3000):
        broker.forget(f"g{number}")
    assert broker.takers(batch(1, "k6")) == {"late"}
