"""Nissa's alerts on their way into the packet of a run."""

from __future__ import annotations

import threading
import time

import pytest
from tolaria_support import SITE, config, train

from esper.leyline import Alert, AlertKind, OonaMessage, SeedStage, Severity, Topic, UnavailableError
from esper.oona import MemoryBus
from esper.tamiyo.controller import LocalController
from esper.tolaria import alarms
from esper.tolaria.alarms import Alarms


def alert(number=0, *, run_id="run", ended_at=None, **rest):
    fields = {"kind": AlertKind.LOSS_RISE, "severity": Severity.WARNING, "site": None, **rest}
    return Alert(
        alert_id=f"alert{number}", run_id=run_id, since=1.0, updated_at=1.0, summary="the loss rises",
        evidence="1.9 times", detector="change_point", command="esper runs show run", ended_at=ended_at, **fields,
    )  # fmt: skip


def publish(bus, *alerts):
    bus.publish([OonaMessage.of(Topic.ALERTS, one, sender_id="nissa", key=one.run_id) for one in alerts])
    bus.flush()


def wait_for(condition):
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def bus():
    bus = MemoryBus()
    yield bus
    bus.close()


@pytest.fixture
def heard(bus):
    heard = Alarms(bus, run_id="run")
    heard.begin()
    wait_for(lambda: bus.stats().groups)
    yield bus, heard
    heard.close()
    heard._thread.join(10.0)
    assert not heard._thread.is_alive()
    assert bus.stats().groups == ()


def test_an_alert_stands_from_its_begin_to_its_end(heard):
    bus, listener = heard
    listener.standing(3)
    publish(bus, alert(0), alert(1, run_id="another"), alert(2, site="a", kind=AlertKind.DEAD_CHANNELS))
    wait_for(lambda: len(listener.standing(4)) == 2)
    rise, dead = listener.standing(4)
    assert (rise.kind, rise.epoch, rise.is_divergence) == (AlertKind.LOSS_RISE, rise.epoch, True)
    assert rise.epoch in {3, 4}
    assert (dead.site, dead.is_divergence) == ("a", False)
    publish(bus, alert(0, ended_at=2.0, ending="as before"))
    wait_for(lambda: listener.standing(5) == (dead,))


def test_so_many_at_once_are_kept(heard, monkeypatch):
    bus, listener = heard
    monkeypatch.setattr(alarms, "MAX_STANDING", 3)
    publish(bus, *(alert(number) for number in range(5)))
    wait_for(lambda: [one.alert_id for one in listener.standing(0)] == ["alert2", "alert3", "alert4"])


def test_a_bus_that_is_away_holds_nothing_up_and_is_listened_to_again(bus, monkeypatch, caplog):
    monkeypatch.setattr(alarms, "_PAUSE_S", 0.01)
    tries = []
    listen = bus.listen

    def away(*given, **named):
        tries.append(given)
        if len(tries) < 4:
            raise UnavailableError("no broker")
        return listen(*given, **named)

    monkeypatch.setattr(bus, "listen", away)
    listener = Alarms(bus, run_id="run")
    assert listener.standing(0) == ()  # begins to listen
    wait_for(lambda: bus.stats().groups)
    publish(bus, alert(0))
    wait_for(lambda: listener.standing(0))
    listener.close()
    listener._thread.join(10.0)
    assert [record.message for record in caplog.records].count("alerts.unheard") == 1


class Watching(LocalController):
    """Remembers which alerts its packets carried."""

    def __init__(self, chosen):
        super().__init__(chosen.tamiyo, seed=0)
        self.seen = []

    def decide(self, state, packet):
        self.seen.append([flag.kind for flag in packet.alerts])
        return super().decide(state, packet)


def test_a_run_does_not_begin_while_its_loss_rises_and_begins_when_that_is_over(tmp_path, bus, monkeypatch):
    chosen, came = config(deterministic="false"), threading.Semaphore(0)
    note = Alarms._note

    def noted(self, told):
        note(self, told)
        came.release()

    monkeypatch.setattr(Alarms, "_note", noted)

    class Nissa:
        """Tells of a rise before the first decision, and of its end before the third."""

        def at(self, place, step):
            if place == "step" and step in {2, 7}:
                wait_for(lambda: bus.stats().groups)
                publish(bus, alert(0, ended_at=2.0 if step == 7 else None))
                assert came.acquire(timeout=20.0)

    watching = Watching(chosen)
    summary, _ = train(tmp_path, chosen, bus=bus, controller=watching, faults=Nissa())
    assert watching.seen[:4] == [[AlertKind.LOSS_RISE], [AlertKind.LOSS_RISE], [], []]
    begun = summary.events[0]
    assert (begun.to_stage, begun.site, begun.epoch) == (SeedStage.GERMINATED, SITE, 2)
    [veto] = [record.veto for record in summary.vetoes]
    assert "Nissa's alert stands: the loss rises" in veto.reason


def test_in_deterministic_mode_none_is_heard(tmp_path, bus):
    chosen = config()
    watching = Watching(chosen)

    class Nissa:
        def at(self, place, step):
            if (place, step) == ("step", 0):
                publish(bus, alert(0))

    train(tmp_path, chosen, bus=bus, controller=watching, faults=Nissa())
    assert watching.seen == [[]] * 8
    assert bus.stats().groups == ()
