"""What the benchmark of scale makes of its figures, and that it takes them from real steps and grafts."""

from __future__ import annotations

import pytest

from esper.tolaria.ranks import SoloRanks
from jobs.bench.scale import GOAL, goals_of, graft_row, main, step_rows
from jobs.bench.scale_ranks import ARMS, PARTS, GraftJob, Grafts, StepJob, grafts_of, host_of, steps_of


def grafts(whole: float, rebuild: float) -> Grafts:
    parts = {part: [rebuild if part == "rebuild" else 1.0] * 12 for part in PARTS}
    return Grafts(
        params=10, tensors=2, whole=[whole] * 12, idle=[0.5], parts=parts, first=[9.0], watched=[6.0], usual=[5.0],
        snapshots=[2.0],
    )  # fmt: skip


def test_a_ratio_is_that_of_one_round():
    found = {"plain": [2.0, 4.0] * 6, "idle": [2.0, 4.0] * 6, "wrapped": [2.2, 4.4] * 6, "trainer": [3.0, 6.0] * 6}
    rows = {row["arm"]: row for row in step_rows("cnn", 2, found)}
    assert [rows[arm]["ratio"] for arm in ARMS[1:]] == [1.0, 1.1, 1.5]
    assert (rows["wrapped"]["low"], rows["wrapped"]["high"], rows["wrapped"]["workers"]) == (1.1, 1.1, 2)


def test_what_is_no_part_of_a_graft_is_the_rest():
    row = graft_row(2, grafts(20.0, 8.0))
    assert (row["graft"], row["rebuild"], row["rest"]) == (20.0, 8.0, 7.0)
    assert (row["first"], row["watched"]) == (4.0, 1.2)


def test_only_the_rebuild_may_grow_with_the_host():
    [goal] = goals_of({(2, 1e5): grafts(10.0, 2.0), (2, 1e8): grafts(810.0, 800.0)})
    assert (goal.value, goal.met) == (1.25, True)
    [goal] = goals_of({(1, 1e5): grafts(10.0, 2.0), (1, 1e8): grafts(8.0 * (GOAL + 0.1), 0.0)})
    assert not goal.met
    assert goals_of({(1, 1e5): grafts(10.0, 2.0)}) == []


def test_hosts_grow_in_size_and_not_at_their_site():
    for params in (100_000, 3_000_000):
        assert sum(tensor.numel() for tensor in host_of(params).parameters()) == pytest.approx(params, rel=0.02)


def test_grafts_are_timed_in_a_session_part_by_part():
    found = grafts_of(GraftJob(params=2000, grafts=1), SoloRanks())
    assert len(found.whole) == 1
    assert 0 < sum(found.parts[part][0] for part in PARTS) < found.whole[0]
    assert all(found.parts[part][0] > 0 for part in ("check", "attach", "group", "agree", "count"))
    assert found.idle
    assert len(found.first) == 1
    assert found.watched
    assert found.usual


def test_arms_take_real_steps():
    found = steps_of(StepJob("mlp", rounds=1, steps=1), SoloRanks())
    assert set(found) == set(ARMS)
    assert all(len(times) == 1 and min(times) > 0 for times in found.values())


def test_too_few_rounds_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--rounds", "3"], lambda line: None)
    assert "at least 10 rounds" in capsys.readouterr().err
