"""A training of a policy from end to end: real trainings of a tiny network, a kill, a policy in the store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esper.leyline import DataError
from esper.simic.experience import Experience
from esper.simic.imitation import agreement, imitate
from esper.simic.lessons import lessons_of, split
from esper.simic.reward import rewards, whole_gain
from esper.simic.rollouts import Ask, Played, Player, load_tasks, twin_of
from esper.simic.settings import ImitationConfig, RolloutConfig, TrainTamiyoConfig
from esper.simic.training import Training
from esper.storage import Storage
from esper.tamiyo.actions import Operation
from esper.tamiyo.batch import collate
from esper.tamiyo.net import NetShape, PolicyNet
from esper.urza.policies import StoredPolicies

ROOT = Path(__file__).parents[3]
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


@pytest.fixture(scope="module")
def player():
    return Player(load_tasks(CONFIG, ROOT / "configs"))


@pytest.fixture(scope="module")
def pair(player):
    """A run of the heuristic that grew, and its twin."""
    return player.run(Ask(0, 0, "heuristic")), player.run(Ask(0, 0, "none"))


def test_a_run_and_its_twin_differ_by_growth_alone(pair):
    grown, bare = pair
    assert any(report.blueprint == "mlp_adapter" for report in grown.ended)
    first = next(m.epoch for m in grown.moments if m.signal.commands)
    losses = [[m.packet.epoch.val_loss for m in one.moments[: first + 1]] for one in pair]
    assert losses[0] == losses[1]  # until the first seed went live at the earliest, bit for bit
    assert grown.moments[-1].packet.epoch.val_loss != bare.moments[-1].packet.epoch.val_loss
    assert all(not moment.signal.commands for moment in bare.moments)


def test_the_same_ask_is_the_same_episode(player, pair):
    again = player.run(Ask(0, 0, "heuristic"))
    assert [m.packet.epoch.val_loss for m in again.moments] == [m.packet.epoch.val_loss for m in pair[0].moments]


def test_lessons_hold_every_choice_and_all_rewards(pair):
    episode, twin = pair[0], twin_of(pair[1])
    lessons = lessons_of(episode, CONFIG.reward, twin=twin)
    assert len(lessons.items) + lessons.num_beyond == len(episode.moments)
    assert lessons.total == pytest.approx(sum(rewards(episode, CONFIG.reward, twin)))
    assert lessons.returns()[0] == pytest.approx(lessons.total)
    operations = {item.choice.operation for item in lessons.items}
    assert {Operation.WAIT, Operation.GERMINATE, Operation.ADVANCE} <= operations
    free = CONFIG.reward.model_copy(update={"params_rent": 0.0, "flops_rent": 0.0, "start_cost": 0.0})
    assert lessons_of(episode, free, twin=twin).total == pytest.approx(whole_gain(episode, twin, free.window))


def test_a_net_learns_to_choose_as_the_heuristic_did(pair):
    lessons = [lessons_of(pair[0], CONFIG.reward, twin=twin_of(pair[1]))]
    net = PolicyNet(NetShape(hidden=8, heads=2, layers=1), seed=0)
    before = agreement(net, collate, lessons)
    report = imitate(net, collate, lessons, [], ImitationConfig(epochs=60, lr=0.01))
    assert report.held_out is None
    assert report.learned.log_prob > before.log_prob + 0.5
    assert report.learned.same >= 0.9
    assert report.learned.num == len(lessons[0].items)


def test_whole_episodes_are_held_out(pair):
    one = lessons_of(pair[0], CONFIG.reward)
    learned, held_out = split([one] * 10, 0.2, seed=0)
    assert (len(learned), len(held_out)) == (8, 2)
    assert split([one], 0.9, seed=0) == ([one], [])


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


def test_the_policy_does_not_hang_on_the_order_in_which_workers_end(player, tmp_path):
    config = CONFIG.model_copy(update={"judged": 0, "iterations": 1})
    versions = [
        train(config, Storage.at(tmp_path / str(i)), one).run() for i, one in enumerate([player, Backwards(player)])
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


def test_an_episode_whose_twin_was_not_played_is_left_out_and_counted(player, tmp_path, caplog):
    two_seeds = CONFIG.rollout.model_copy(update={"draws": 1})
    config = CONFIG.model_copy(update={"judged": 0, "warm_up": 0, "rollout": two_seeds})
    training = train(config, Storage.at(tmp_path), Twinless(player))
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


def test_a_training_that_broke_off_goes_on_to_the_same_policy(player, tmp_path):
    config = CONFIG.model_copy(update={"judged": 0, "rollout": CONFIG.rollout.model_copy(update={"replayed": 0})})
    whole = train(config, Storage.at(tmp_path / "whole"), player)
    version = whole.run()
    storage = Storage.at(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):  # in its second update
        Training(config, player._tasks, Dying(player, 5), storage=storage, store=StoredPolicies(storage)).run()
    again = train(config, storage, player)
    assert again.run() == version
    assert [row["stage"] for row in again.history] == [row["stage"] for row in whole.history]


def test_a_state_of_other_settings_is_not_gone_on_from(player, tmp_path):
    storage = Storage.at(tmp_path)
    quick = CONFIG.model_copy(update={"iterations": 0, "judged": 0, "warm_up": 1})
    train(quick, storage, player).run()
    other = quick.model_copy(update={"reward": quick.reward.model_copy(update={"z": 2.0})})
    with pytest.raises(DataError, match="other settings"):
        train(other, storage, player).run()


class Failing:
    def play(self, asks):
        return [Played(ask, None, "it broke") for ask in asks]


def test_where_no_run_can_be_played_it_says_why(player, tmp_path):
    storage = Storage.at(tmp_path)
    training = Training(CONFIG, player._tasks, Failing(), storage=storage, store=StoredPolicies(storage))
    with pytest.raises(DataError, match="it broke"):
        training.run()


def test_a_run_that_fails_is_told_and_the_next_is_played(player):
    bad, good = player.play([Ask(0, 0, "gnn"), Ask(0, 1, "none")])  # a net's run without a net
    assert bad.episode is None
    assert "no card" in bad.problem
    assert good.episode is not None


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    """`python -m jobs.train_tamiyo`, killed by SIGKILL in its second update, then begun again."""
    settings = [
        f"storage={tmp_path}",
        "iterations=2",
        "warm_up=1",
        "judged=0",
        "imitation.epochs=1",
        "rollout.episodes=1",
        "overrides=[" + ", ".join(f'"{text}"' for text in QUICK) + "]",
    ]
    command = [sys.executable, "-m", "jobs.train_tamiyo", "--here", "--config", "configs/tamiyo_ppo.yaml", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("update 1:"):
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert StoredPolicies(Storage.at(tmp_path)).ls() == []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on after update" in done.stdout
    (card,) = StoredPolicies(Storage.at(tmp_path)).ls()
    assert f"policy {card.version}" in done.stdout
