"""A whole run in which two kernels race at one site: one is grafted, both are paid for, and a crash leaves no trace."""

from __future__ import annotations

import pytest
from tolaria_support import KEY, SIGNATURE, SITE, Crash, CrashAt, config, equal, train

from esper.api import local_hub
from esper.leyline import Outcome, RunStatus, SeedStage

RACERS = ["mlp_2x", "mlp_adapter"]


def race():
    base = config(kasmina__race=2)
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
