"""What growth was worth in past runs, out of their files; correlations beside scipy's."""

from __future__ import annotations

import json
import random

import nissa_story as story
import pytest
from typer.testing import CliRunner

from esper.leyline import Choice, Evidence, EvidenceKind, HealthSignal, Outcome
from esper.leyline.foresight import FIGURES, foresights, spearman
from esper.nissa.gains import chosen, designs
from jobs.cli import app


def reported(gain, **changes):
    one = story.field_reports()[0]
    evidence = Evidence(kind=EvidenceKind.SHADOW, gain=gain, baseline=1.0, candidate=1.0 - gain, num_pairs=9)
    return one.model_copy(update={"evidence": evidence, "outcome": Outcome.FOSSILIZED, **changes})


def seen(potential, **health):
    return HealthSignal(layer_id="a", seed_id="s0", epoch=1, grow_potential=potential, **health)


def test_designs_are_summed_up_the_best_first():
    rows = designs(
        [
            reported(0.1, blueprint="plain"),
            reported(0.3, blueprint="best"),
            reported(0.2, blueprint="plain", outcome=Outcome.UNFINISHED),
            reported(0.5, blueprint="best"),
            reported(0.9, blueprint="unknown", evidence=None),
        ]
    )
    assert [(row.blueprint, row.tried, row.kept, row.record.num) for row in rows] == [
        ("best", 2, 2, 2), ("plain", 2, 1, 1), ("unknown", 1, 1, 0),
    ]  # fmt: skip
    assert rows[0].record.mean == pytest.approx(0.4)


@pytest.mark.parametrize("levels", [1000, 4])
def test_the_correlation_is_scipys(levels):
    from scipy import stats  # a second of imports, for whoever draws this test

    draws = random.Random(levels)
    pairs = [(float(draws.randrange(levels)), float(draws.randrange(levels))) for _ in range(40)]
    assert spearman(pairs) == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def test_a_figure_that_tells_is_found():
    draws = random.Random(0)
    pairs = []
    for _ in range(60):
        potential = draws.random()
        value = potential + draws.gauss(0.0, 0.2)
        pairs.append((seen(potential, dead_neuron_ratio=0.5), value))
    found = {one.figure: one for one in foresights(pairs)}
    assert found["grow_potential"].rho > 0.6
    assert 0.0 < found["grow_potential"].low < found["grow_potential"].rho < found["grow_potential"].high < 1.0
    assert (found["dead_neuron_ratio"].num, found["dead_neuron_ratio"].rho) == (60, None)  # it never varied
    assert (found["gradient_norm"].num, found["gradient_norm"].rho) == (0, None)  # nor was this measured


def test_the_interval_misses_one_time_in_twenty():
    draws, missed = random.Random(0), 0
    for _ in range(200):
        pairs = [(seen(draws.random()), draws.random()) for _ in range(20)]
        (found, *_) = foresights(pairs)
        missed += not found.low < 0.0 < found.high
    assert 3 <= missed <= 18


def test_four_pairs_say_nothing():
    assert {one.rho for one in foresights([(seen(float(i)), float(i)) for i in range(4)])} == {None}


def test_few_pairs_in_perfect_order_leave_doubt():
    """Fisher's interval of a correlation of 1 has no width, however few pairs it is of."""
    for num, least in ((5, 0.0), (30, 0.9)):
        (up, *_) = foresights([(seen(float(i)), float(i)) for i in range(num)])
        (down, *_) = foresights([(seen(float(i)), -float(i)) for i in range(num)])
        assert (up.rho, up.high) == (pytest.approx(1.0), pytest.approx(1.0))
        assert least < up.low < (0.4 if num == 5 else 0.9999)
        assert (down.low, down.high) == (pytest.approx(-up.high), pytest.approx(-up.low))


def test_a_choice_goes_with_the_report_of_its_trace():
    good, bad = (reported(gain, trace_id=trace) for gain, trace in ((0.2, "t0"), (-0.25, "t1")))
    summary = story.summary(field_reports=(good, bad))
    choices = tuple(
        Choice(trace_id=trace, epoch=1, step=9, policy="heuristic", health=seen(potential), reason="because")
        for trace, potential in (("t0", 0.5), ("t1", 0.1), ("t2", 0.3))  # the last is still under way
    )
    history = story.history().model_copy(update={"choices": choices})
    assert [(health.grow_potential, value) for health, value in chosen(summary, history)] == [
        (0.5, pytest.approx(0.2)), (0.1, pytest.approx(-0.2)),
    ]  # fmt: skip


def test_the_command_reads_all_runs_of_a_storage(tmp_path):
    for name in ("one", "two"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        told = story.summary(run_id=name, field_reports=(reported(0.1, blueprint="conv", trace_id=name),))
        (folder / "summary.json").write_text(told.model_dump_json())
        (folder / "history.json").write_text(story.history().model_dump_json())
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "summary.json").write_text("{}")

    def invoke(*arguments):
        result = CliRunner().invoke(app, ["runs", "gains", *arguments, "--storage", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.stdout

    told = json.loads(invoke("--json"))
    [design] = told["designs"]
    assert (design["design"], design["tried"], design["measured"]) == ("conv", 2, 2)
    assert [row["figure"] for row in told["foresights"]] == list(FIGURES)
    assert told["unread"] == ["torn"]
    text = invoke()
    assert "conv" in text
    assert "+0.100 ± 0.000 of 2" in text
    assert "not read: torn" in text
    assert json.loads(invoke("one", "--json"))["designs"][0]["tried"] == 1
