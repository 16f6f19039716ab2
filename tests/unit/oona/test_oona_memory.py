"""The bus of one process: the conformance suite, and leases on an injected clock."""

import subprocess
import sys
import threading

import pytest
from bus_conformance import WAIT_S, BusConformance, numbers, step, take

from esper.config import OonaConfig
from esper.leyline import NotFoundError, Topic, UnavailableError
from esper.oona import MemoryBus
from esper.oona import consumer as consumer_module


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def make_bus():
    made = []

    def make(config, **kwargs):
        made.append(MemoryBus(config, **kwargs))
        return made[-1], made[-1]

    yield make
    for bus in made:
        bus.close()


class TestMemoryBus(BusConformance):
    def test_what_is_not_acknowledged_within_the_lease_comes_again(self, make_bus):
        clock = Clock()
        bus, _ = make_bus(OonaConfig(lease_s=30.0), clock=clock)
        slow = bus.subscribe([Topic.STEPS], group="g")
        other = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0), step(1)])
        held = take(slow, 2, ack=False)
        clock.now = 29.9
        assert other.poll(timeout_s=0.0) == []
        clock.now = 30.0
        again = other.poll(timeout_s=0.0)
        assert [(delivery.attempt, delivery.offset) for delivery in again] == [(2, 0), (2, 1)]
        assert [delivery.message for delivery in again] == [delivery.message for delivery in held]
        assert bus.counts("run").redelivered == 2

    def test_a_waiting_poll_wakes_when_a_lease_runs_out(self, make_bus):
        bus, _ = make_bus(OonaConfig(lease_s=0.2))
        slow = bus.subscribe([Topic.STEPS], group="g")
        other = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0)])
        take(slow, 1, ack=False)
        assert [delivery.attempt for delivery in other.poll(timeout_s=WAIT_S)] == [2]

    def test_what_this_member_acknowledged_does_not_come_again(self, make_bus, monkeypatch):
        """The acknowledgement is lost until the lease has run out."""
        clock = Clock()
        bus, _ = make_bus(OonaConfig(lease_s=30.0), clock=clock)
        subscription = bus.subscribe([Topic.STEPS], group="g")
        monkeypatch.setattr(consumer_module, "RETRY_S", 0.01)
        may_ack, ack = threading.Event(), bus._transport.ack

        def unreliable(group, offsets):
            if not may_ack.is_set():
                raise UnavailableError("lost")
            ack(group, offsets)

        monkeypatch.setattr(bus._transport, "ack", unreliable)
        bus.publish([step(0)])
        take(subscription, 1)
        clock.now = 30.0
        assert subscription.poll(timeout_s=0.0) == []
        assert bus.counts("run").redelivered == 1
        may_ack.set()
        subscription.close()
        clock.now = 60.0
        assert bus.subscribe([Topic.STEPS], group="g").poll(timeout_s=0.0) == []

    def test_a_group_that_is_gone_is_said_to_be(self, make_bus):
        bus, _ = make_bus(OonaConfig())
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0)])
        taken = take(subscription, 1, ack=False)
        bus._transport._broker.forget("g")
        with pytest.raises(NotFoundError, match="no group g"):
            subscription.poll()
        subscription.ack(taken)
        with pytest.raises(NotFoundError, match="no group g"):
            subscription.close()

    def test_drops_are_told_at_first_and_as_they_double(self, make_bus, caplog):
        bus, _ = make_bus(OonaConfig(backlog=2, batch=1, drop_oldest=(Topic.STEPS,)))
        bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(number) for number in range(11)])
        bus.flush(timeout_s=WAIT_S)
        told = [record for record in caplog.records if record.message == "oona.messages.dropped"]
        assert [(record.group, record.num_dropped) for record in told] == [("g", n) for n in (1, 2, 4, 8)]
        assert bus.counts("run").dropped == 9

    def test_a_replay_from_what_is_gone_says_so(self, make_bus, caplog):
        bus, _ = make_bus(OonaConfig(batch=1))
        bus._transport._broker.kept.retain = 2
        bus.publish([step(number) for number in range(9)])
        bus.flush(timeout_s=WAIT_S)
        bus._transport._broker.trim()
        assert numbers(take(bus.subscribe([Topic.STEPS], group="g", from_offsets={0: 3}), 2)) == [7, 8]
        assert [record.message for record in caplog.records] == ["oona.replay.shortened"]

    def test_a_closed_bus_takes_nothing(self):
        bus = MemoryBus()
        subscription = bus.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0)])
        bus.close()
        bus.close()
        with pytest.raises(UnavailableError, match="closed"):
            bus.publish([step(1)])
        with pytest.raises(UnavailableError, match="closed"):
            subscription.poll()


def test_the_bus_needs_neither_torch_nor_ray():
    code = "import esper.oona, sys; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
