"""How often health is sampled, from made-up durations."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tolaria.pace import MAX_FACTOR, Pace, replay_interval


def drive(pace, steps, *, plain, sampled, longest=10_000):
    """Runs steps of known length; returns the numbers of those that were sampled."""
    chosen = []
    for step in range(steps):
        is_sampled = pace.samples(step, longest=longest)
        pace.took(sampled if is_sampled else plain, sampled=is_sampled)
        if is_sampled:
            chosen.append(step)
    return chosen


def test_without_a_share_the_interval_is_fixed_whatever_it_costs():
    assert drive(Pace(10, None), 45, plain=1.0, sampled=100.0) == [0, 10, 20, 30, 40]


def test_cheap_samples_come_as_often_as_was_asked_for():
    assert drive(Pace(10, 0.02), 45, plain=1.0, sampled=1.1) == [0, 10, 20, 30, 40]


def test_dear_samples_come_less_often_until_they_keep_to_their_share():
    chosen = drive(Pace(10, 0.02), 1000, plain=1.0, sampled=2.0)
    assert chosen[:4] == [0, 10, 20, 70]
    assert {later - earlier for earlier, later in pairwise(chosen[2:])} == {50}


@given(every=st.integers(1, 20), share=st.floats(0.001, 1.0), extra=st.floats(0.0, 20.0))
def test_the_cost_keeps_to_its_share_within_the_bounds(every, share, extra):
    pace = Pace(every, share)
    drive(pace, 10 * every + 4, plain=1.0, sampled=1.0 + extra)
    interval = pace.interval(longest=10**6)
    assert every <= interval <= MAX_FACTOR * every
    if every < interval < MAX_FACTOR * every:
        assert extra / interval <= share * (1 + 1e-9) < extra / (interval - 1) * (1 + 1e-9)


def test_every_epoch_is_measured():
    chosen = drive(Pace(2, 0.001), 200, plain=1.0, sampled=50.0, longest=8)
    assert all(any(8 * epoch <= step < 8 * epoch + 8 for step in chosen) for epoch in range(25))


def test_the_step_after_a_change_is_spared_and_the_next_is_not():
    pace = Pace(5, 0.02)
    assert [step for step in range(11) if pace.samples(step, longest=8)] == [0, 5, 10]
    for _ in range(3):
        pace.forget()
    assert [step for step in range(15, 30) if pace.samples(step, longest=8)] == [16, 21, 26]
    pace.forget()
    assert [step for step in range(30, 34) if pace.samples(step, longest=8)] == [31], "due at 31: nothing to spare"


def test_an_epoch_of_one_step_is_measured_whatever_changes():
    pace = Pace(5, 0.02)
    for step in range(0, 30, 5):
        pace.forget()
        assert pace.samples(step, longest=1)


def test_after_a_change_it_measures_anew():
    pace = Pace(5, 0.01)
    drive(pace, 300, plain=1.0, sampled=3.0)
    assert pace.interval(longest=10_000) == 5 * MAX_FACTOR
    pace.forget()
    assert pace.interval(longest=10_000) == 5


def test_going_back_in_time_samples_at_once():
    pace = Pace(5, 0.5)
    assert pace.samples(100, longest=50)
    assert pace.samples(3, longest=50)


def test_a_clock_that_stands_still_changes_nothing():
    pace = Pace(5, 0.01)
    drive(pace, 50, plain=0.0, sampled=0.0)
    assert pace.interval(longest=100) == pytest.approx(5)


def test_ranks_with_other_clocks_sample_the_same_steps_while_they_hold_to_one_interval():
    paces = [Pace(5, 0.01), Pace(5, 0.01)]
    for pace in paces:
        pace.hold(paces[0].interval(longest=100))
    chosen = [drive(pace, 60, plain=1.0, sampled=sampled) for pace, sampled in zip(paces, (1.0, 9.0), strict=True)]
    assert chosen[0] == chosen[1] == list(range(0, 60, 5))
    for pace in paces:
        pace.hold(paces[1].interval(longest=100))
    assert drive(paces[0], 300, plain=1.0, sampled=1.0) == drive(paces[1], 300, plain=1.0, sampled=9.0)


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        ("auto", 0, 1),
        ("auto", 34, 1),
        ("auto", 140, 2),
        ("auto", 768, 12),
        ("auto", 10**6, 12),
        (5, 10**6, 5),
        (5, 0, 5),
    ],
)
def test_kernels_are_trained_as_often_as_is_set_and_often_enough_in_short_epochs(every, steps, expected):
    assert replay_interval(every, steps_per_epoch=steps) == expected
