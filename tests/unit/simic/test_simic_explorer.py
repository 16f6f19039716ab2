"""Growth by drawn plans, and runs that end when their FLOPs are spent."""

import random
from collections import Counter
from pathlib import Path

import pytest

from esper.config import TamiyoConfig
from esper.leyline import Action
from esper.simic.explorer import Plan
from esper.simic.lessons import lessons_of
from esper.simic.rollouts import EXPLORER, Ask, Player, load_tasks
from esper.simic.settings import RewardConfig, TaskOf, TrainTamiyoConfig
from esper.simic.spending import epoch_flops
from esper.tamiyo.actions import Operation

ROOT = Path(__file__).parents[3]
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
    return Player(load_tasks(TrainTamiyoConfig(tasks=(TASK,)), ROOT / "configs"))


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


def test_plans_begin_at_once_half_of_the_time_and_never_too_late():
    config = TamiyoConfig(max_adaptations=3, last_epoch_fraction=0.5)
    plans = [Plan.drawn(random.Random(i), config, 20) for i in range(400)]
    assert 0.4 < sum(plan.start == 0 for plan in plans) / 400 < 0.65
    assert {plan.start for plan in plans} == set(range(10))
    assert {plan.num for plan in plans} == {1, 2, 3}


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
    from esper.hosts import build_host

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
