"""What a run counts beside others of its kind."""

import numpy as np
import pytest

from esper.simic.ppo import Samples
from esper.simic.settings import ImitationConfig
from esper.simic.weighing import levelled, run_weights


def samples(*advantages):
    num = len(advantages)
    zeros = np.zeros(num)
    return Samples([None] * num, [None] * num, zeros, np.array(advantages, dtype=float), zeros, zeros)


def test_runs_count_by_what_they_came_to_beyond_their_own_seed():
    # seed 1 is an easy one: its worse run came to more than the better one of seed 0
    runs = [(0, 0, 0.1), (0, 0, 0.3), (0, 1, 0.8), (0, 1, 1.0)]
    weights = run_weights(runs, ImitationConfig(temperature=1.0))
    assert weights[0] == pytest.approx(weights[2])
    assert weights[1] == pytest.approx(weights[3])
    assert weights[1] / weights[0] == pytest.approx(np.exp(2.0))  # one deviation below, and one above
    assert np.mean(weights) == pytest.approx(1.0)


def test_tasks_count_alike_whatever_the_size_of_their_returns():
    runs = [(0, 0, 0.0), (0, 0, 0.001), (1, 0, 0.0), (1, 0, 0.9)]
    weights = run_weights(runs, ImitationConfig(temperature=1.0))
    assert weights[:2] == pytest.approx(weights[2:])


def test_no_run_counts_more_than_the_limit_and_without_a_temperature_all_count_alike():
    runs = [(0, 0, 0.0)] * 30 + [(0, 0, 1.0)]
    weights = run_weights(runs, ImitationConfig(temperature=0.1, max_weight=5.0))
    assert max(weights) / weights[0] > 5.0
    assert max(weights) <= 5.0 * np.mean(weights) * 31  # finite, though exp(50) was asked for
    assert run_weights(runs, ImitationConfig(temperature=None)) == [1.0] * 31


def test_what_is_alike_within_a_group_teaches_nothing():
    assert run_weights([(0, 0, 0.2), (0, 0, 0.2)], ImitationConfig()) == [1.0, 1.0]
    assert run_weights([], ImitationConfig()) == []


def test_advantages_are_beyond_the_others_of_the_group_and_of_one_scale_in_a_task():
    parts = [samples(0.5, 0.1), samples(0.1), samples(50.0)]
    found = levelled(parts, [0.5, 0.1, 50.0], ["0/7", "0/7", "1/7"])
    raw = np.array([0.5 - 0.1, 0.1 - 0.1, 0.1 - 0.5])
    assert np.concatenate([one.advantages for one in found[:2]]) == pytest.approx(raw / np.sqrt(np.mean(raw**2)))
    assert found[2].advantages == pytest.approx([1.0])  # alone in its group: its own value is all it has


def test_advantages_that_are_all_zero_stay_so():
    (found,) = levelled([samples(0.0, 0.0)], [0.0], ["0/0"])
    assert (found.advantages == 0.0).all()
