"""The floors of `esper bench anomalies` on a few made-up runs, and that its scores count what they should."""

from __future__ import annotations

import pytest

from jobs.bench.anomalies import Score, evaluate, judge
from jobs.bench.streams import FAULTS, Episode, episode


def test_faults_are_found_and_clean_runs_are_left_alone():
    scores = evaluate(FAULTS, range(200_000, 200_001), hours=0.1)
    together = Score()
    for score in scores.values():
        together.add(score)
    assert together.recall >= 0.9, {name: score.recall for name, score in scores.items()}
    assert together.precision >= 0.9, [alert for score in scores.values() for alert in score.wrong]
    clean = evaluate([None], range(200_000, 200_002), hours=0.1)[None]
    assert clean.wrong == []


def test_an_alert_of_another_place_or_time_is_wrong_and_a_fault_without_one_is_not_found():
    made = episode(7, hours=0.1, fault="bus lag")
    assert judge(made).found == 1
    assert made.fault is not None
    elsewhere = Episode(made.signals, made.fault.__class__(**{**vars(made.fault), "place": "nowhere"}), made.hours)
    missed = judge(elsewhere)
    assert (missed.faults, missed.found, missed.recall) == (1, 0, 0.0)
    assert missed.precision == 0.0
    assert len(judge(Episode(made.signals, None, made.hours)).wrong) >= 1


@pytest.mark.parametrize("fault", [None, "loss spike"])
def test_a_seed_makes_the_same_run_again(fault):
    assert episode(3, hours=0.05, fault=fault).signals == episode(3, hours=0.05, fault=fault).signals
