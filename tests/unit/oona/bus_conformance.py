"""What every bus must do, whatever carries it. `BusConformance` runs over the memory bus and over Ray.

A subclass gives the fixture `make_bus`: called with an `OonaConfig`, it returns two buses on one fresh broker, as two
programs would have them.
"""

import threading
import time

import pytest

from esper.config import OonaConfig
from esper.leyline import BusCounts, ConflictError, NotFoundError, OonaMessage, StepBatch, Topic, UnavailableError
from esper.leyline.signals import EpochRecord, RunStarted
from esper.oona import Batch, Duplicates, Record, Requester, Responder, encode_batch, shard_of

WAIT_S = 60.0


def step(number, key="run"):
    body = StepBatch(run_id=key, first_step=number, losses=(0.5,), milliseconds=(1.0,))
    return OonaMessage.of(Topic.STEPS, body, sender_id="test", key=key)


def started(key="run"):
    body = RunStarted(run_id=key, task="classification", num_epochs=1, sites={}, params=1, directory="here")
    return OonaMessage.of(Topic.RUN_STARTED, body, sender_id="test", key=key)


def numbers(deliveries):
    return [delivery.message.body().first_step for delivery in deliveries]


def answer_to(request):
    return EpochRecord(run_id="run", epoch=0, num_epochs=1, step=request.body().first_step, train_loss=0.0)


def append_raw(bus, *records, producer="raw"):
    """Appends records past the publisher, as a sender of another version would; all have one topic and key."""
    shard = shard_of(records[0].topic, records[0].key, bus._transport.num_shards)
    assert bus._transport.append(shard, encode_batch(Batch(producer, 0, 0, records))).result(WAIT_S)


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


def assert_missing(bus, count):
    """Flushes until so many messages are without an answer: the broker may need a while for those it has room for."""
    until = time.monotonic() + WAIT_S
    while True:
        with pytest.raises(UnavailableError, match=r"\d+ messages were not acknowledged") as caught:
            bus.flush(timeout_s=0.5)
        if str(caught.value).startswith(f"{count} "):
            return
        assert time.monotonic() < until, str(caught.value)


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
        bus.flush(timeout_s=WAIT_S)
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
        bus, other = make_bus(OonaConfig(backlog=16, batch=4, drop_oldest=()))
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
        bus.flush(timeout_s=WAIT_S)
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
        bus.flush(timeout_s=WAIT_S)
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
        bus, _ = make_bus(OonaConfig(backlog=4, batch=2, drop_oldest=()))
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(number) for number in range(10)])
        assert_missing(bus, 6)
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

    # ---- dead letters

    def test_a_message_that_always_fails_ends_with_the_dead_letters_and_holds_no_other_back(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=3600.0, max_deliveries=3))
        letters = other.subscribe([Topic.DEAD_LETTERS], group="letters", key="run")
        bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(number) for number in range(6)])
        bus.flush(timeout_s=WAIT_S)
        done = []
        for _ in range(20):  # each life fails at message 2 and leaves without a word
            member = bus.subscribe([Topic.STEPS], group="g")
            for delivery in member.poll(timeout_s=0.2):
                if numbers([delivery]) == [2]:
                    break
                member.ack([delivery])
                done += numbers([delivery])
            member.close()
            if bus.counts("run").dead and len(done) == 5:
                break
        assert done == [0, 1, 3, 4, 5]
        assert bus.subscribe([Topic.STEPS], group="g").poll(timeout_s=0.2) == []
        (letter,) = take(letters, 1)
        body = letter.message.body()
        assert (body.topic, body.key, body.group, body.attempts) == (Topic.STEPS, "run", "g", 3)
        assert "after 3 deliveries" in body.reason
        lost = OonaMessage.model_validate_json(body.raw)
        assert lost.body().first_step == 2
        assert letter.message.trace_id == lost.trace_id
        counts = bus.counts("run")
        assert (counts.published, counts.dead, counts.dropped) == (6, 1, 0)
        assert counts.delivered - counts.redelivered == 6

    @pytest.mark.parametrize("data", [b'{"bad": 1}', b"\xff\xfe", b"", b"[]"])
    def test_what_cannot_be_decoded_goes_to_the_dead_letters_at_once(self, make_bus, data):
        bus, other = make_bus(OonaConfig(lease_s=3600.0))
        letters = other.subscribe([Topic.DEAD_LETTERS], group="letters")
        subscription = bus.subscribe([Topic.STEPS], group="g")
        good = [Record(Topic.STEPS, "run", step(number).model_dump_json().encode()) for number in range(2)]
        append_raw(bus, good[0], Record(Topic.STEPS, "run", data), good[1])
        assert numbers(take(subscription, 2)) == [0, 1]
        (letter,) = take(letters, 1)
        body = letter.message.body()
        assert (body.raw, body.reason, body.attempts) == (data, "it cannot be decoded", 1)
        assert bus.counts("run").dead == 1
        page = bus.read([Topic.STEPS])
        assert numbers(page.deliveries) == [0, 1]
        assert page.undecodable == ((body.shard, body.offset),)

    def test_a_consumer_may_give_a_message_up(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=3600.0))
        letters = other.subscribe([Topic.DEAD_LETTERS], group="letters")
        second = other.subscribe([Topic.STEPS], group="second")
        first = bus.subscribe([Topic.STEPS], group="first")
        bus.publish([step(0), step(1)])
        held = take(first, 2, ack=False)
        first.reject(held[:1], reason="no such run")
        first.reject(held[:1], reason="twice is harmless")
        first.ack(held[1:])
        assert [letter.message.body().reason for letter in take(letters, 1)] == ["no such run"]
        assert numbers(take(second, 2)) == [0, 1]
        assert letters.poll(timeout_s=0.0) == []

    def test_what_was_given_up_comes_again_to_that_group_alone_and_in_its_place(self, make_bus):
        bus, other = make_bus(OonaConfig())
        first, second = (other.subscribe([Topic.STEPS], group=name) for name in ("first", "second"))
        bus.publish([step(0), step(1), step(2)])
        bus.flush(timeout_s=WAIT_S)
        take(second, 3)
        (held,) = take(first, 1, ack=False, max_messages=1)
        first.reject([held], reason="no such run")
        letters = [delivery.message.body() for delivery in bus.read([Topic.DEAD_LETTERS]).deliveries]
        assert bus.requeue(letters) == 1
        assert bus.requeue(letters) == 0
        again = take(first, 3)
        assert sorted(numbers(again)) == [0, 1, 2]
        assert second.poll(timeout_s=0.0) == []
        first.close()
        stats = {group.group: group for group in bus.stats().groups}
        assert (stats["first"].dead, stats["first"].acknowledged, stats["first"].pending) == (0, 3, 0)
        assert bus.counts("run").dead == 0
        bus._transport.forget("first")
        with pytest.raises(NotFoundError):
            bus.requeue(letters)

    def test_a_letter_that_fails_gets_no_letter(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=3600.0))
        letters = other.subscribe([Topic.DEAD_LETTERS], group="letters")
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0)])
        subscription.reject(take(subscription, 1, ack=False), reason="first")
        letters.reject(take(letters, 1, ack=False), reason="second")
        assert letters.poll(timeout_s=0.0) == []
        stats = {group.group: group for group in bus.stats().groups}
        assert (stats["letters"].dead, stats["letters"].pending, bus.counts("run").dead) == (1, 0, 1)

    # ---- dropping

    def test_a_topic_that_drops_keeps_the_newest_and_counts_the_rest(self, make_bus):
        bus, other = make_bus(OonaConfig(backlog=10, batch=4, drop_oldest=(Topic.STEPS,), lease_s=3600.0))
        slow = bus.subscribe([Topic.STEPS], group="slow")
        bus.publish([step(number) for number in range(3)])
        held = take(slow, 3, ack=False)
        bus.publish([step(number) for number in range(3, 103)])
        bus.flush(timeout_s=WAIT_S)
        slow.ack(held)
        late = take(slow, 7)
        assert numbers(late) == list(range(96, 103))  # what is with a member is never dropped
        assert slow.poll(timeout_s=0.0) == []
        counts = other.counts("run")
        assert counts == BusCounts(published=103, delivered=10, dropped=93)
        (group,) = bus.stats().groups
        assert (group.dropped, group.delivered) == (93, 10)

    def test_another_topic_of_the_same_bus_still_waits(self, make_bus):
        bus, _ = make_bus(OonaConfig(backlog=4, batch=2, drop_oldest=(Topic.STEPS,)))
        both = bus.subscribe([Topic.STEPS, Topic.RUN_STARTED], group="g")
        bus.publish([started() for _ in range(6)])
        assert_missing(bus, 2)
        take(both, 6)
        bus.flush(timeout_s=WAIT_S)

    # ---- asking and telling all

    def test_a_request_gets_its_answer_and_no_other(self, make_bus):
        bus, other = make_bus(OonaConfig())
        responder = Responder(other, [Topic.STEPS], Topic.EPOCH, answer_to, group="answers")
        one, two = (Requester(bus, Topic.EPOCH, sender_id=name) for name in ("one", "two"))
        serving = threading.Thread(target=lambda: [responder.serve(timeout_s=WAIT_S) for _ in range(3)])
        serving.start()
        asked = [who.ask(Topic.STEPS, step(number).body(), key="run", timeout_s=WAIT_S)
                 for who, number in ((one, 7), (two, 8), (one, 9))]  # fmt: skip
        serving.join(WAIT_S)
        assert [answer.body().step for answer in asked] == [7, 8, 9]
        assert [answer.key for answer in asked] == [one.sender_id, two.sender_id, one.sender_id]
        for end in (one, two, responder):
            end.close()
        assert [group.group for group in bus.stats().groups] == ["answers"]

    def test_a_request_that_nobody_answers_says_so(self, make_bus):
        bus, _ = make_bus(OonaConfig())
        requester = Requester(bus, Topic.EPOCH, sender_id="one")
        with pytest.raises(UnavailableError, match="no answer to telemetry"):
            requester.ask(Topic.STEPS, step(1).body(), key="run", timeout_s=0.05)
        requester.close()

    def test_a_closed_bus_refuses_at_once(self, make_bus):
        """What joins anew where a connection is lost would otherwise do so without a pause."""
        bus, _ = make_bus(OonaConfig())
        listener = bus.listen([Topic.STEPS])
        bus.close()
        for call in (
            lambda: bus.publish([step(0)]),
            lambda: bus.listen([Topic.STEPS]),
            lambda: bus.subscribe([Topic.STEPS], group="g"),
            lambda: listener.poll(timeout_s=0.0),
        ):
            with pytest.raises(UnavailableError, match="closed"):
                call()

    def test_a_broadcast_reaches_every_listener_and_late_ones_from_the_start(self, make_bus):
        bus, other = make_bus(OonaConfig())
        listeners = [bus.listen([Topic.STEPS]), other.listen([Topic.STEPS]), other.listen([Topic.STEPS], key="b")]
        bus.publish([step(0, "a"), step(1, "b")])
        bus.flush(timeout_s=WAIT_S)
        late = [other.listen([Topic.STEPS], from_start=True, name="late"), other.listen([Topic.STEPS])]
        assert sum(group.group.startswith("listener-late-") for group in bus.stats().groups) == 1
        assert sorted(numbers(take(listeners[0], 2))) == sorted(numbers(take(listeners[1], 2))) == [0, 1]
        assert numbers(take(listeners[2], 1)) == [1]
        assert sorted(numbers(take(late[0], 2))) == [0, 1]
        assert late[1].poll(timeout_s=0.0) == []
        for listener in (*listeners, *late):
            listener.close()
        assert bus.stats().groups == ()

    # ---- replay

    def test_a_group_may_start_from_an_offset(self, make_bus):
        bus, other = make_bus(OonaConfig())
        first = bus.subscribe([Topic.STEPS], group="first")
        bus.publish([step(number) for number in range(6)])
        third = take(first, 6)[2]
        again = other.subscribe([Topic.STEPS], group="again", from_offsets={third.shard: third.offset})
        assert numbers(take(again, 4)) == [2, 3, 4, 5]
        elsewhere = other.subscribe([Topic.STEPS], group="end", from_offsets={third.shard + 1: 0})
        assert elsewhere.poll(timeout_s=0.0) == []

    def test_a_group_may_start_from_a_time(self, make_bus):
        bus, other = make_bus(OonaConfig())
        bus.publish([step(0), step(1)])
        bus.flush(timeout_s=WAIT_S)
        time.sleep(0.002)
        since = time.time()
        bus.publish([step(2), step(3)])
        bus.flush(timeout_s=WAIT_S)
        assert numbers(take(other.subscribe([Topic.STEPS], group="g", from_time=since), 2)) == [2, 3]
        assert numbers(take(other.subscribe([Topic.STEPS], group="all", from_time=0.0), 4)) == [0, 1, 2, 3]
        assert other.subscribe([Topic.STEPS], group="later", from_time=since + 3600).poll(timeout_s=0.0) == []
        assert numbers(bus.read(from_time=since).deliveries) == [2, 3]

    def test_only_one_place_to_start_from_is_given(self, make_bus):
        bus, _ = make_bus(OonaConfig())
        with pytest.raises(ValueError, match="one of them"):
            bus.subscribe([Topic.STEPS], group="g", from_start=True, from_time=0.0)

    def test_reading_without_a_group_leaves_no_trace(self, make_bus):
        bus, other = make_bus(OonaConfig())
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0, "a"), started("a"), step(1, "a"), step(2, "b")])
        bus.flush(timeout_s=WAIT_S)
        before = [(group.group, group.pending, group.delivered) for group in bus.stats().groups]
        page = other.read([Topic.STEPS], key="a", max_messages=1)
        assert (numbers(page.deliveries), page.is_end) == ([0], False)
        seen = list(page.deliveries)
        while not page.is_end:
            page = other.read([Topic.STEPS], key="a", positions=page.positions)
            seen += page.deliveries
        assert numbers(seen) == [0, 1]
        bus.publish([step(3, "a")])
        bus.flush(timeout_s=WAIT_S)
        assert numbers(other.read(positions=page.positions).deliveries) == [3]
        assert before == [("g", 3, 0)]
        assert bus.counts("a").delivered == 0
        assert len(take(subscription, 4)) == 4

    # ---- knowing again

    def test_a_consumer_that_starts_again_knows_what_it_had_handled(self, make_bus):
        bus, _ = make_bus(OonaConfig(lease_s=3600.0))
        first, duplicates = bus.subscribe([Topic.STEPS], group="g"), Duplicates()
        bus.publish([step(number) for number in range(4)])
        duplicates.handled(take(first, 4, ack=False)[:3])
        first.close()  # before it could acknowledge
        again = Duplicates(positions=duplicates.positions)
        came = take(bus.subscribe([Topic.STEPS], group="g"), 4)
        assert numbers(again.fresh(came)) == [3]
        assert again.num_dropped == 3

    def test_stats_tell_of_topics_and_groups(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=3600.0))
        subscription = bus.subscribe([Topic.STEPS], group="g", key="run")
        bus.publish([step(number) for number in range(5)] + [started()])
        bus.flush(timeout_s=WAIT_S)  # the last lies with another shard
        held = take(subscription, 5, ack=False)
        subscription.ack(held[:2])
        subscription.close()
        stats = other.stats()
        topics = {topic.topic: topic for topic in stats.topics}
        assert (topics[Topic.STEPS].published, topics[Topic.STEPS].kept) == (5, 5)
        assert topics[Topic.RUN_STARTED].kept_bytes > 100
        oldest, newest = topics[Topic.STEPS].oldest_at, topics[Topic.STEPS].newest_at
        assert oldest <= newest <= time.time() + 1
        (group,) = stats.groups
        assert (group.group, group.topics, group.key) == ("g", (Topic.STEPS,), "run")
        assert (group.pending, group.leased, group.members) == (3, 0, 0)
        assert (group.delivered, group.acknowledged) == (5, 2)
        assert stats.num_shards == bus._transport.num_shards
