"""Rollouts: growth by drawn plans, runs that end when their FLOPs are spent, and tasks of other kinds than pictures."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from esper.hosts import build_host
from esper.leyline import Action
from esper.simic.lessons import lessons_of
from esper.simic.rollouts import EXPLORER, Ask, Player, load_tasks
from esper.simic.settings import RewardConfig, TaskOf, TrainTamiyoConfig
from esper.simic.spending import epoch_flops
from esper.tamiyo.actions import Operation

torch.set_num_threads(1)  # several threads on tiny tensors only wait for each other

CONFIGS = Path(__file__).parents[2] / "configs"
TASK = TaskOf(
    config="digits_mlp.yaml",
    set=(
        "tolaria.epochs=10",
        "tolaria.batch_size=64",
        "tezzeret.blueprints=[mlp_adapter, mlp_4x]",
        "tamiyo.warmup_epochs=1",
    ),
)


@pytest.fixture(scope="module")
def player():
    return Player(load_tasks(TrainTamiyoConfig(tasks=(TASK,)), CONFIGS))


@pytest.fixture(scope="module")
def episodes(player):
    return [player.run(Ask(0, 0, EXPLORER, draw=draw)) for draw in range(6)]


def begun(episode):
    return [
        (moment.epoch, command.blueprint, command.strategy)
        for moment in episode.moments
        for command in moment.signal.commands
        if command.action is Action.GERMINATE
    ]


def test_draws_differ_and_the_same_draw_is_the_same_run(player, episodes):
    assert len({tuple(begun(one)) for one in episodes}) > 1
    again = player.run(Ask(0, 0, EXPLORER, draw=2))
    assert begun(again) == begun(episodes[2])
    assert again.moments[-1].packet.epoch.val_loss == episodes[2].moments[-1].packet.epoch.val_loss


def test_every_order_of_an_explorer_is_a_choice_that_the_net_could_have_made(episodes):
    operations = Counter()
    for one in episodes:
        lessons = lessons_of(one, RewardConfig())
        assert lessons.num_beyond == 0
        operations.update(item.choice.operation for item in lessons.items)
    assert operations[Operation.GERMINATE] == sum(len(begun(one)) for one in episodes) > 0
    assert len({strategy for one in episodes for _, _, strategy in begun(one)}) > 1


def test_a_run_ends_when_its_flops_are_spent(player):
    whole = player.run(Ask(0, 0, "heuristic"))
    short = player.run(Ask(0, 0, "heuristic", flops=0.5))
    data = player._prepared(0)[0]
    task = player._tasks[0]
    host = build_host(task.host, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=0)
    limit = 0.5 * 10 * epoch_flops(task, data, host)
    assert short.last is not None
    assert whole.last is not None
    assert short.last.epoch < whole.last.epoch == 9
    assert short.last.total_flops >= limit
    before = (
        short.moments[-1].packet.epoch if short.moments[-1].epoch < short.last.epoch else short.moments[-2].packet.epoch
    )
    assert before.total_flops < limit


@pytest.mark.timeout(300)  # where the kernels are of other sites than the run's, it waits for its own for ever
def test_a_language_model_is_played_with_kernels_for_sites_that_look_back_only(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    settings = (
        f"data.path={text}", "data.context=16", "data.train_samples=64", "data.val_samples=64", "tolaria.epochs=3",
        "tezzeret.blueprints=[mlp_adapter]",
    )  # fmt: skip
    task = TaskOf(config="exam/text_gpt.yaml", set=settings)
    player = Player(load_tasks(TrainTamiyoConfig(tasks=(task,)), CONFIGS))
    (played,) = player.play([Ask(0, 0, "heuristic")])
    assert played.episode is not None, played.problem
    assert all(moment.packet.options for moment in played.episode.moments)
