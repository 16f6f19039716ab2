"""A kernel that would slow its host down is told from one that does not."""

from __future__ import annotations

from esper.tolaria.slowness import MIN_STEPS, Slowness


def told(limit, *, host, shadow, steps=MIN_STEPS):
    slowness = Slowness(limit)
    for _ in range(steps):
        slowness.host(host)
        slowness.shadows({"s0": shadow, "s1": host})
    return slowness


def test_one_that_takes_too_long_is_told_with_its_figures():
    slowness = told(10.0, host=0.002, shadow=0.15)
    assert slowness.verdict("s0") == "an update takes 150 ms, a step of the host 2 ms"
    assert slowness.verdict("s1") is None


def test_nothing_is_said_early_or_without_a_limit_or_of_a_stranger():
    assert told(10.0, host=0.002, shadow=0.15, steps=MIN_STEPS - 1).verdict("s0") is None
    assert told(None, host=0.002, shadow=0.15).verdict("s0") is None
    assert told(10.0, host=0.002, shadow=0.15).verdict("s2") is None


def test_one_slow_step_says_nothing():
    slowness = told(10.0, host=0.002, shadow=0.003)
    slowness.shadows({"s0": 9.0})
    assert slowness.verdict("s0") is None


def test_a_seed_that_is_gone_is_forgotten():
    slowness = told(10.0, host=0.002, shadow=0.15)
    slowness.shadows({"s1": 0.002})
    assert slowness.verdict("s0") is None
