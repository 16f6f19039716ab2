"""Rollouts on Ray: episodes come back, whatever becomes of a worker."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from actors import simic
from actors.cluster import connected
from esper.simic.rollouts import Ask, load_tasks
from esper.simic.settings import RolloutConfig, TrainTamiyoConfig

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
CONFIG = TrainTamiyoConfig(overrides=("tolaria.epochs=3", "tezzeret.blueprints=[mlp_adapter]"))


@pytest.fixture(scope="module")
def cluster():
    with connected(dashboard=False) as joined:
        yield joined


@pytest.fixture
def rollouts(cluster):
    made = simic.RayRollouts(load_tasks(CONFIG, ROOT / "configs"), RolloutConfig(workers=2, cpus_per_worker=0.5))
    yield made
    made.close()


def killed_by(seed, flag):
    """A worker that dies, with no word, of this seed: always, or once if `flag` is a path. Made here, so that Ray sends
    it by value: its processes do not find this module.
    """
    base = simic.RolloutWorker

    class Killed(base):
        def play(self, ask):
            if ask.seed == seed and not (flag and flag.exists()):
                if flag:
                    flag.touch()
                os._exit(1)
            return base.play(self, ask)

    return Killed


def endless():
    """A worker that does not come to an end; made here for the same reason."""
    base = simic.RolloutWorker

    class Endless(base):
        def play(self, ask):
            threading.Event().wait()

    return Endless


def test_episodes_come_back_from_actors(rollouts):
    asks = [Ask(0, seed, policy) for seed in (0, 1) for policy in ("none", "heuristic")]
    played = list(rollouts.play(asks))
    assert sorted((one.ask.seed, one.ask.policy) for one in played) == sorted((a.seed, a.policy) for a in asks)
    assert all(one.episode is not None and len(one.episode.moments) == 3 for one in played)


def test_another_worker_plays_on(rollouts, monkeypatch, tmp_path):
    died = tmp_path / "died"
    monkeypatch.setattr(simic, "RolloutWorker", killed_by(7, died))
    rollouts.close()
    rollouts._idle = [rollouts._spawn()]
    played = list(rollouts.play([Ask(0, 7, "none"), Ask(0, 8, "none")]))
    assert died.exists()
    assert {one.ask.seed for one in played} == {7, 8}
    assert all(one.episode is not None for one in played), [one.problem for one in played]


def test_one_that_always_dies_is_given_up_and_others_are_played(rollouts, monkeypatch):
    monkeypatch.setattr(simic, "RolloutWorker", killed_by(7, None))
    rollouts.close()
    rollouts._idle = [rollouts._spawn()]
    played = {one.ask.seed: one for one in rollouts.play([Ask(0, 7, "none"), Ask(0, 8, "none")])}
    assert played[7].episode is None
    assert "died 2 times" in played[7].problem
    assert played[8].episode is not None, played[8].problem


def test_one_that_takes_too_long_is_ended(rollouts, monkeypatch):
    monkeypatch.setattr(simic, "RolloutWorker", endless())  # a real one may be done before it is looked at
    rollouts.close()
    rollouts._idle = [rollouts._spawn()]
    rollouts._config = rollouts._config.model_copy(update={"deadline_s": 0.01})
    (played,) = rollouts.play([replace(Ask(0, 0, "none"))])
    assert played.episode is None
    assert "longer than" in played.problem
