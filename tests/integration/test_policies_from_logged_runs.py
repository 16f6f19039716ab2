"""A policy from logged runs alone: who is compared with whom, what counts how much, and that nothing is played."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from esper.config import RewardConfig
from esper.leyline import DataError
from esper.simic.offline import OfflineConfig, judge, repeated, train_offline, weights_of
from esper.simic.reward import whole_gain
from esper.simic.rollouts import Ask, Player, load_tasks, twin_of
from esper.simic.settings import ImitationConfig, PpoConfig, TrainTamiyoConfig
from esper.tamiyo.net import PolicyNet
from esper.tamiyo.shape import NetShape

torch.set_num_threads(1)  # several threads on tiny tensors only wait for each other

ROOT = Path(__file__).parents[2]
QUICK = TrainTamiyoConfig(
    overrides=(
        "tolaria.epochs=8",
        "tolaria.batch_size=128",
        "tezzeret.blueprints=[mlp_adapter,mlp_4x]",
        "tamiyo.warmup_epochs=1",
        "tamiyo.plateau_window=1",
        "tamiyo.plateau_threshold=0.9",
    )
)
SMALL = {
    "net": {"hidden": 8, "heads": 2, "layers": 1},
    "imitation": ImitationConfig(epochs=2),
    "ppo": PpoConfig(epochs=1),
}
FREE = RewardConfig(params_rent=0.0, flops_rent=0.0, start_cost=0.0)


@pytest.fixture(scope="module")
def logged():
    """Runs of three policies on two seeds."""
    player = Player(load_tasks(QUICK, ROOT / "configs"))
    return [player.run(Ask(0, seed, policy)) for seed in (0, 1) for policy in ("none", "heuristic", "random")]


def test_a_run_is_judged_by_the_one_of_its_seed_that_did_not_grow(logged):
    judged = judge(logged, FREE)
    assert [one.lessons.policy for one in judged] == ["none", "heuristic", "random"] * 2
    for i, one in enumerate(judged):
        bare = logged[3 * (i // 3)]
        assert one.total == pytest.approx(whole_gain(logged[i], twin_of(bare), FREE.window))
        assert one.beside == "the same run without growth"
    assert judged[0].total == judged[3].total == 0.0
    assert judged[1].total != 0.0
    for group in (judged[:3], judged[3:]):
        assert sum(one.advantage for one in group) == pytest.approx(0.0, abs=1e-9)
    assert sum(one.advantage**2 for one in judged) == pytest.approx(len(judged))


def test_without_such_a_run_it_is_judged_by_the_others(logged):
    grown = [one for one in logged if one.about.policy != "none"]
    judged = judge(grown, FREE)
    assert len(judged) == 4
    assert {one.beside for one in judged} == {"the mean of 1 others"}
    assert judged[0].total == pytest.approx(-judged[1].total)  # two runs: what one is ahead the other is behind


def test_who_has_nobody_beside_him_is_left_out(logged):
    alone = replace(logged[1], about=replace(logged[1].about, seed=7))
    assert all(one.seed != 7 for one in judge([*logged, alone], FREE))
    with pytest.raises(DataError, match="nothing can be compared"):
        train_offline([alone, logged[1]], OfflineConfig(), told=print)


def test_the_better_a_run_the_more_it_counts_up_to_a_limit(logged):
    judged = [replace(judge(logged, FREE)[1], advantage=value) for value in (-1.0, 0.0, 1.0, 50.0)]
    weights = weights_of(judged, temperature=0.5, max_weight=10.0)
    assert weights.sum() == pytest.approx(1.0)
    assert weights[1] / weights[0] == pytest.approx(np.exp(2.0))
    assert weights[2] / weights[1] == pytest.approx(np.exp(2.0))
    assert weights[3] / weights[1] == pytest.approx(10.0)


def test_each_run_comes_as_often_as_its_share_says(logged):
    judged = judge(logged, FREE)
    shares = np.array([0.5, 0.25, 0.15, 0.1, 0.0, 0.0])
    drawn = repeated(judged, shares, 40, seed=5)
    counts = [sum(one is other.lessons for one in drawn) for other in judged]
    assert counts == pytest.approx([20, 10, 6, 4, 0, 0], abs=1)
    assert sum(counts) == 40


def test_it_ends_with_a_policy_that_says_what_it_was_made_of(logged):
    rows = []
    config = OfflineConfig(updates=2, **SMALL)
    card, weights = train_offline(logged, config, told=rows.append)
    assert [row["stage"] for row in rows] == ["judged", "cloned", "weighted", "v-trace", "v-trace"]
    assert card.describes(weights)
    assert card.trained_on.episodes == 6
    assert card.trained_on.seeds == (0, 1)
    assert "advantage-weighted at 0.5" in card.parents
    PolicyNet.from_bytes(weights, NetShape.model_validate(card.shape))
    again, _ = train_offline(logged, config, told=rows.append)
    assert again.version == card.version
    plain, _ = train_offline(logged, OfflineConfig(weighting="none", **SMALL), told=rows.append)
    assert plain.version != card.version


def test_runs_too_far_from_the_net_are_not_learned_from(logged):
    rows = []
    grown = [one for one in logged if one.about.policy != "none"]
    strict = PpoConfig(epochs=1, lr=1.0, min_effective=0.999999)
    train_offline(grown, OfflineConfig(weighting="none", updates=3, **(SMALL | {"ppo": strict})), told=rows.append)
    updates = [row for row in rows if row["stage"] == "v-trace"]
    assert updates[0]["runs"] == 4  # the net is still the behaviour
    assert len(updates) == 2
    assert updates[1]["runs"] == 0
    assert "too far" in updates[1]["words"]
