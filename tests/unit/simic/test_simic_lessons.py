"""What is learned from real runs of a tiny network: twins, lessons, imitation; and who is told of a run that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.simic.imitation import agreement, imitate
from esper.simic.lessons import lessons_of, split
from esper.simic.reward import rewards, whole_gain
from esper.simic.rollouts import Ask, Player, load_tasks, twin_of
from esper.simic.settings import ImitationConfig, TrainTamiyoConfig
from esper.tamiyo.actions import Operation
from esper.tamiyo.batch import collate
from esper.tamiyo.net import NetShape, PolicyNet

ROOT = Path(__file__).parents[3]
QUICK = (
    "tolaria.epochs=10",
    "tolaria.batch_size=64",
    "tezzeret.blueprints=[mlp_adapter]",
    "tamiyo.warmup_epochs=1",
    "tamiyo.plateau_window=1",
    "tamiyo.plateau_threshold=0.9",
)
CONFIG = TrainTamiyoConfig(tasks=("digits_mlp.yaml",), overrides=QUICK)


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


def test_a_run_that_fails_is_told_and_the_next_is_played(player):
    bad, good = player.play([Ask(0, 0, "gnn"), Ask(0, 1, "none")])  # a net's run without a net
    assert bad.episode is None
    assert "no card" in bad.problem
    assert good.episode is not None
