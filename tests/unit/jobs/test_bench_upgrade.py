import pytest

from esper.config import load_config
from esper.leyline.errors import ConfigError
from jobs.bench.upgrade import ARMS, Cell, Point, Study, main, result_of, whole_epochs
from jobs.environment import REPOSITORY


def cell(arm, test, *, seed=0, settings="x", flops=(40, 80), accuracies=(0.4, 0.5)):
    curve = tuple(Point(flops=f, accuracy=a) for f, a in zip(flops, accuracies, strict=True))
    return Cell(
        arm=arm, seed=seed, settings=settings, test_accuracy=test, epochs=len(curve), params=10, parts=(), curve=curve
    )


def seeds(**tests):
    return [{arm: cell(arm, tests[arm][seed], seed=seed) for arm in ARMS} for seed in range(len(tests["small"]))]


def test_the_goal_is_against_training_the_final_network_from_scratch():
    better = seeds(
        small=[0.5] * 3, upgrade=[0.7, 0.71, 0.72], more=[0.6] * 3, scratch=[0.5, 0.52, 0.51], long=[0.8] * 3
    )
    found = result_of(better)
    assert found.goals[0].met
    assert "minus scratch: +20.0 points" in found.verdict
    assert "minus long: -9.0 points" in found.verdict  # what does not flatter is said too
    worse = seeds(small=[0.5] * 3, upgrade=[0.5, 0.52, 0.51], more=[0.6] * 3, scratch=[0.7, 0.71, 0.72], long=[0.8] * 3)
    assert not result_of(worse).goals[0].met


def test_a_row_gives_medians_with_their_spread():
    cells = seeds(small=[0.5, 0.6, 0.4], upgrade=[0.7] * 3, more=[0.6] * 3, scratch=[0.5] * 3, long=[0.8] * 3)
    rows = {row["arm"]: row for row in result_of(cells).rows}
    assert rows["small"]["test"] == "50.0% (40.0% to 60.0%)"
    assert rows["upgrade"]["val at 50%"] == "40.0% (40.0% to 40.0%)"
    assert rows["upgrade"]["val at 25%"] is None  # no epoch was paid for by then
    assert rows["small"]["val at 100%"] is None  # its FLOPs are on nobody's account
    assert all(row.keys() == rows["small"].keys() for row in rows.values())


def test_accuracy_is_that_of_the_last_epoch_paid_for():
    one = cell("scratch", 0.5, flops=(10, 20, 30), accuracies=(0.1, 0.3, 0.2))
    assert [one.accuracy_for(flops) for flops in (9, 10, 29, 30, 99)] == [None, 0.1, 0.3, 0.2, 0.2]


def test_whole_epochs_come_closest():
    assert [whole_epochs(flops, 100.0) for flops in (1, 149, 151, 1000)] == [1, 1, 2, 10]


def test_finished_cells_are_taken_over_only_with_the_same_settings(tmp_path):
    config = load_config(REPOSITORY / "configs" / "fashion_mnist.yaml")
    study = Study(config, 8, tmp_path, lambda line: None)
    for arm in ARMS:
        done = cell(arm, 0.5, settings=study._settings)
        (tmp_path / f"0-{arm}.json").write_text(done.model_dump_json())
    assert set(study.cells(0)) == set(ARMS)  # nothing was trained: there are no data here
    assert Study(config, 9, tmp_path, lambda line: None)._read(0, "small") is None


def test_one_seed_makes_no_interval():
    with pytest.raises(ConfigError, match="--seeds: an interval needs two seeds"):
        main(["--seeds", "1"], lambda line: None)
