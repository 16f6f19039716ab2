"""A whole run in which two kernels race at one site: one is grafted, both are paid for, and a crash leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
from tolaria_support import KEY, SIGNATURE, SITE, Crash, CrashAt, config, equal, train, workload

from esper.api import local_hub
from esper.kasmina.layer import Layer, all_layers
from esper.leyline import Outcome, RunStatus, SeedStage
from esper.nissa.adaptations import adaptations
from esper.tolaria.tree import flatten

RACERS = ["mlp_2x", "mlp_adapter"]


def race(**settings):
    base = config(kasmina__race=2, **settings)
    entries = [{"epoch": 0, "site": SITE, "blueprint": name} for name in RACERS]
    tree = base.model_dump(mode="json")
    tree["tamiyo"]["schedule"] = entries
    tree["tezzeret"]["blueprints"] = RACERS
    return type(base).model_validate(tree)


@pytest.fixture(scope="module")
def hub_and_key():
    return local_hub([SIGNATURE], race(), private_key=KEY)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, hub_and_key):
    hub, key = hub_and_key
    return train(tmp_path_factory.mktemp("race"), race(), hub=hub, public_key=key)


def test_the_best_evidence_wins_and_every_kernel_is_paid_for(undisturbed):
    summary, weights = undisturbed
    assert summary.status is RunStatus.FINISHED
    graft = next(event for event in summary.events if event.to_stage is SeedStage.GRAFTING)
    (lost,) = [event for event in summary.events if event.to_stage is SeedStage.CULLED]
    assert {graft.site, lost.site} == {SITE}
    assert f"lost the race to {graft.seed}" in lost.reason
    assert graft.evidence is not None
    assert lost.evidence is not None
    assert graft.evidence.gain > lost.evidence.gain
    assert graft.evidence.baseline == lost.evidence.baseline, "both were compared with the same host"
    assert (graft.epoch, graft.step) == (lost.epoch, lost.step)
    reports = {report.blueprint: report for report in summary.field_reports}
    assert sorted(reports) == sorted(RACERS)
    assert {report.outcome for report in reports.values()} == {Outcome.FOSSILIZED, Outcome.CULLED}
    assert all(report.flops > 0 for report in reports.values())
    assert sum(report.flops for report in reports.values()) == pytest.approx(summary.ledger.flops.shadow, abs=64)
    assert not [name for name in weights if f".{lost.seed}." in name]
    told = {adaptation.seed: adaptation for adaptation in adaptations(summary)}  # what the report lists
    assert (told[lost.seed].outcome, told[lost.seed].reason) == ("culled", lost.reason)
    assert told[graft.seed].outcome == "fossilized"


class Spoils:
    """Makes the host NaN amid a race that was under way for an epoch, and keeps what was there before and after."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.raced, self.steps = module, 0, 0
        self.before: dict[str, torch.Tensor] = {}
        self.after: dict[str, torch.Tensor] = {}

    @property
    def layer(self) -> Layer:
        [layer] = all_layers(self.module.get_submodule("_esper"))
        return layer

    def at(self, place: str, step: int) -> None:
        if place == "control" and not self.before:
            self.raced += [seed.stage for seed in self.layer.seeds] == [SeedStage.TRAINING] * 2
            if self.raced == 2:
                self.before = self.taken()
        elif place == "step" and self.before and not self.after:
            self.steps += 1
            if self.steps == 2:
                with torch.no_grad():
                    self.module[0].weight.fill_(math.nan)
        elif place == "rolling_back":
            self.after = self.taken()

    def taken(self) -> dict[str, torch.Tensor]:
        """The host, the racers, their optimizers, and their figures in the layer's table."""
        state = {
            "module": dict(self.module.state_dict()),
            "optimizers": [seed.optimizer.state_dict() for seed in self.layer.seeds],
            "figures": self.layer.table.state(),
        }
        tree, tensors = flatten(state)
        return tensors | {"tree": torch.frombuffer(bytearray(repr(tree).encode()), dtype=torch.uint8)}


def test_a_rollback_amid_a_race_gives_the_racers_back_bit_by_bit(tmp_path, hub_and_key):
    hub, key = hub_and_key
    chosen = race(kasmina__min_training_epochs=4, tolaria__epochs=12)
    problem = workload(chosen)
    spoils = Spoils(problem.model)
    summary, _ = train(tmp_path, chosen, problem=problem, hub=hub, public_key=key, faults=spoils)
    assert len(summary.rollbacks) == 1
    assert equal(spoils.before, spoils.after)
    stages = [event.to_stage for event in summary.events]
    assert SeedStage.ROLLED_BACK not in stages, "the host had never met the racers"
    assert (stages.count(SeedStage.GRAFTING), stages.count(SeedStage.CULLED)) == (1, 1)


def test_a_race_that_died_and_was_resumed_ends_bit_equal(undisturbed, hub_and_key, tmp_path):
    _, weights = undisturbed
    hub, key = hub_and_key
    crash = CrashAt("step", 8)
    with pytest.raises(Crash):
        train(tmp_path, race(), hub=hub, public_key=key, faults=crash)
    assert crash.fired
    summary, again = train(tmp_path, race(), hub=hub, public_key=key, resume=True)
    assert summary.status is RunStatus.FINISHED
    assert equal(again, weights)
