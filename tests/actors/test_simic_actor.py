"""Rollouts on Ray: episodes come back, whatever becomes of a worker."""

from __future__ import annotations

import os
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


class Killed(simic.RolloutWorker):
    """Dies, with no word, of seed 7."""

    def play(self, ask):
        if ask.seed == 7:
            os._exit(1)
        return super().play(ask)


def test_episodes_come_back_from_actors(rollouts):
    asks = [Ask(0, seed, policy) for seed in (0, 1) for policy in ("none", "heuristic")]
    played = list(rollouts.play(asks))
    assert sorted((one.ask.seed, one.ask.policy) for one in played) == sorted((a.seed, a.policy) for a in asks)
    assert all(one.episode is not None and len(one.episode.moments) == 3 for one in played)


def test_one_that_always_dies_is_given_up(rollouts, monkeypatch):
    monkeypatch.setattr(simic, "RolloutWorker", type("Dying", (Killed,), {}))
    rollouts.close()
    rollouts._idle = [rollouts._spawn()]
    (played,) = rollouts.play([Ask(0, 7, "none")])
    assert played.episode is None
    assert "died 2 times" in played.problem


def test_one_that_takes_too_long_is_ended(rollouts):
    rollouts._config = rollouts._config.model_copy(update={"deadline_s": 0.01})
    (played,) = rollouts.play([replace(Ask(0, 0, "none"))])
    assert played.episode is None
    assert "longer than" in played.problem
