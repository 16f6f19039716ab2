"""Nissa in its own process: follows the bus, survives being killed, and is missed only politely."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence

import pytest

from actors.alerts import AlertSender
from actors.cluster import disconnect
from actors.nissa import NissaActor, NissaHandle, connect, spawn
from actors.platform import _kept_settings
from actors.settings import Settings
from esper.config import PageConfig
from esper.leyline.alerts import AlertKind
from esper.leyline.bus import BusStats, GroupStats
from esper.leyline.errors import UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import Delivery
from esper.leyline.signals import EpochRecord, StepBatch
from esper.leyline.summary import BusCounts

RUN = "run-1"


def messages(num_epochs: int = 3) -> list[OonaMessage]:
    records = [
        EpochRecord(run_id=RUN, epoch=epoch, num_epochs=num_epochs, step=epoch + 1, train_loss=1.0 / (epoch + 1))
        for epoch in range(num_epochs)
    ]
    sent = [OonaMessage.of(Topic.EPOCH, record, sender_id="trainer", key=RUN) for record in records]
    return [m.model_copy(update={"event_id": f"e{i}", "timestamp": 1e9 + i}) for i, m in enumerate(sent)]


class LogBus:
    """A Bus over a fixed log: every group that starts at the start reads all of it, once."""

    def __init__(self, log: Sequence[OonaMessage]) -> None:
        self.log = list(log)

    def listen(self, topics, *, key=None, from_start=False, name=""):
        """A group of its own, which ends with it: one that stayed would keep all that comes later in the log."""
        assert from_start
        assert Topic.EPOCH in topics
        return LogSubscription(self.log)

    def publish(self, messages):
        self.log.extend(messages)

    def flush(self, *, timeout_s=10.0):
        pass

    def counts(self, key):
        return BusCounts(published=len(self.log))

    def close(self):
        pass


class LogSubscription:
    def __init__(self, log: list[OonaMessage]) -> None:
        self.log, self.at, self.acked = log, 0, 0

    def poll(self, *, max_messages=256, timeout_s=1.0):
        assert self.acked == self.at  # what was taken is acknowledged before more is asked for
        if self.at == len(self.log):
            time.sleep(min(timeout_s, 0.01))  # stands for the wait at the broker
            return []
        message = self.log[self.at]
        self.at += 1
        return [Delivery(shard=0, offset=self.at, message=message)]

    def ack(self, deliveries):
        self.acked += len(deliveries)

    def close(self):
        pass


class UnreachableOnce:
    """Fails at first, as a bus that is just restarting."""

    def __init__(self, log: Sequence[OonaMessage]) -> None:
        self.log, self.num_calls = log, 0

    def __call__(self) -> LogBus:
        self.num_calls += 1
        if self.num_calls == 1:
            raise UnavailableError("the bus does not answer")
        return LogBus(self.log)


def full_log() -> LogBus:
    return LogBus(messages())


def no_bus() -> LogBus:
    raise UnavailableError("the bus does not answer")


def test_drain_waits_for_what_was_published():
    bus = LogBus(messages(2))
    nissa = NissaActor(lambda: bus)
    try:
        view = nissa.drain(RUN, timeout_s=60)
        assert view is not None
        assert view.epochs_done == 2
        bus.publish(messages(3)[2:])
        view = nissa.drain(RUN, timeout_s=60)
        assert view is not None
        assert view.is_done
        assert nissa.runs() == (RUN,)
        assert repr(nissa) == "Nissa(following)"
        assert nissa.snapshot("unknown") is None
    finally:
        nissa.stop()
    assert nissa.state() == "stopped"


def test_a_bus_that_fails_is_tried_again():
    factory = UnreachableOnce(messages())
    nissa = NissaActor(factory)
    try:
        view = nissa.drain(RUN, timeout_s=60)
        assert view is not None
        assert view.is_done
        assert factory.num_calls == 2
    finally:
        nissa.stop()


def test_a_message_that_is_not_its_contract_is_left_out(caplog):
    bad = OonaMessage(sender_id="x", trace_id="t", topic=Topic.EPOCH, key=RUN, payload={"epoch": "four"})
    nissa = NissaActor(lambda: LogBus([bad, *messages()]))
    try:
        view = nissa.drain(RUN, timeout_s=60)
    finally:
        nissa.stop()
    assert view is not None
    assert view.is_done
    assert "message.refused" in caplog.text


def test_without_a_bus_a_drain_says_what_it_waits_for():
    nissa = NissaActor(no_bus)
    try:
        with pytest.raises(UnavailableError, match=r"did not catch up within 0\.05 s"):
            nissa.drain(RUN, timeout_s=0.05)
        assert nissa.snapshot(RUN) is None
    finally:
        nissa.stop()


def spiking(num_steps: int = 60) -> list[OonaMessage]:
    """Steps with a loss that jumps and stays high, told one by one."""
    found = []
    for step in range(num_steps):
        body = StepBatch(run_id=RUN, first_step=step, losses=(1.0 if step < 50 else 30.0,), milliseconds=(1.0,))
        message = OonaMessage.of(Topic.STEPS, body, sender_id="trainer", key=RUN)
        found.append(message.model_copy(update={"event_id": f"s{step}", "timestamp": 1e9 + step}))
    return found


def test_an_alert_stands_in_the_view_and_is_told_on_the_bus_once_even_by_a_nissa_that_reads_the_log_again():
    bus = LogBus(spiking())
    for life in range(2):
        nissa = NissaActor(lambda: bus)
        try:
            view = nissa.drain(RUN, timeout_s=60)
            assert view is not None
            [alert] = view.open_alerts
            assert (alert.kind, alert.since_step) == (AlertKind.LOSS_SPIKE, 48)
            waiting = nissa.to_tell()
            if life == 0:
                assert [message.body().count for message in waiting] == [1, 2, 4, 8]
                bus.publish(waiting)
                nissa.told(waiting)
            assert list(nissa.to_tell()) == []
            assert nissa.drain(RUN, timeout_s=60) == view
        finally:
            nissa.stop()


def test_a_group_that_stands_still_is_an_alert_of_the_platform():
    nissa = NissaActor(lambda: LogBus(messages(2)))
    try:
        assert nissa.drain(RUN, timeout_s=60) is not None
        for look in range(20):
            group = GroupStats(group="slow", topics=("t",), pending=100 * look)
            nissa.looked(BusStats(num_shards=1, groups=(group,)))
        [alert] = nissa.platform_alerts()
        assert (alert.kind, alert.group, alert.is_open) == (AlertKind.BUS_LAG, "slow", True)
        nissa.looked(BusStats(num_shards=1))
        [alert] = nissa.platform_alerts()
        assert not alert.is_open
    finally:
        nissa.stop()


def test_the_sender_of_alerts_tells_them_and_says_once_that_the_bus_is_missing(caplog):
    class Stated(LogBus):
        def stats(self):
            return BusStats(num_shards=1)

    bus, is_up, came, tried = Stated(spiking()), threading.Event(), threading.Event(), threading.Semaphore(0)

    def connect():
        tried.release()
        if not is_up.is_set():
            raise UnavailableError("the bus does not answer")
        return bus

    nissa = NissaActor(lambda: bus)
    publish = bus.publish
    bus.publish = lambda told: (publish(told), came.set())
    assert nissa.drain(RUN, timeout_s=60) is not None
    sender = AlertSender(nissa, connect, every_s=0.01)
    try:
        for _ in range(3):
            assert tried.acquire(timeout=60)
        is_up.set()
        assert came.wait(60)
    finally:
        sender.stop()
        nissa.stop()
    told = [m.body() for m in bus.log if m.topic is Topic.ALERTS]
    assert [alert.count for alert in told] == [1, 2, 4, 8, 8]
    assert "not heard of" in told[-1].ending  # since the year 2001
    assert caplog.text.count("alerts.bus.silent") == 1


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    ray.init(
        "local", num_cpus=1, include_dashboard=False, namespace="nissa-test", log_to_driver=False, logging_level="ERROR"
    )
    yield ray
    disconnect()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.mark.ray
def test_a_killed_nissa_comes_back_and_reads_the_log_again(cluster):
    handle = spawn(full_log, namespace="nissa-test")
    before = handle.drain(RUN, timeout_s=240)
    assert before is not None
    assert before.is_done
    found = connect(namespace="nissa-test")
    assert NissaHandle(found.actor, deadline_s=60.0).runs() == (RUN,)
    cluster.kill(handle.actor, no_restart=False)
    deadline = time.monotonic() + 240
    while True:
        try:
            after = handle.drain(RUN, timeout_s=20)
            break
        except UnavailableError:
            assert time.monotonic() < deadline
    assert after == before


@pytest.mark.ray
def test_errors_and_absence_arrive_as_unavailable(cluster):
    with pytest.raises(UnavailableError, match="there is no Nissa named nobody"):
        connect(name="nobody", namespace="nissa-test")
    handle = spawn(no_bus, name="busless", namespace="nissa-test")
    with pytest.raises(UnavailableError, match="did not"):
        handle.drain(RUN, timeout_s=0.5)
    cluster.kill(handle.actor)
    patient = NissaHandle(handle.actor, deadline_s=60.0)

    def ask_until_it_is_gone():
        while True:  # a call that comes before the kill is still answered; the test's own limit ends this
            patient.snapshot(RUN)

    with pytest.raises(UnavailableError, match="not there at present"):
        ask_until_it_is_gone()


def patiently(ask):
    """The first answer that says something: a Nissa that is silent for 2 s has no settings to tell of."""
    deadline = time.monotonic() + 120
    while not (answer := ask()):
        assert time.monotonic() < deadline
    return answer


@pytest.mark.ray
def test_who_shares_a_nissa_hears_whose_settings_hold(cluster):
    first = Settings(None, PageConfig(enabled=False), None)
    assert _kept_settings("shared", first) == ()  # it does not run yet
    handle = spawn(full_log, name="shared", namespace="esper", metrics_every_s=None, page=first.page)
    handle.drain(RUN, timeout_s=240)
    assert _kept_settings("shared", first) == ()
    other = Settings(5.0, PageConfig(enabled=False), "http://someone:4318/secret")
    (words,) = patiently(lambda: _kept_settings("shared", other))
    assert words == (
        "Nissa runs already, with the settings of the run that started it: "
        "nissa.metrics_every_s stays null, nissa.otlp_endpoint stays null"
    )
    (words,) = patiently(lambda: _kept_settings("shared", first._replace(page=PageConfig(port=1))))
    assert "nissa.page stays as it is" in words
    cluster.kill(handle.actor)
