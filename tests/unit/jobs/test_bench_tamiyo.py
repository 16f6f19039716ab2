"""The exam's machinery, on two quick tasks: cells, pairing, going on where it was broken off. Not its numbers."""

from __future__ import annotations

import pytest

from esper.leyline.errors import ConfigError
from esper.leyline.policies import PolicyCard
from esper.storage import Storage
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.urza.policies import StoredPolicies
from jobs.bench.exam_table import ExamCell, compare, markdown, over_all
from jobs.bench.harness import mean_interval
from jobs.bench.tamiyo import TASKS, _config, main

QUICK = [
    "tolaria.epochs=4",
    "tolaria.batch_size=128",
    "tamiyo.warmup_epochs=0",
    "tezzeret.blueprints=[mlp_adapter,conv_light]",
]
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
    assert by_policy["gnn"]["against"] == "heuristic"
    assert by_policy["gnn"]["beyond"] == pytest.approx(0.025)
    assert by_policy["gnn"]["p"] < 0.01  # though the policies' own spread is ten times the difference
    assert by_policy["heuristic"]["against"] == "random"
    assert by_policy["heuristic"]["p"] is None  # the same in every pair: nothing to test
    met = {goal.name: goal.met for goal in goals}
    assert met == {
        "t: gnn no worse than heuristic, test": True,
        "all tasks: gnn better than heuristic, test": True,
        "t: heuristic no worse than random, test": True,
        "all tasks: heuristic better than random, test": False,  # no better either
    }
    page = markdown(rows, goals)
    assert "| t | heuristic | 4 | 67.5% (" in page
    assert "+2.50" in page
    assert page.count("not met") == 1


def test_without_the_heuristic_a_policy_is_laid_beside_random():
    tests = {"random": [0.5, 0.6, 0.9], "gnn": [0.4, 0.7, 0.7]}
    rows, goals = compare(
        [cell(policy, seed, test) for policy, found in tests.items() for seed, test in enumerate(found)]
    )
    assert {row["policy"]: row["against"] for row in rows} == {"random": None, "gnn": "random"}
    assert [goal.met for goal in goals] == [False, False]


def test_over_all_tasks_each_counts_the_same():
    first, second = [0.1, 0.2, 0.3], [0.0, 0.02]
    both = over_all([first, second])
    assert both.value == pytest.approx((0.2 + 0.01) / 2)
    assert over_all([first]).low == pytest.approx(mean_interval(first).low)  # one task: Student's own interval
    assert both.low < both.value < both.high
    assert over_all([[0.1, 0.1], [0.3, 0.3]]).half_width == 0.0


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
    assert all(one.tried == 0 and one.epochs == 8 for one in none)  # it trains on until it has spent as much
    assert all(one.flops == pytest.approx(2.0, abs=0.05) for one in none)
    assert all(1.5 < one.flops < 2.5 for one in cells)
    assert any(one.tried for one in cells)
    assert all(0.0 <= one.test <= 1.0 for one in cells)
    other = [*common, "--set", "tolaria.optimizer.lr=0.01"]
    said.clear()
    main(["--tasks", "digits_mlp.yaml", "--policies", "none", *other], said.append)
    assert len(said) == 2  # cells of other settings are not taken over


def test_the_table_goes_to_the_card_of_the_learned_policy(policy, tmp_path):
    page = tmp_path / "table.md"
    common = ["--seeds", "2", "--flops", "1.0", "--out", str(tmp_path / "cells"), *SETTINGS, *policy]
    tasks = ["--tasks", "digits_mlp.yaml", "--policies", "random,gnn"]
    for _ in range(2):  # the second time in place of the first
        main([*tasks, *common, "--card", "--markdown", str(page)], lambda line: None)
        card, _ = StoredPolicies(Storage.at(tmp_path / "storage")).get(policy[-1])
        assert [row["policy"] for row in card.results] == ["random", "gnn"]
    assert "| digits-mlp | random | 2 |" in page.read_text()
    with pytest.raises(ConfigError, match="card"):
        main(["--tasks", "digits_mlp.yaml", "--policies", "none", *common, "--card"], lambda line: None)


def test_each_task_of_the_exam_can_be_grown_by_its_schedule():
    for name in TASKS.split(","):
        config = _config(name, [])
        assert config.tamiyo.schedule
        assert config.budget.flops == 4.0  # what has grown can train for the epochs that are planned


def test_what_is_wrong_is_said(tmp_path):
    for arguments, words in (
        (["--policies", "oracle"], "oracle"),
        (["--seeds", "1"], "two seeds"),
        (["--policies", "schedule", "--tasks", "digits_mlp.yaml", "--out", str(tmp_path)], "schedule"),
        (["--set", "tolaria.scheduler.type=cosine", "--out", str(tmp_path)], "rate"),
    ):
        with pytest.raises(ConfigError, match=words):
            main(arguments, lambda line: None)
