"""When a pool grows and shrinks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.tezzeret.scaling import WORK_PER_WORKER_S, Bounds, Demand, Resize, resize

BOUNDS = Bounds(min_workers=1, max_workers=4, idle_s=60.0)


@pytest.mark.parametrize(
    ("num_jobs", "work_s", "start"),
    [
        (0, 0.0, 1),  # the least
        (30, 3.0, 1),  # many, but done in a moment
        (2, 60.0, 2),  # never more than there are jobs
        (9, 2 * WORK_PER_WORKER_S + 1, 3),
        (99, 9999.0, 4),  # the most
    ],
)
def test_an_empty_pool_gets_as_many_as_the_work_is_worth(num_jobs, work_s, start):
    assert resize(Demand(num_jobs, work_s), {}, BOUNDS) == Resize(start=start)


def test_only_who_has_been_idle_for_long_goes_the_longest_first_and_the_least_stays():
    idle_s = {"a": 0.0, "b": 61.0, "c": 300.0, "d": 59.0}
    assert resize(Demand(), idle_s, BOUNDS).stop == ("c", "b")
    assert resize(Demand(), {"b": 61.0, "c": 300.0}, BOUNDS).stop == ("c",)
    assert resize(Demand(), {"b": 61.0}, BOUNDS) == Resize()
    assert resize(Demand(), {"b": 61.0}, Bounds(0, 2, 60.0)).stop == ("b",)
    assert resize(Demand(3, 60.0), idle_s, BOUNDS).stop == ("c",)


@given(
    st.integers(0, 1000),
    st.floats(0, 1e6),
    st.dictionaries(st.text(max_size=3), st.floats(0, 1e4), max_size=9),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_the_bounds_hold_whatever_comes(num_jobs, work_s, idle_s, extremes):
    least, most = sorted(extremes)
    found = resize(Demand(num_jobs, work_s), idle_s, Bounds(least, most))
    assert not (found.start and found.stop)
    after = len(idle_s) + found.start - len(found.stop)
    assert after >= least
    assert after <= max(most, len(idle_s))
    assert set(found.stop) <= set(idle_s)


def test_bounds_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="3 to 2"):
        Bounds(3, 2)
