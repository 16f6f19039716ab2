"""How a run is trained by its settings: each holds through a graft, a fossil and a resumption."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolaria_support import SIGNATURE, SITE, Crash, CrashAt, config, equal, kernel_hub, train, workload

from esper.kasmina.layer import all_layers
from esper.leyline import SeedStage
from esper.leyline.steering import PersonsWord, Verdict
from esper.storage import Storage
from esper.tolaria import session
from esper.tolaria.steering import Steering

SLOW_SEED = f'[{{epoch: 0, site: "{SITE}", blueprint: mlp_2x, lr_factor: 0.1}}]'


class Diary:
    """Keeps the host's first weights at every step."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.weights: dict[int, torch.Tensor] = {}

    def at(self, place: str, step: int) -> None:
        if place == "step":  # which was just taken
            self.weights[step] = dict(self.module.named_parameters())["0.weight"].detach().clone()


def test_kernels_in_training_see_the_share_of_batches_that_is_asked_for_and_the_ledger_tells_its_cost(tmp_path):
    spent = {}
    for every in (1, 3, 9):
        chosen = config(kasmina__shadow_every=every, kasmina__min_training_epochs=3, tolaria__epochs=5)
        summary, _ = train(tmp_path / str(every), chosen)
        steps = {event.to_stage: event.step for event in summary.events}
        assert steps[SeedStage.GRAFTING] - steps[SeedStage.TRAINING] == 9
        spent[every] = summary.ledger.flops.shadow  # paired validation is in it too, the same for all
    assert spent[1] - spent[3] == 3 * (spent[3] - spent[9]) > 0


class Clock:
    """A trainer's clock that nothing on the machine disturbs: a step takes two milliseconds, one more where health was
    sampled. It is the run's fault plan too, which is asked right before a step is timed.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module, self._now = module, 0.0

    def perf_counter(self) -> float:
        self._now += 2e-3
        return self._now

    def at(self, place: str, step: int) -> None:
        if place == "step" and any(layer.observing for layer in all_layers(self._module.get_submodule("_esper"))):
            self._now += 1e-3


def test_health_is_sampled_less_often_where_it_costs_more_than_its_share(tmp_path, monkeypatch):
    spent = []
    for share in ("1.0", "1e-9"):
        chosen = config(
            deterministic=False, tamiyo__policy="none", kasmina__telemetry_every=2, kasmina__telemetry_share=share,
            tolaria__epochs=2, tolaria__batch_size=4,
        )  # fmt: skip
        problem = workload(chosen)
        clock = Clock(problem.model)
        monkeypatch.setattr(session, "time", clock)
        summary, _ = train(tmp_path / share, chosen, problem=problem, faults=clock)
        spent.append(summary.ledger.flops.telemetry)
    assert 0 < 2 * spent[1] < spent[0]


def test_a_frozen_host_stands_still_from_graft_to_fossil_only(tmp_path):
    chosen = config(tolaria__freeze_host="true")
    problem = workload(chosen)
    diary = Diary(problem.model)
    summary, weights = train(tmp_path / "frozen", chosen, problem=problem, faults=diary)
    steps = {event.to_stage: event.step for event in summary.events}
    graft, fossil = steps[SeedStage.GRAFTING], steps[SeedStage.FOSSILIZED]
    assert graft + 3 < fossil < max(diary.weights) - 1
    taken = sorted(diary.weights)
    moved = [b for a, b in itertools.pairwise(taken) if not torch.equal(diary.weights[a], diary.weights[b])]
    assert not [step for step in moved if graft <= step < fossil]
    assert set(moved) >= {step for step in taken[1:] if not graft <= step < fossil}
    _, free = train(tmp_path / "free")
    kernels = [name for name in weights if name.startswith("_esper.") and name.endswith("weight")]
    assert kernels
    assert any(not torch.equal(weights[name], free[name]) for name in kernels)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "tolaria__scheduler__type": "onecycle",
            "tolaria__optimizer__type": "nadam",
            "tolaria__optimizer__options": "{betas: [0.8, 0.95]}",
        },
        {
            "tolaria__scheduler__type": "wsd",
            "tolaria__scheduler__warmup_fraction": "0.2",
            "tolaria__optimizer__type": "SGD",
            "tolaria__freeze_host": "true",
            "tamiyo__schedule": SLOW_SEED,
        },
    ],
    ids=["onecycle-nadam", "wsd-SGD-frozen-slow"],
)
def test_a_resumed_run_ends_bit_equal_under_each(tmp_path, settings):
    chosen = config(**settings)
    expected, weights = train(tmp_path / "undisturbed", chosen)
    assert expected.events[-1].to_stage is SeedStage.FOSSILIZED
    with pytest.raises(Crash):
        train(tmp_path / "disturbed", chosen, faults=CrashAt("step", 14))
    _, resumed = train(tmp_path / "disturbed", chosen, resume=True)
    assert equal(weights, resumed)


class Person:
    """Says a word about the first kernel at the end of an epoch."""

    def __init__(self, directory, verdict: Verdict, epoch: int) -> None:
        self.steering, self.verdict, self.epoch = Steering(Storage.at(directory)), verdict, epoch

    def at(self, place: str, epoch: int) -> None:
        if (place, epoch) == ("control", self.epoch):
            [kernel] = kernel_hub()[0].kernels(signature=SIGNATURE)
            word = PersonsWord(
                run_id="run", site=SITE, seed_id="s0", kernel_id=kernel.kernel_id, verdict=self.verdict, by="ada"
            )
            self.steering.say(word)


def test_a_run_that_asks_waits_for_the_word_and_grafts_on_it(tmp_path):
    asking = config(tamiyo__ask_before_graft="true", tolaria__epochs="12", kasmina__max_training_epochs="11")
    summary, _ = train(tmp_path / "silent", asking)
    assert summary.events[-1].to_stage is SeedStage.TRAINING
    summary, _ = train(tmp_path / "said", asking, faults=Person(tmp_path / "said", Verdict.APPROVE, 5))
    graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    assert graft.epoch == 6
    assert summary.events[-1].to_stage is SeedStage.FOSSILIZED


def test_a_veto_removes_the_kernel_and_stands_in_the_summary(tmp_path):
    summary, weights = train(tmp_path, faults=Person(tmp_path, Verdict.VETO, 1))
    assert summary.events[-1].to_stage in {SeedStage.CULLED, SeedStage.DORMANT}
    assert any(event.reason == "vetoed by ada" for event in summary.events)
    assert not [name for name in weights if name.startswith("_esper.") and name.endswith("weight")]


def test_a_seeds_own_rate_changes_what_it_learns(tmp_path):
    _, usual = train(tmp_path / "usual")
    summary, slow = train(tmp_path / "slow", config(tamiyo__schedule=SLOW_SEED))
    assert summary.events[-1].to_stage is SeedStage.FOSSILIZED
    assert not equal(usual, slow)


def test_kernels_train_from_their_site_on_where_the_rest_is_known(tmp_path):
    """The host is a chain; a hook around all of it asks for whole replays."""
    chosen = config(tolaria__epochs=3, tolaria__accumulate=2)
    problem = workload(chosen)
    handle = problem.model.register_forward_hook(lambda _module, _args, _output: None)
    whole, _ = train(tmp_path / "whole", chosen, problem=problem)
    handle.remove()
    part, _ = train(tmp_path / "part", chosen)
    assert 0 < part.ledger.flops.shadow < 0.9 * whole.ledger.flops.shadow
    assert part.ledger.flops.host == whole.ledger.flops.host
