"""No, one or three seeds in TRAINING: every kind of host is bit for bit what it is without Esper."""

from __future__ import annotations

import functools

import pytest
import torch
from identity import KINDS, trace
from kasmina_support import assert_equal

STEPS = 7


@functools.cache
def without_esper(kind):
    return trace(kind, None, steps=STEPS)


@pytest.mark.parametrize("num_seeds", [0, pytest.param(1, marks=pytest.mark.soak), 3])
@pytest.mark.parametrize("kind", KINDS)
def test_seeds_in_training_leave_no_trace(kind, num_seeds):
    found = trace(kind, num_seeds, steps=STEPS)
    assert_equal(found, without_esper(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_three_that_train_by_tails_leave_no_trace(kind):
    assert_equal(trace(kind, 3, steps=STEPS, replays=1), without_esper(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_three_that_race_at_one_site_leave_no_trace(kind):
    seeds = {}
    assert_equal(trace(kind, 3, steps=STEPS, race=3, seeds=seeds), without_esper(kind))
    assert len({key.rpartition(".s")[0] for key in seeds}) == 1, "all at one site"
    assert len({key.rpartition(".s")[2].partition(".")[0] for key in seeds}) == 3


def test_a_tied_weight_is_one_tensor_in_the_trace():
    found = without_esper("gpt")
    assert torch.equal(found["head.weight"], found["tokens.weight"])
