import json
import math

import pytest

import jobs.bench
from esper.leyline import ConfigError
from jobs.bench import BENCHMARKS, run_benchmark
from jobs.bench.harness import (
    BenchResult,
    Estimate,
    goal_above,
    goal_at_most,
    interleaved,
    machine,
    mean_interval,
    median_interval,
    show,
)


def work(amount):
    return lambda: sum(range(amount))


def test_twice_the_work_is_about_twice_the_time():
    estimate = interleaved(work(2000), work(4000), rounds=30, block_s=0.001)
    assert estimate.low <= estimate.value <= estimate.high
    assert 1.5 < estimate.value < 2.7


def test_calls_of_a_block_are_a_multiple():
    calls = []
    interleaved(lambda: calls.append("a"), lambda: calls.append("b"), rounds=10, block_s=1e-5, multiple=7)
    blocks = "".join(calls[2 * 7 + 3 :])  # after the warm-up and the calibration
    per_round = len(blocks) // 10
    assert per_round % (4 * 7) == 0
    size = per_round // 4
    assert blocks[:per_round] == "a" * size + "b" * 2 * size + "a" * size


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="at least 10"):
        interleaved(work(1), work(1), rounds=9)


def test_median_interval_holds_the_median_and_narrows():
    few, many = median_interval([1.0, 1.1, 0.9] * 4), median_interval([1.0, 1.1, 0.9] * 100)
    assert few.value == many.value == 1.0
    assert many.half_width <= few.half_width
    assert few == median_interval([1.0, 1.1, 0.9] * 4)


def test_mean_interval_is_students():
    estimate = mean_interval([1.0, 2.0, 3.0])
    # t(0.975, 2 degrees) = 4.3027, standard error 1 / sqrt(3)
    assert estimate.value == pytest.approx(2.0)
    assert estimate.high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "met"),
    [(0.98, 1.005, True), (1.005, 1.02, True), (0.98, 1.02, False), (1.011, 1.012, False), (0.5, 1.0099, True)],
)
def test_a_limit_is_met_below_it_or_narrowly_around_it(low, high, met):
    estimate = Estimate(value=(low + high) / 2, low=low, high=high, num_samples=10)
    assert goal_at_most("x", estimate, 1.01).met is met


def test_a_gain_is_met_only_if_the_whole_interval_lies_above():
    assert goal_above("x", Estimate(value=0.1, low=0.01, high=0.2, num_samples=5), 0.0).met
    assert not goal_above("x", Estimate(value=0.1, low=-0.01, high=0.2, num_samples=5), 0.0).met


def test_names_are_known_without_importing_and_support_is_none():
    assert {"overhead", "tamiyo-latency"} <= set(BENCHMARKS)
    assert "harness" not in BENCHMARKS
    assert len(BENCHMARKS) == len(list(BENCHMARKS))


def test_an_unknown_benchmark_names_the_known():
    with pytest.raises(ConfigError, match=r"no benchmark 'speed' \(one of .*overhead"):
        run_benchmark("speed", [], as_json=True)


RESULT = BenchResult(
    name="paper",
    machine=machine(),
    rows=({"what": "a", "ratio": 1.5}, {"what": "b", "ratio": 2.0}),
    goals=(goal_at_most("a", Estimate(value=1.5, low=1.4, high=1.6, num_samples=10), 1.01),),
    verdict="plainly [slower]",
)


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.setattr(jobs.bench, "BENCHMARKS", {"paper": lambda arguments, say: say(" ".join(arguments)) or RESULT})


def test_json_alone_goes_to_the_output_and_progress_beside_it(paper, capsys):
    assert run_benchmark("paper", ["--seeds", "2"], as_json=True) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert {"name", "machine", "rows", "goals"} <= set(found)
    assert set(found["goals"][0]) == {"name", "value", "goal", "met", "interval"}
    assert captured.err == "--seeds 2\n"


def test_the_tables_of_its_parts_come_first_and_a_whole_without_rows_has_none(capsys):
    part = RESULT.model_copy(update={"name": "part"})
    show(BenchResult(name="whole", machine=machine(), parts=(part,), verdict="in all"))
    shown = capsys.readouterr().out
    assert shown.index("bench part") < shown.index("plainly [slower]") < shown.index("in all")
    assert "bench whole" not in shown


def test_table_shows_rows_goals_and_the_verdict(capsys):
    show(RESULT)
    shown = capsys.readouterr().out
    assert "a: 1.5000 [1.4000, 1.6000], goal 1.01: not met" in shown
    assert "plainly [slower]" in shown
