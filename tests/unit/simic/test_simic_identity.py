"""What a training may change before it goes on, and what makes a run another run."""

from __future__ import annotations

import io
import json

import pytest
import torch

from esper.config import RunConfig, parse_config
from esper.leyline import DataError
from esper.simic.identity import digest_of, entropy_in_words, settings_of_run, settings_of_training
from esper.simic.rollouts import Played
from esper.simic.settings import TrainTamiyoConfig
from esper.simic.training import Training
from esper.storage import Storage
from esper.urza.policies import StoredPolicies

TASK = RunConfig()
TREE = {"net": {"hidden": 8, "heads": 2, "layers": 1}, "warm_up": 1, "iterations": 0, "judged": 0}
SETTINGS = {"workers": 4, "cpus_per_worker": 1.0, "deadline_s": 60.0}


class Nothing:
    """Rollouts that play nothing: the state of a training is there before anything was learned."""

    def play(self, asks):
        return [Played(ask, None, "it was not played") for ask in asks]


class Interrupted(Nothing):
    """Likewise; in the warm-up somebody presses Ctrl-C after two runs."""

    def play(self, asks):
        for i, one in enumerate(super().play(asks)):
            if i == 2 and one.ask.policy != "none":
                raise KeyboardInterrupt
            yield one


class Counted(Nothing):
    def __init__(self):
        self.asked = []

    def play(self, asks):
        self.asked += [ask.seed for ask in asks if ask.policy == "heuristic"]
        return super().play(asks)


def training(storage, changes=None, *, task=TASK, told=None, rollouts=None):
    config = TrainTamiyoConfig.model_validate(TREE | (changes or {}))
    return Training(config, [task], rollouts or Nothing(), storage=storage, store=StoredPolicies(storage), told=told)


@pytest.fixture
def storage(tmp_path):
    """With a training in it that has played its warm-up."""
    storage = Storage.at(tmp_path)
    training(storage).run()
    return storage


def test_what_changes_nothing_that_is_learned_may_change(storage):
    told = []
    training(storage, {"rollout": SETTINGS, "judged": 1, "iterations": 0}, told=told.append).run()
    assert told[0] == {"stage": "resumed", "iteration": 0}


def test_runs_of_a_warm_up_that_was_interrupted_are_not_played_again(tmp_path):
    storage, seeds = Storage.at(tmp_path), {"warm_up": 3}
    with pytest.raises(KeyboardInterrupt):
        training(storage, seeds, rollouts=Interrupted()).run()
    counted = Counted()
    training(storage, seeds, rollouts=counted).run()
    assert counted.asked == [2]


@pytest.mark.parametrize(
    ("changes", "field", "began", "now"),
    [
        ({"rollout": {"draws": 2}}, "rollout.draws", "4", "2"),
        ({"rollout": {"seeds": 8}}, "rollout.seeds", "32", "8"),
        ({"rollout": {"flops": None}}, "rollout.flops", "4.0", "None"),
        ({"rollout": {"episodes": 8}}, "rollout.episodes", "24", "8"),
        ({"rollout": {"replayed": 2}}, "rollout.replayed", "0", "2"),
        ({"seed": 1}, "seed", "0", "1"),
        ({"ppo": {"lr": 0.1}}, "ppo.lr", "0.001", "0.1"),
        ({"net": TREE["net"] | {"layers": 2}}, "net.layers", "1", "2"),
    ],
)
def test_what_changes_what_is_learned_is_refused_by_name(storage, changes, field, began, now):
    with pytest.raises(DataError, match=f"other settings .* began with {began}, not {now}") as caught:
        training(storage, changes).run()
    assert caught.value.field == field
    assert "name=NAME" in str(caught.value)


def test_a_task_whose_file_was_edited_is_another(storage):
    with pytest.raises(DataError, match=r"began with .*, not 99") as caught:
        training(storage, task=parse_config({"tolaria": {"epochs": 99}})).run()
    assert caught.value.field == "tasks[0].tolaria.epochs"


def test_others_that_differ_are_counted(storage):
    changes = {"rollout": {"draws": 2, "seeds": 8}, "ppo": {"lr": 0.1, "clip": 0.1, "gamma": 0.9}}
    with pytest.raises(DataError, match=r"4 more differ: ppo\.gamma, ppo\.clip, rollout\.draws, \.\.\."):
        training(storage, changes).run()


def test_a_state_of_an_earlier_version_is_refused(storage):
    path = "simic/gnn/state.pt"
    state = torch.load(io.BytesIO(storage.read(path)), weights_only=True)
    del state["stretches"]  # such a one had a digest of some of its settings alone
    torch.save(state | {"settings": "0" * 64}, into := io.BytesIO())
    storage.write(path, into.getvalue())
    with pytest.raises(DataError, match=r"of an earlier version.*name=NAME"):
        training(storage).run()


def done(storage, *iterations):
    """A training with an update behind it for each of these: what `iterations` was then."""
    for update, num in enumerate(iterations):
        one = training(storage, {"name": "long", "iterations": num})
        one._restore()
        one.iteration = update
        one._weigh_entropy()
        one.iteration += 1
        one._save()
        yield one


def test_the_entropy_falls_towards_the_last_update_there_is_now(storage):
    first, second = done(storage, 2, 4)
    assert first.ppo.entropy_weight == 0.003
    assert second.ppo.entropy_weight == pytest.approx(0.003 * 3 / 4)
    assert second._stretches == [(0, 2), (1, 4)]


def test_a_training_goes_on_for_longer_and_says_what_that_means(storage):
    assert len([*done(storage, 2, 2)]) == 2
    told = []
    again = training(storage, {"name": "long", "iterations": 4}, told=told.append)
    again._restore()
    assert [row["stage"] for row in told] == ["resumed", "iterations"]
    assert "from update 3 on the entropy's weight falls as in a training of 4" in told[1]["words"]
    assert again.history[-1]["stage"] == "iterations"


def test_fewer_updates_than_are_done_are_refused(storage):
    assert len([*done(storage, 4, 4)]) == 2
    with pytest.raises(DataError, match="has done 2 updates already, more than 1") as caught:
        training(storage, {"name": "long", "iterations": 1}).run()
    assert caught.value.field == "iterations"
    assert "iterations=2 or more" in str(caught.value)


def test_the_card_tells_of_an_entropy_that_fell_otherwise():
    assert entropy_in_words([], 0) == ""
    assert entropy_in_words([(0, 4)], 4) == ""
    assert "iterations=4)" in entropy_in_words([(0, 4)], 2)
    assert "iterations=2, as for iterations=4 after update 2)" in entropy_in_words([(0, 2), (2, 4)], 4)


def test_a_run_is_another_by_what_its_outcome_depends_on():
    base = digest_of(settings_of_run(TASK))
    for other in ({"tolaria": {"epochs": 99}}, {"seed": 1}, {"budget": {"params": 3}}, {"host": {"type": "mlp"}}):
        assert digest_of(settings_of_run(parse_config(other))) != base
    for same in ({"storage": "/elsewhere"}, {"nissa": {"view": "quiet"}}, {"tezzeret": {"max_workers": 4}}):
        assert digest_of(settings_of_run(parse_config(same))) == base


def test_what_is_compared_is_plain_json():
    settings = settings_of_training(TrainTamiyoConfig.model_validate(TREE), [TASK])
    assert json.loads(json.dumps(settings)) == settings
