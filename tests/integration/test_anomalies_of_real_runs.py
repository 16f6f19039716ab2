"""Nissa's detectors on real runs in this process, with real faults: each is named at its place; clean runs are not."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from bad_kernels import KEY, SITE, config, hooked, stocked

from esper.api import train_local
from esper.kasmina.cache import KernelCache
from esper.kasmina.sites import find_sites
from esper.leyline import BusCounts, EpochRecord, NonFiniteError, StepBatch, Topic
from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.messages import OonaMessage
from esper.nissa.anomalies import Watch
from esper.oona.memory import MemoryBus
from esper.tamiyo.controller import LocalController
from esper.tolaria import session
from jobs.workload import ConfiguredWorkload


class Tape:
    """A Bus that keeps what is published."""

    def __init__(self) -> None:
        self.messages: list[OonaMessage] = []

    def publish(self, messages):
        self.messages.extend(messages)

    def flush(self, *, timeout_s=10.0):
        pass

    def counts(self, key):
        return BusCounts(published=len(self.messages))

    def close(self):
        pass


class At:
    """A fault plan that does something at every step from `first` to `last`."""

    def __init__(self, first, last, do) -> None:
        self.first, self.last, self.do, self.fired = first, last, do, 0

    def at(self, place, step):
        if place == "step" and self.first <= step <= self.last:
            self.fired += 1
            self.do()


def run(directory, *, kernel="none", faults=None) -> list[Alert]:
    """Trains for 24 epochs; returns every alert as it was told first, and those that ended as they ended."""
    chosen, tape = config(kernel, "mlp", 0), Tape()
    workload = ConfiguredWorkload(chosen)()
    plan = faults(workload) if faults else None
    hub = None
    if kernel != "none":
        sites = find_sites(workload.model, workload.example, sites=chosen.kasmina.sites)
        hub = stocked(kernel, sites[SITE["mlp"]])
    with hooked(), contextlib.suppress(NonFiniteError):  # the governor gives a host up that diverges again and again
        train_local(
            workload, chosen, directory=str(directory), run_id="run", hub=hub, bus=tape,
            controller=LocalController(chosen.tamiyo, seed=0), public_key=KEY.public_key().public_bytes_raw(),
            faults=plan,
        )  # fmt: skip
    assert plan is None or plan.fired
    watch, told = Watch(), []
    for message in tape.messages:
        told += watch.apply(message.body(), message.timestamp)
    return told


def kinds(told: list[Alert]) -> set[AlertKind]:
    return {alert.kind for alert in told}


def test_a_clean_run_that_grows_a_kernel_raises_nothing(tmp_path):
    told = run(tmp_path, kernel="mlp_2x")
    assert kinds(told) <= {AlertKind.SLOW_STEPS}, told  # a busy machine is slow indeed


class Clock:
    """A trainer's clock that nothing on the machine disturbs: each look takes about two milliseconds."""

    def __init__(self) -> None:
        self.now, self._looks = 0.0, 0

    def perf_counter(self) -> float:
        self._looks += 1
        self.now += 2e-3 * (1.0 + 0.2 * math.sin(self._looks))
        return self.now

    def lose(self, seconds: float) -> None:
        self.now += seconds


def test_a_slow_disk_or_neighbour_is_seen_in_step_times(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(session, "time", clock)
    told = run(tmp_path, faults=lambda _: At(230, 290, lambda: clock.lose(0.06)))
    [first] = [alert for alert in told if alert.kind is AlertKind.SLOW_STEPS and 210 <= alert.since_step <= 260][:1]
    assert first.figures["value"] > 60.0
    assert first.command == "esper platform status"
    ended = [alert for alert in told if alert.alert_id == first.alert_id and not alert.is_open]
    assert [290 < alert.ended_step < 360 for alert in ended] == [True]
    assert kinds(told) == {AlertKind.SLOW_STEPS}


def test_a_layer_that_dies_is_named(tmp_path):
    def kill(workload):
        layer = next(module for module in workload.model.blocks[0].modules() if isinstance(module, torch.nn.Linear))

        dead = [0]

        def die():  # one channel after the other: a jump of the loss would be the governor's business
            dead[0] += 1
            with torch.no_grad():
                layer.weight[: min(dead[0] // 5, 10)] = 0.0
                layer.bias[: min(dead[0] // 5, 10)] = -1.0

        return At(150, 10_000, die)

    told = run(tmp_path, faults=kill)
    dead = [alert for alert in told if alert.kind is AlertKind.DEAD_CHANNELS]
    assert {alert.site for alert in dead} == {SITE["mlp"]}
    assert dead[0].figures["value"] >= 0.5


@pytest.mark.parametrize("kernel", ["nan_when_live", "scale_jumps_when_live"])
def test_a_kernel_that_turns_bad_on_the_live_path_is_named(tmp_path, kernel):
    told = run(tmp_path, kernel=kernel)
    named = [alert for alert in told if alert.kind is AlertKind.ROLLBACKS]
    assert named[0].site == SITE["mlp"]
    assert kernel in named[0].summary
    assert kinds(told) <= {AlertKind.ROLLBACKS, AlertKind.LOSS_SPIKE, AlertKind.SLOW_STEPS}


def test_labels_that_turn_wrong_are_a_rise_of_the_loss(tmp_path):
    def spoil(workload):
        targets = workload.train[1]

        def shuffle():
            targets[:] = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))]

        return At(250, 250, shuffle)

    told = run(tmp_path, faults=spoil)
    assert kinds(told) & {AlertKind.LOSS_RISE, AlertKind.LOSS_SPIKE}
    assert min(alert.since_step for alert in told if alert.kind is not AlertKind.SLOW_STEPS) >= 240


def test_a_consumer_that_stalls_and_comes_back():
    bus, watch, told = MemoryBus(), Watch(), []
    subscriptions = {name: bus.subscribe([Topic.STEPS], group=name) for name in ("well", "ill")}
    try:
        for look in range(40):
            body = StepBatch(run_id="run", first_step=look, losses=(1.0,), milliseconds=(1.0,))
            bus.publish([OonaMessage.of(Topic.STEPS, body, sender_id="t", key="run") for _ in range(50)])
            bus.flush()
            for name, subscription in subscriptions.items():
                if name == "well" or not 10 <= look < 30:
                    while taken := subscription.poll(timeout_s=0.0):
                        subscription.ack(taken)
            told += watch.look(bus.stats(), 5.0 * look)
    finally:
        bus.close()
    assert {alert.group for alert in told} == {"ill"}
    assert (told[0].kind, told[0].command) == (AlertKind.BUS_LAG, "esper bus stats")
    assert 50.0 < told[0].since <= 100.0
    assert not told[-1].is_open
    assert 150.0 <= told[-1].ended_at <= 160.0
    assert len({alert.alert_id for alert in told}) == 1


def test_a_cache_that_is_too_small():
    cache, watch, told = KernelCache(10), Watch(), []
    for epoch in range(40):
        # first one kernel that fits again and again, then five that push each other out
        for number in range(5):
            cache.get("a" if epoch < 20 else f"k{number}", lambda: (None, 4))
        record = EpochRecord(
            run_id="run", epoch=epoch, num_epochs=50, step=epoch, train_loss=1.0, cache_hits=cache.hits,
            cache_misses=cache.misses,
        )  # fmt: skip
        told += watch.apply(record, float(epoch))
    assert [alert.kind for alert in told[:1]] == [AlertKind.CACHE_MISSES]
    assert 20 <= told[0].since_step < 26
