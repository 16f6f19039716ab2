"""The publisher against a transport that loses answers, comes late, or is not there."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from bus_conformance import WAIT_S, step

from esper.leyline import OonaMessage, TamperedError, UnavailableError
from esper.oona import decode_batch, shard_of
from esper.oona import publisher as publisher_module
from esper.oona.publisher import WINDOW, Publisher


class Scripted:
    """Keeps what was sent and answers when the test says so."""

    def __init__(self, num_shards=1, answer=None):
        self.num_shards = num_shards
        self.sent = []
        self.arrived = threading.Condition()
        self.answer = answer

    def append(self, shard, body):
        future: Future[bool] = Future()
        with self.arrived:
            self.sent.append((shard, decode_batch(body), future))
            self.arrived.notify_all()
        if self.answer is not None:
            self.answer(len(self.sent), future)
        return future

    def wait_for(self, count):
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.sent) >= count, WAIT_S)
        return self.sent


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(publisher_module, "RETRY_S", 0.001)
    made = []

    def make_(transport, **kwargs):
        made.append(Publisher(transport, **kwargs))
        return made[-1]

    yield make_
    for publisher in made:
        with publisher._changed:
            publisher._is_closed = True
            publisher._work.notify()
        if publisher._thread is not None:
            publisher._thread.join()


def test_batches_are_cut_at_their_size_and_numbered(make):
    transport = Scripted(answer=lambda _, future: future.set_result(True))
    publisher = make(transport, batch=4, linger_s=60.0)
    publisher.publish([step(number) for number in range(10)])
    publisher.flush(timeout_s=WAIT_S)
    batches = [batch for _, batch, _ in transport.sent]
    assert [(batch.seq, len(batch.records)) for batch in batches] == [(0, 4), (1, 4), (2, 2)]
    assert len({batch.producer for batch in batches}) == 1


def test_a_lone_message_lingers_no_longer_than_asked(make):
    transport = Scripted()
    make(transport, linger_s=0.001).publish([step(0)])
    assert len(transport.wait_for(1)) == 1


def test_the_window_is_bounded_and_moves_on(make):
    transport = Scripted()
    publisher = make(transport, batch=1, linger_s=0.0)
    publisher.publish([step(number) for number in range(WINDOW + 3)])
    transport.wait_for(WINDOW)
    assert len(transport.sent) == WINDOW
    transport.sent[1][2].set_result(True)
    _, newest, _ = transport.wait_for(WINDOW + 1)[-1]
    assert (newest.seq, newest.base) == (WINDOW, 0)
    transport.sent[0][2].set_result(True)
    _, newest, _ = transport.wait_for(WINDOW + 2)[-1]
    assert (newest.seq, newest.base) == (WINDOW + 1, 2)


def test_a_failed_or_refused_batch_is_sent_again_with_its_number(make):
    answers = [UnavailableError("restarting"), False, True]

    def answer(count, future):
        outcome = answers[count - 1]
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    transport = Scripted(answer=answer)
    publisher = make(transport, linger_s=0.0)
    publisher.publish([step(0)])
    publisher.flush(timeout_s=WAIT_S)
    assert [batch.seq for _, batch, _ in transport.sent] == [0, 0, 0]
    assert len({batch.records for _, batch, _ in transport.sent}) == 1


def test_an_outage_may_last_for_thousands_of_tries(make, monkeypatch):
    monkeypatch.setattr(publisher_module, "MAX_RETRY_S", 0.0)

    def answer(count, future):
        if count <= 1100:  # 2.0**1024 is no number
            future.set_exception(UnavailableError("no space"))
        else:
            future.set_result(True)

    transport = Scripted(answer=answer)
    publisher = make(transport, linger_s=0.0)
    publisher.publish([step(0)])
    publisher.flush(timeout_s=WAIT_S)
    assert len(transport.sent) == 1101


def test_a_batch_that_is_refused_for_good_is_reported_to_who_publishes(make):
    transport = Scripted(answer=lambda _, future: future.set_exception(TamperedError("the batch is not whole")))
    publisher = make(transport, linger_s=0.0)
    publisher.publish([step(0)])
    with pytest.raises(TamperedError, match="not whole"):
        publisher.flush(timeout_s=WAIT_S)
    with pytest.raises(TamperedError, match="not whole"):
        publisher.publish([step(1)])


def test_publish_gives_up_when_nobody_answers(make):
    publisher = make(Scripted(), batch=1, linger_s=0.0, deadline_s=0.05)
    with pytest.raises(UnavailableError, match="took nothing within"):
        publisher.publish([step(number) for number in range(3 * WINDOW)])


def test_flush_waits_for_what_came_before_and_not_for_later(make):
    transport = Scripted()
    publisher = make(transport, batch=1, linger_s=0.0)
    publisher.publish([step(0)])
    transport.wait_for(1)
    flushed = threading.Event()
    thread = threading.Thread(target=lambda: (publisher.flush(timeout_s=WAIT_S), flushed.set()))
    thread.start()
    publisher.publish([step(1)])
    transport.wait_for(2)
    transport.sent[1][2].set_result(True)
    assert not flushed.wait(0.05)
    transport.sent[0][2].set_result(True)
    assert flushed.wait(WAIT_S)
    thread.join()


def test_a_key_goes_to_one_shard(make):
    transport = Scripted(num_shards=3, answer=lambda _, future: future.set_result(True))
    publisher = make(transport, batch=2, linger_s=0.0)
    publisher.publish([step(number, f"key{number % 7}") for number in range(70)])
    publisher.flush(timeout_s=WAIT_S)
    assert {shard for shard, _, _ in transport.sent} == {0, 1, 2}
    for shard, batch, _ in transport.sent:
        assert {shard_of(record.topic, record.key, 3) for record in batch.records} == {shard}


def test_messages_whose_keys_alternate_travel_key_by_key_in_their_order(make):
    transport = Scripted(answer=lambda _, future: future.set_result(True))
    publisher = make(transport, batch=6, linger_s=60.0)
    publisher.publish([step(number, f"key{number % 2}") for number in range(6)])
    publisher.flush(timeout_s=WAIT_S)
    ((_, batch, _),) = transport.sent
    assert [(key, count) for _, key, count in batch.runs] == [("key0", 3), ("key1", 3)]
    steps = [OonaMessage.model_validate_json(record.data).payload["first_step"] for record in batch.records]
    assert steps == [0, 2, 4, 1, 3, 5]


def test_its_thread_is_woken_once_for_what_comes_within_the_linger_and_not_by_answers(make, monkeypatch):
    """Each waking takes the trainer's interpreter away from it."""
    # the linger ends once all is published, however slowly that goes
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(publisher_module, "time", clock)
    looks = []
    is_due = Publisher._is_due

    def counted(self):
        looks.append(is_due(self))
        return looks[-1]

    monkeypatch.setattr(Publisher, "_is_due", counted)
    transport = Scripted()
    publisher = make(transport, linger_s=0.5)
    for number in range(40):
        publisher.publish([step(number)])
    clock.now = 0.5
    ((_, batch, future),) = transport.wait_for(1)
    assert len(batch.records) == 40
    future.set_result(True)
    publisher.flush(timeout_s=WAIT_S)
    assert len(looks) <= 8  # 2 where nothing else ends a wait
    publisher.publish([step(40)])
    clock.now = 1.0
    assert transport.wait_for(2)[1][1].seq == 1  # it is woken where it sleeps without an end
