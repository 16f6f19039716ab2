"""How a run is trained by its settings: each holds through a graft, a fossil and a resumption."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolaria_support import SITE, Crash, CrashAt, config, equal, train, workload

from esper.leyline import SeedStage

SLOW_SEED = f'[{{epoch: 0, site: "{SITE}", blueprint: mlp_2x, lr_factor: 0.1}}]'


class Diary:
    """Keeps the host's first weights at every step."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.weights: dict[int, torch.Tensor] = {}

    def at(self, place: str, step: int) -> None:
        if place == "step":  # which was just taken
            self.weights[step] = dict(self.module.named_parameters())["0.weight"].detach().clone()


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
        {"tolaria__scheduler__type": "onecycle"},
        {"tolaria__scheduler__type": "wsd", "tolaria__scheduler__warmup_fraction": "0.2"},
        {"tolaria__optimizer__type": "nadam", "tolaria__optimizer__options": "{betas: [0.8, 0.95]}"},
        {"tolaria__optimizer__type": "SGD"},
        {"tolaria__freeze_host": "true", "tamiyo__schedule": SLOW_SEED},
    ],
    ids=str,
)
def test_a_resumed_run_ends_bit_equal_under_each(tmp_path, settings):
    chosen = config(**settings)
    expected, weights = train(tmp_path / "undisturbed", chosen)
    assert expected.events[-1].to_stage is SeedStage.FOSSILIZED
    with pytest.raises(Crash):
        train(tmp_path / "disturbed", chosen, faults=CrashAt("step", 14))
    _, resumed = train(tmp_path / "disturbed", chosen, resume=True)
    assert equal(weights, resumed)


def test_a_seeds_own_rate_changes_what_it_learns(tmp_path):
    _, usual = train(tmp_path / "usual")
    summary, slow = train(tmp_path / "slow", config(tamiyo__schedule=SLOW_SEED))
    assert summary.events[-1].to_stage is SeedStage.FOSSILIZED
    assert not equal(usual, slow)
