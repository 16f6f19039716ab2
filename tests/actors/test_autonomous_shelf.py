"""AutonomousTamiyo's own look at the stored policies, on a bus in memory and without Ray."""

from __future__ import annotations

import time

import safetensors.numpy
from test_tamiyo_serve import packet

import actors.autonomous as module
from actors.autonomous import AutonomousTamiyo
from esper.config import TamiyoConfig
from esper.leyline import OonaMessage, PolicyCard, RunState, Topic
from esper.oona.memory import MemoryBus
from esper.storage import Storage
from esper.tamiyo import initial_state
from esper.urza.policies import StoredPolicies

CONFIG = TamiyoConfig(warmup_epochs=0)


class Shared(MemoryBus):
    """One bus for both threads; it ends with the test."""

    def close(self):
        pass


def tell(bus, epoch):
    """What a run that listens tells of an epoch."""
    seen = packet(epoch)
    state = RunState(
        run_id="run", epoch=epoch, sites=("a", "b"), memory=initial_state(CONFIG, 0),
        config=CONFIG.model_dump(mode="json"), options=seen.options, budget=seen.budget,
    )  # fmt: skip
    bodies = [(Topic.SEED_HEALTH, layer) for layer in seen.layers]
    bodies += [(Topic.EPOCH, seen.epoch), (Topic.RUN_STATE, state)]
    bus.publish([OonaMessage.of(topic, body, sender_id="run", key="run") for topic, body in bodies])
    bus.flush()


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_tries_no_policy_in_shadow_before_somebody_listens(tmp_path, monkeypatch):
    """The replica does that for those who ask: two that try the same, and hold its network, are one too many."""
    monkeypatch.setattr(module, "_LOOK_S", 0.05)
    store, bus, looks = StoredPolicies(Storage.at(tmp_path)), Shared(), []
    weights = safetensors.numpy.save({})
    card = PolicyCard.of(weights, name="new", kind="heuristic", shape={"warmup_epochs": 1}, observation_version=1)
    store.nominate(store.put(card, weights))
    watcher = AutonomousTamiyo(lambda: bus, Storage.at(tmp_path))
    wait = watcher._changed.wait_for

    def counted(condition, timeout):
        looks.append(timeout)
        return wait(condition, timeout=timeout)

    watcher._changed.wait_for = counted
    try:
        assert watcher.wait(120.0)  # what is told before, it is not told again
        wait_for(lambda: len(looks) > 5)
        assert watcher._shelf.view().canary is None
        tell(bus, 0)
        wait_for(lambda: watcher.about()["told"] == 1)
        wait_for(lambda: watcher._shelf.view().canary is not None)
        assert watcher._shelf.view().canary.version == card.version
    finally:
        watcher.stop()
        MemoryBus.close(bus)
