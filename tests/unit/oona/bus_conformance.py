"""What every bus must do, whatever carries it. `BusConformance` runs over the memory bus and over Ray.

A subclass gives the fixture `make_bus`: called with an `OonaConfig`, it returns two buses on one fresh broker, as two
programs would have them.
"""

import threading

import pytest

from esper.config import OonaConfig
from esper.leyline import BusCounts, ConflictError, OonaMessage, StepBatch, Topic, UnavailableError
from esper.leyline.signals import RunStarted

WAIT_S = 20.0


def step(number, key="run"):
    body = StepBatch(run_id=key, first_step=number, losses=(0.5,), milliseconds=(1.0,))
    return OonaMessage.of(Topic.STEPS, body, sender_id="test", key=key)


def started(key="run"):
    body = RunStarted(run_id=key, task="classification", num_epochs=1, sites={}, params=1, directory="here")
    return OonaMessage.of(Topic.RUN_STARTED, body, sender_id="test", key=key)


def numbers(deliveries):
    return [delivery.message.body().first_step for delivery in deliveries]


def take(subscription, count, *, ack=True, max_messages=256):
    """Polls until `count` messages have come."""
    taken = []
    while len(taken) < count:
        got = subscription.poll(max_messages=max_messages, timeout_s=WAIT_S)
        assert got, f"{len(taken)} of {count} came within {WAIT_S} s"
        taken += got
        if ack:
            subscription.ack(got)
    return taken


class BusConformance:
    def test_messages_arrive_whole_and_in_order(self, make_bus):
        bus, other = make_bus(OonaConfig(batch=16))
        subscription = other.subscribe([Topic.STEPS, Topic.RUN_STARTED], group="g")
        sent = [step(number) for number in range(300)]
        for message in sent:
            bus.publish([message])
        taken = take(subscription, 300)
        assert [delivery.message for delivery in taken] == sent
        assert {delivery.attempt for delivery in taken} == {1}
        assert len({(delivery.shard, delivery.offset) for delivery in taken}) == 300

    def test_order_holds_within_each_key(self, make_bus):
        bus, _ = make_bus(OonaConfig(batch=8))
        subscription = bus.subscribe([Topic.STEPS], group="g")
        keys = ["a", "b", "c", "d", "e"]
        bus.publish([step(number, keys[number % 5]) for number in range(200)])
        taken = take(subscription, 200, max_messages=7)
        for index, key in enumerate(keys):
            of_key = [delivery for delivery in taken if delivery.message.key == key]
            assert numbers(of_key) == list(range(index, 200, 5))

    def test_two_groups_both_get_all(self, make_bus):
        bus, other = make_bus(OonaConfig())
        first = bus.subscribe([Topic.STEPS], group="first")
        second = other.subscribe([Topic.STEPS], group="second")
        bus.publish([step(number) for number in range(20)])
        assert numbers(take(first, 20)) == numbers(take(second, 20)) == list(range(20))

    def test_members_of_a_group_share(self, make_bus):
        bus, other = make_bus(OonaConfig())
        members = [bus.subscribe([Topic.STEPS], group="g"), other.subscribe([Topic.STEPS], group="g")]
        bus.publish([step(number, f"key{number}") for number in range(40)])
        bus.flush()
        shares = [member.poll(max_messages=20, timeout_s=WAIT_S) for member in members]
        assert all(shares)
        for turn in range(100):
            if sum(map(len, shares)) == 40:
                break
            shares[turn % 2] += members[turn % 2].poll(timeout_s=0.1)
        assert sorted(numbers(shares[0] + shares[1])) == list(range(40))

    def test_what_is_given_back_on_close_goes_to_others_in_order(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=3600.0))
        leaving = bus.subscribe([Topic.STEPS], group="g")
        staying = other.subscribe([Topic.STEPS], group="g")
        bus.publish([step(number) for number in range(10)])
        held = take(leaving, 10, ack=False)
        leaving.ack(held[:4])
        leaving.close()
        taken = take(staying, 6)
        assert numbers(taken) == [4, 5, 6, 7, 8, 9]
        assert {delivery.attempt for delivery in taken} == {2}
        same = {(delivery.shard, delivery.offset): delivery.message for delivery in held}
        assert all(same[delivery.shard, delivery.offset] == delivery.message for delivery in taken)

    def test_closing_ends_a_poll_that_waits(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=3600.0))
        leaving = bus.subscribe([Topic.STEPS], group="g")
        staying = other.subscribe([Topic.STEPS], group="g")
        ended = threading.Event()

        def wait():
            with pytest.raises(UnavailableError, match="closed"):
                leaving.poll(timeout_s=WAIT_S)
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        leaving.close()
        assert ended.wait(WAIT_S / 2)
        thread.join()
        bus.publish([step(1)])
        assert [delivery.attempt for delivery in take(staying, 1)] == [1]

    def test_a_full_backlog_makes_publish_wait_and_goes_on(self, make_bus):
        bus, other = make_bus(OonaConfig(backlog=16, batch=4))
        subscription = other.subscribe([Topic.STEPS], group="g")
        done = threading.Event()

        def publish():
            bus.publish([step(number) for number in range(200)])
            done.set()

        thread = threading.Thread(target=publish)
        thread.start()
        first = take(subscription, 16, ack=False)
        # 16 are with the broker, 32 on their way, 32 in the buffer
        assert not done.wait(0.3)
        assert bus.counts("run").published == 16
        subscription.ack(first)
        assert numbers(first + take(subscription, 184)) == list(range(200))
        assert done.wait(WAIT_S)
        thread.join()

    def test_a_group_starts_at_the_end_or_from_the_start(self, make_bus):
        bus, other = make_bus(OonaConfig())
        bus.publish([step(number) for number in range(5)])
        bus.flush()
        late = other.subscribe([Topic.STEPS], group="late")
        replay = other.subscribe([Topic.STEPS], group="replay", from_start=True)
        bus.publish([step(5)])
        assert numbers(take(late, 1)) == [5]
        assert numbers(take(replay, 6)) == [0, 1, 2, 3, 4, 5]

    def test_a_group_goes_on_where_its_last_member_left(self, make_bus):
        bus, other = make_bus(OonaConfig())
        first = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(number) for number in range(4)])
        first.ack(take(first, 4, ack=False)[:3])
        first.close()
        bus.publish([step(4)])
        assert numbers(take(other.subscribe([Topic.STEPS], group="g"), 2)) == [3, 4]

    def test_topics_and_key_select(self, make_bus):
        bus, _ = make_bus(OonaConfig())
        mine = bus.subscribe([Topic.STEPS], group="mine", key="mine")
        events = bus.subscribe([Topic.RUN_STARTED], group="events")
        bus.publish([step(0, "mine"), step(1, "other"), started("other"), step(2, "mine")])
        bus.flush()
        assert numbers(take(mine, 2)) == [0, 2]
        assert [delivery.message.key for delivery in take(events, 1)] == ["other"]
        assert mine.poll(timeout_s=0.0) == events.poll(timeout_s=0.0) == []

    def test_a_group_with_another_selection_is_refused(self, make_bus):
        bus, _ = make_bus(OonaConfig())
        bus.subscribe([Topic.STEPS], group="g")
        with pytest.raises(ConflictError, match="group g"):
            bus.subscribe([Topic.STEPS], group="g", key="run")

    def test_counts_add_up(self, make_bus):
        bus, _ = make_bus(OonaConfig(lease_s=3600.0))
        first = bus.subscribe([Topic.STEPS], group="first")
        second = bus.subscribe([Topic.STEPS], group="second")
        bus.publish([step(number) for number in range(10)] + [step(0, "other")])
        take(first, 11)
        second.ack([delivery for delivery in take(second, 11, ack=False) if delivery.offset % 2])
        second.close()
        again = take(bus.subscribe([Topic.STEPS], group="second"), 5)
        redelivered = sum(delivery.message.key == "run" for delivery in again)
        assert bus.counts("run") == BusCounts(published=10, delivered=20 + redelivered, redelivered=redelivered)
        assert bus.counts("unknown") == BusCounts()

    def test_acknowledging_twice_is_harmless(self, make_bus):
        bus, _ = make_bus(OonaConfig())
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0), step(1)])
        taken = take(subscription, 2)
        subscription.ack(taken)
        subscription.ack(taken[:1])
        subscription.close()
        subscription.close()
        with pytest.raises(UnavailableError, match="closed"):
            subscription.poll()

    def test_flush_says_what_is_missing(self, make_bus):
        bus, _ = make_bus(OonaConfig(backlog=4, batch=2))
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(number) for number in range(10)])
        with pytest.raises(UnavailableError, match="6 messages were not acknowledged"):
            bus.flush(timeout_s=0.5)
        take(subscription, 10)
        bus.flush(timeout_s=WAIT_S)

    def test_many_threads_may_publish(self, make_bus):
        bus, _ = make_bus(OonaConfig(batch=4))
        subscription = bus.subscribe([Topic.STEPS], group="g")

        def publish(key):
            for number in range(50):
                bus.publish([step(number, key)])

        threads = [threading.Thread(target=publish, args=(key,)) for key in "abcd"]
        for thread in threads:
            thread.start()
        taken = take(subscription, 200)
        for thread in threads:
            thread.join()
        for key in "abcd":
            assert numbers([delivery for delivery in taken if delivery.message.key == key]) == list(range(50))
