"""The exam's machinery, on two quick tasks: cells, pairing, going on where it was broken off. Not its numbers."""

from __future__ import annotations

import pytest

from esper.leyline.errors import ConfigError
from esper.leyline.policies import PolicyCard
from esper.storage import Storage
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.urza.policies import StoredPolicies
from jobs.bench.tamiyo import ExamCell, compare, main

QUICK = ["tolaria.epochs=4", "tolaria.batch_size=128", "tezzeret.blueprints=[mlp_adapter,conv_light]"]
SETTINGS = [word for text in QUICK for word in ("--set", text)]


def cell(policy, seed, test, **rest):
    values = {
        "val": test,
        "val_loss": 1.0,
        "flops": 1.0,
        "params": 10,
        "epochs": 4,
        "tried": 1,
        "kept": 1,
        "seconds": 1.0,
    }
    return ExamCell(task="t", policy=policy, seed=seed, settings="s", test=test, **{**values, **rest})


def test_policies_are_compared_by_pairs_of_seeds():
    tests = {"heuristic": [0.5, 0.6, 0.9, 0.7], "gnn": [0.52, 0.63, 0.92, 0.73], "random": [0.5, 0.6, 0.9, 0.7]}
    cells = [cell(policy, seed, test) for policy, found in tests.items() for seed, test in enumerate(found)]
    rows, goals = compare(cells)
    by_policy = {row["policy"]: row for row in rows}
    assert by_policy["gnn"]["beyond_heuristic"] == pytest.approx(0.025)
    assert by_policy["gnn"]["p"] < 0.01  # though the policies' own spread is ten times the difference
    assert by_policy["random"]["p"] is None  # the same in every pair: nothing to test
    assert [goal.met for goal in goals] == [True, False]
    assert [goal.name for goal in goals] == ["t: gnn minus heuristic, test", "t: heuristic minus random, test"]


@pytest.fixture
def policy(tmp_path):
    net = PolicyNet(NetShape(hidden=8, heads=2, layers=1), seed=0)
    weights = net.to_bytes()
    card = PolicyCard.of(
        weights, name="gnn", shape=net.shape.model_dump(mode="json"), observation_version=OBSERVATION_VERSION
    )
    storage = Storage.at(tmp_path / "storage")
    return ["--storage", str(tmp_path / "storage"), "--version", StoredPolicies(storage).put(card, weights)]


def test_the_exam_goes_on_where_it_was_broken_off(policy, tmp_path):
    said = []
    out = tmp_path / "cells"
    common = ["--seeds", "2", "--flops", "2.0", "--out", str(out), *SETTINGS, *policy]
    main(["--tasks", "digits_mlp.yaml", "--policies", "none,heuristic", *common], said.append)
    assert len(said) == 4
    said.clear()
    policies = "none,random,heuristic,bandit,gnn"
    result = main(["--tasks", "digits_mlp.yaml,digits.yaml", "--policies", policies, *common], said.append)
    assert len(said) == 2 * 2 * 5 - 4  # those that were there are not computed again
    assert len(result.rows) == 10
    cells = [ExamCell.model_validate_json(path.read_text()) for path in out.glob("*.json")]
    assert len(cells) == 20
    none = [one for one in cells if one.policy == "none"]
    assert all(one.tried == 0 and one.epochs > 4 for one in none)  # it trains on until it has spent as much
    assert all(1.5 < one.flops < 2.6 for one in none)
    assert all(0.0 <= one.test <= 1.0 for one in cells)
    other = [*common, "--set", "tolaria.optimizer.lr=0.01"]
    said.clear()
    main(["--tasks", "digits_mlp.yaml", "--policies", "none", *other], said.append)
    assert len(said) == 2  # cells of other settings are not taken over


def test_what_is_wrong_is_said(tmp_path):
    for arguments, words in (
        (["--policies", "oracle"], "oracle"),
        (["--seeds", "1"], "two seeds"),
        (["--policies", "schedule", "--seeds", "2", "--out", str(tmp_path)], "schedule"),
    ):
        with pytest.raises(ConfigError, match=words):
            main(arguments, lambda line: None)
