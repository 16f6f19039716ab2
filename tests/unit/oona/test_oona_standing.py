"""A bus that does not run is looked at through its logs, which stay as they are."""

import time

import pytest
from bus_conformance import step

from esper.leyline.errors import FencedError, NotFoundError, StorageError
from esper.leyline.messages import Topic
from esper.oona import Batch, Broker, Journal, Record, SegmentLog, StandingBus, Start, encode_batch


def record(number, key):
    message = step(number, key)
    return Record(message.topic.value, message.key, message.model_dump_json().encode())


def left(directory, shard, records, *, at):
    """What a shard leaves that is killed after a group has acknowledged its first message."""
    journal = Journal.open(directory / f"shard-{shard}-of-2", Broker(), now=0.0, shard=shard)
    journal.join("reader", [Topic.STEPS.value], key=None, start=Start(), now=0.0)
    batch = Batch("p", 0, 0, tuple(records))
    journal.append(batch, encode_batch(batch), at=at)
    journal.poll("reader", "m", 0, 1, 0.0)
    journal.ack("reader", [0], 0.0)
    journal.close()


@pytest.fixture
def logs(tmp_path):
    left(tmp_path, 0, [record(0, "a"), record(1, "a")], at=100.0)
    left(tmp_path, 1, [record(2, "b"), Record(Topic.STEPS.value, "b", b"no message")], at=200.0)
    return tmp_path


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_it_tells_what_the_bus_would_and_changes_nothing(logs):
    last = max((logs / "shard-1-of-2").glob("*.log"))
    last.write_bytes(last.read_bytes() + b"torn")
    before = contents(logs)
    bus = StandingBus(logs)
    page = bus.read()
    assert [delivery.message.body().first_step for delivery in page.deliveries] == [0, 1, 2]
    assert (page.undecodable, page.positions, page.is_end) == (((1, 1),), {0: 2, 1: 2}, True)
    assert len(bus.read([Topic.STEPS], from_time=150.0).deliveries) == 1
    assert len(bus.read(key="a", positions={0: 1}).deliveries) == 1
    (topic,) = bus.stats().topics
    assert (topic.topic, topic.published, topic.oldest_at, topic.newest_at) == (Topic.STEPS, 4, 100.0, 200.0)
    (group,) = bus.stats().groups
    assert (group.group, group.pending, group.acknowledged) == ("reader", 2, 2)
    bus.close()
    assert contents(logs) == before


def test_no_bus_starts_meanwhile_and_none_may_run(logs):
    bus = StandingBus(logs)
    with pytest.raises(FencedError):
        SegmentLog(logs / "shard-1-of-2")
    bus.close()
    running = SegmentLog(logs / "shard-1-of-2")
    with pytest.raises(FencedError):
        StandingBus(logs)
    running.close()
    SegmentLog(logs / "shard-0-of-2").close()  # let go again


def test_a_damaged_log_and_none_at_all_are_refused(logs, tmp_path):
    with pytest.raises(NotFoundError, match="holds no log"):
        StandingBus(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    path = max((logs / "shard-0-of-2").glob("*.log"))
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="esper bus repair"):
        StandingBus(logs)
    assert path.read_bytes() == bytes(data)


def test_it_is_as_idle_as_the_log_says(logs):
    bus = StandingBus(logs)
    (group,) = bus.stats().groups
    bus.close()
    assert group.idle_s < time.time() - 200.0  # it did not run since then
