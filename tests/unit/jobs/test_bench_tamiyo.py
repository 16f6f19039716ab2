"""The exam's arithmetic: pairs, intervals, goals, and what it refuses. `tests/integration/test_exam.py` takes one."""

from __future__ import annotations

import pytest

from esper.leyline.errors import ConfigError
from jobs.bench.exam_table import ExamCell, compare, markdown, over_all
from jobs.bench.harness import mean_interval
from jobs.bench.tamiyo import TASKS, _config, _digest, main


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


def test_cells_that_are_stored_stay_good():
    """A setting that came later and that no cell hangs on must not have hours of training done again."""
    config = _config("digits_cnn", ["seed=200000", "tamiyo.policy=heuristic", "tolaria.epochs=80"])
    assert _digest(config, 4.0) == "0c80fbfdaab8cf3e"  # of the cells behind the README's table
    canary = config.tamiyo.canary.model_copy(update={"actions": 77, "min_action_agreement": 0.9})
    other = config.model_copy(update={"tamiyo": config.tamiyo.model_copy(update={"canary": canary})})
    assert _digest(other, 4.0) == _digest(config, 4.0)
    shorter = config.model_copy(update={"tamiyo": config.tamiyo.model_copy(update={"plateau_window": 4})})
    assert _digest(shorter, 4.0) != _digest(config, 4.0)


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
