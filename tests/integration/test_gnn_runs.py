"""Whole runs under a learned policy: it grows by its own word, says why, and a crash leaves no trace."""

from __future__ import annotations

import pytest
import torch
from tolaria_support import KEY, SIGNATURE, Crash, CrashAt, config, equal, train

from esper.api import local_hub
from esper.leyline import Gate, Outcome, PolicyCard, RunStatus
from esper.tamiyo.actions import Operation
from esper.tamiyo.controller import LocalController
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION

SHAPE = NetShape(hidden=16, heads=4, members=3)


def policy(*likes, calibrated=True):
    """A network with these operations' scores raised, and its card."""
    net = PolicyNet(SHAPE)
    with torch.no_grad():
        for place, operation in enumerate(likes):
            net.operation[-1].bias[operation] += 8.0 - place
        net.outcomes.get_buffer("num_calibrated").fill_(100 * calibrated)
        net.outcomes.get_buffer("scale").fill_(0.1)
    weights = net.to_bytes()
    shape = SHAPE.model_dump()
    return PolicyCard.of(weights, name="t", shape=shape, observation_version=OBSERVATION_VERSION), weights


def chosen(card):
    base = config(tolaria__epochs=12)
    tree = base.model_dump(mode="json")
    tree["tamiyo"] |= {
        "policy": "gnn",
        "schedule": [],
        "warmup_epochs": 0,
        "gnn": {"version": card.version, "max_uncertainty": 0.5},
    }
    tree["tezzeret"]["blueprints"] = ["mlp_2x", "mlp_adapter"]
    return type(base).model_validate(tree)


def run(folder, card, weights, **rest):
    settings = chosen(card)
    hub, key = local_hub([SIGNATURE], settings, private_key=KEY)
    controller = LocalController(settings.tamiyo, seed=0, policies=lambda _: (card, weights))
    return train(folder, settings, hub=hub, public_key=key, controller=controller, **rest)


def test_it_grows_by_its_own_word_and_a_crash_changes_nothing(tmp_path):
    made = policy(Operation.FOSSILIZE, Operation.ADVANCE, Operation.GERMINATE)
    summary, weights = run(tmp_path / "whole", *made)
    assert summary.status is RunStatus.FINISHED
    assert Outcome.FOSSILIZED in {report.outcome for report in summary.field_reports}
    reasons = [event.reason for event in summary.events]
    assert any(f"policy {made[0].version[:8]} chose GERMINATE" in reason for reason in reasons)
    with pytest.raises(Crash):
        run(tmp_path / "again", *made, faults=CrashAt("step", 21))
    _, again = run(tmp_path / "again", *made, resume=True)
    assert equal(again, weights)


def test_one_that_was_never_calibrated_grows_nothing_and_the_summary_says_why(tmp_path):
    summary, _ = run(tmp_path, *policy(Operation.GERMINATE, calibrated=False))
    assert summary.status is RunStatus.FINISHED
    assert summary.field_reports == ()
    (record, *_) = summary.vetoes
    assert record.veto.gate is Gate.UNCERTAINTY
    assert "never measured" in record.veto.reason
