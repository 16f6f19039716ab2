"""No, one or three seeds in TRAINING: every kind of host is bit for bit what it is without Esper."""

from __future__ import annotations

import functools

import pytest
import torch
from identity import KINDS, trace
from kasmina_support import assert_equal

STEPS = 12


@functools.cache
def without_esper(kind):
    return trace(kind, None, steps=STEPS)


@pytest.mark.parametrize("num_seeds", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_seeds_in_training_leave_no_trace(kind, num_seeds):
    found = trace(kind, num_seeds, steps=STEPS)
    assert_equal(found, without_esper(kind))


def test_a_tied_weight_is_one_tensor_in_the_trace():
    found = without_esper("gpt")
    assert torch.equal(found["head.weight"], found["tokens.weight"])
