"""What the comparison says of runs that are done; how they are kept; and that arms cost what is reckoned beforehand."""

from xml.etree import ElementTree as ET

import pytest
import torch

from esper.api import configured_host
from esper.config import load_config
from esper.data import DataSets
from esper.leyline.errors import ConfigError
from esper.simic.spending import epoch_flops
from jobs.bench.arms import small
from jobs.bench.upgrade import Cell, Study, main, picture_of, result_of, whole_epochs
from jobs.environment import REPOSITORY

KEYS = [("small", 0), *((arm, n) for n in (4, 8) for arm in ("upgrade", "more", "scratch")), ("whole", 8)]


def cell(arm, length, test, *, seed=0, settings="x"):
    return Cell(
        arm=arm, length=length, seed=seed, settings=settings, test_accuracy=test, flops=(length + 1) * 10**9, epochs=3,
        params=10, parts=(), validation=(0.4, 0.5),
    )  # fmt: skip


def seeds(**tests):
    """Of three seeds that differ by a point each; an accuracy by arm, or by arm and length."""
    levels = {key: tests.get(f"{key[0]}{key[1]}", tests.get(key[0])) for key in KEYS}
    return [
        {key: cell(*key, levels[key] + seed / 100 + (key[0] == "upgrade") * seed / 1000, seed=seed) for key in KEYS}
        for seed in range(3)
    ]


def test_each_length_has_its_goals_against_what_costs_as_much():
    found = result_of(seeds(small=0.5, upgrade4=0.6, upgrade8=0.7, more=0.55, scratch4=0.4, scratch8=0.8, whole=0.9))
    met = {goal.name: goal.met for goal in found.goals}
    assert met == {
        "upgrade of 4 epochs minus more, equal extra FLOPs, test": True,
        "upgrade of 4 epochs minus scratch, equal extra FLOPs, test": True,
        "upgrade of 8 epochs minus more, equal extra FLOPs, test": True,
        "upgrade of 8 epochs minus scratch, equal extra FLOPs, test": False,
    }
    assert "minus that network: -19.9 (" in found.verdict  # what does not flatter is said too


def test_rows_pair_each_arm_with_the_upgrade_of_its_length():
    found = result_of(seeds(small=0.5, upgrade4=0.6, upgrade8=0.7, more=0.55, scratch=0.4, whole=0.9))
    rows = {(row["upgrade of"], row["arm"]): row for row in found.rows}
    assert rows["4 epochs", "scratch"]["upgrade minus it"].startswith("+20.1 (")
    assert rows["8 epochs", "scratch"]["upgrade minus it"].startswith("+30.1 (")
    assert rows["", "small"]["upgrade minus it"] is None
    assert rows["", "small"]["test"] == "51.0% (50.0% to 52.0%)"
    assert all(row.keys() == found.rows[0].keys() for row in found.rows)


def test_the_picture_holds_a_curve_of_each_arm_and_the_level_before():
    told = seeds(small=0.5, upgrade4=0.6, upgrade8=0.7, more=0.55, scratch=0.4, whole=0.9)
    root = ET.fromstring(picture_of(told))
    kind = "{http://www.w3.org/2000/svg}"
    points = [len(line.attrib["points"].split()) for line in root.iter(f"{kind}polyline")]
    assert points == [2, 2, 3]  # from scratch there is one more, further on
    words = [text.text for text in root.iter(f"{kind}text")]
    assert {"upgraded", "trained on, not grown", "its network from scratch", "small host 51.0%"} <= set(words)
    places = [float(circle.attrib[axis]) for circle in root.iter(f"{kind}circle") for axis in ("cx", "cy")]
    assert min(places) > 0
    assert max(places) < 760


def test_whole_epochs_come_closest():
    assert [whole_epochs(flops, 100.0) for flops in (1, 149, 151, 1000)] == [1, 1, 2, 10]


def test_an_epoch_costs_what_was_reckoned():
    config = load_config(
        REPOSITORY / "configs" / "digits_mlp.yaml",
        ["tolaria.epochs=2", "tolaria.batch_size=16", "kasmina.telemetry_every=1000", "deterministic=true"],
    )
    x, y = torch.randn(80, 64), torch.arange(80) % 10
    data = DataSets(train=(x[:40], y[:40]), val=(x[40:60], y[40:60]), test=(x, y), input_shape=(64,), num_outputs=10)
    reckoned = epoch_flops(config, data, configured_host(config, data))
    outcome = small(config, data, policy="none", say=lambda line: None)
    telemetry = outcome.summary.ledger.flops.telemetry
    assert 0 < telemetry < 0.2 * reckoned
    assert outcome.epochs[-1].total_flops - telemetry == 2 * reckoned


def test_finished_runs_are_taken_over_only_with_the_same_settings(tmp_path):
    study = Study([], [4, 8], 5, tmp_path, lambda line: None)
    for arm, length in KEYS:
        done = cell(arm, length, 0.5, settings=study._settings[arm])
        (tmp_path / f"0-{arm}-{length}.json").write_text(done.model_dump_json())
    assert list(study.cells(0)) == KEYS  # nothing was trained: there are no data here
    other = Study(["data.path=nowhere/at/all"], [4, 8], 5, tmp_path, lambda line: None)
    with pytest.raises(Exception, match="nowhere"):
        other.cells(0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "1"], "--seeds: an interval needs two seeds"),
        (["--epochs", "a"], "--epochs: 'a' are no epochs"),
        (["--epochs", "0,4"], "--epochs: an upgrade takes an epoch at least"),
    ],
)
def test_wrong_options_are_named(tmp_path, arguments, words):
    with pytest.raises(ConfigError, match=words):
        main([*arguments, "--out", str(tmp_path)], lambda line: None)
