"""A training of a policy from end to end: real trainings of a tiny net, orders and deaths, a policy in the store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper.leyline import DataError
from esper.simic.experience import Experience
from esper.simic.rollouts import Played, Player, load_tasks
from esper.simic.settings import ImitationConfig, RolloutConfig, TrainTamiyoConfig
from esper.simic.training import Training
from esper.storage import Storage
from esper.tamiyo.net import NetShape, PolicyNet
from esper.urza.policies import StoredPolicies

torch.set_num_threads(1)  # several threads on tiny tensors only wait for each other

ROOT = Path(__file__).parents[2]
QUICK = (
    "tolaria.epochs=10",
    "tolaria.batch_size=64",
    "tezzeret.blueprints=[mlp_adapter]",
    "tamiyo.warmup_epochs=1",
    "tamiyo.plateau_window=1",
    "tamiyo.plateau_threshold=0.9",
)
CONFIG = TrainTamiyoConfig(
    tasks=("digits_mlp.yaml",),
    overrides=QUICK,
    warm_up=2,
    iterations=2,
    judged=1,
    net={"hidden": 8, "heads": 2, "layers": 1},
    imitation=ImitationConfig(epochs=4),
    rollout=RolloutConfig(episodes=2, seeds=2, replayed=1),
)
SHORT = CONFIG.model_copy(update={"overrides": ("tolaria.epochs=6", *QUICK[1:]), "judged": 0})
"""Of runs that have begun to grow when they end: where order, deaths and what is missing are the point."""


@pytest.fixture(scope="module")
def player():
    return Player(load_tasks(CONFIG, ROOT / "configs"))


@pytest.fixture(scope="module")
def hasty():
    return Player(load_tasks(SHORT, ROOT / "configs"))


def train(config, storage, player, **options):
    return Training(config, player._tasks, player, storage=storage, store=StoredPolicies(storage), **options)


def test_a_training_ends_with_a_policy_in_the_store(player, tmp_path):
    storage, told = Storage.at(tmp_path), []
    training = train(CONFIG, storage, player, told=told.append)
    version = training.run()
    card, weights = StoredPolicies(storage).get(version)
    assert [row["stage"] for row in training.history] == ["imitation", "ppo", "ppo", "policy"]
    assert card.describes(weights)
    assert (card.trained_on.tasks, card.trained_on.hosts) == (("digits-mlp",), ("mlp",))
    assert card.trained_on.episodes == 2 + 2 * 2
    assert set(card.trained_on.seeds) <= {0, 1}
    assert card.results[0]["seeds"] == 1
    net = PolicyNet.from_bytes(weights, NetShape.model_validate(card.shape))
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())
    policies = {episode.about.policy for episode in Experience(storage).episodes()}
    assert policies == {"heuristic", "gnn"}  # rollouts are runs: their experience is kept as any run's is
    assert any(row["stage"] == "rollout" for row in told)
    updates = [row for row in training.history if row["stage"] == "ppo"]
    assert updates[1]["replayed"] + updates[1]["too_old"] == 1
    assert updates[0]["operations"]["ADVANCE"] > 0


class Backwards:
    """Rollouts that end in another order, as those of several workers do."""

    def __init__(self, player):
        self._player, self._tasks = player, player._tasks

    def play(self, asks):
        return reversed(list(self._player.play(asks)))


def test_the_policy_does_not_hang_on_the_order_in_which_workers_end(hasty, tmp_path):
    config = SHORT.model_copy(update={"iterations": 1})
    versions = [
        train(config, Storage.at(tmp_path / str(i)), one).run() for i, one in enumerate([hasty, Backwards(hasty)])
    ]
    assert versions[0] == versions[1]


class Twinless:
    """Rollouts that lose the twin of one seed."""

    def __init__(self, player):
        self._player, self._tasks = player, player._tasks

    def play(self, asks):
        for one in self._player.play(asks):
            lost = one.ask.policy == "none" and one.ask.seed == 1
            yield Played(one.ask, None, "its worker died") if lost else one


def test_an_episode_whose_twin_was_not_played_is_left_out_and_counted(hasty, tmp_path, caplog):
    two_seeds = SHORT.rollout.model_copy(update={"draws": 1})
    config = SHORT.model_copy(update={"warm_up": 0, "rollout": two_seeds})
    training = train(config, Storage.at(tmp_path), Twinless(hasty))
    training.run()
    update = next(row for row in training.history if row["stage"] == "ppo")
    assert (update["episodes"], update["failed"]) == (1, 1)
    assert "rollout.unsettled" in [record.message for record in caplog.records]


class Dying:
    """Rollouts that die at the n-th call, as a process does that is killed."""

    def __init__(self, player, calls):
        self._player, self._calls = player, calls

    def play(self, asks):
        self._calls -= 1
        if self._calls < 0:
            raise KeyboardInterrupt
        return self._player.play(asks)


def test_a_training_that_broke_off_goes_on_to_the_same_policy(hasty, tmp_path):
    config = SHORT.model_copy(update={"rollout": SHORT.rollout.model_copy(update={"replayed": 0})})
    whole = train(config, Storage.at(tmp_path / "whole"), hasty)
    version = whole.run()
    storage = Storage.at(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):  # in its second update
        Training(config, hasty._tasks, Dying(hasty, 5), storage=storage, store=StoredPolicies(storage)).run()
    again = train(config, storage, hasty)
    assert again.run() == version
    assert [row["stage"] for row in again.history] == [row["stage"] for row in whole.history]


def test_a_state_of_other_settings_is_not_gone_on_from(hasty, tmp_path):
    storage = Storage.at(tmp_path)
    quick = SHORT.model_copy(update={"iterations": 0, "warm_up": 1})
    train(quick, storage, hasty).run()
    other = quick.model_copy(update={"reward": quick.reward.model_copy(update={"z": 2.0})})
    with pytest.raises(DataError, match="other settings"):
        train(other, storage, hasty).run()


class Failing:
    def play(self, asks):
        return [Played(ask, None, "it broke") for ask in asks]


def test_where_no_run_can_be_played_it_says_why(player, tmp_path):
    storage = Storage.at(tmp_path)
    training = Training(CONFIG, player._tasks, Failing(), storage=storage, store=StoredPolicies(storage))
    with pytest.raises(DataError, match="it broke"):
        training.run()
