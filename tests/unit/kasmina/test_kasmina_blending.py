from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from esper.kasmina.blending import RAMPS, alpha_at, blend


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 29, 1000])
def test_a_ramp_rises_from_nothing_to_exactly_one(ramp, total):
    course = [alpha_at(ramp, done, total) for done in range(total + 3)]
    assert course[0] == 0.0
    assert course[total:] == [1.0, 1.0, 1.0]
    assert all(later > earlier for earlier, later in pairwise(course[: total + 1]))


def test_ramps_have_their_shape():
    assert alpha_at("linear", 1, 4) == 0.25
    assert alpha_at("cosine", 1, 4) == pytest.approx(0.5 - math.sqrt(0.125))
    assert alpha_at("cosine", 1, 2) == pytest.approx(0.5)
    assert alpha_at("sigmoid", 1, 2) == pytest.approx(0.5)
    assert alpha_at("sigmoid", 1, 4) < alpha_at("cosine", 1, 4) < alpha_at("linear", 1, 4)


def test_blend_at_its_ends_is_exact():
    h, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(blend(h, y, 1.0, replaces=False), h + y)
    assert torch.equal(blend(h, y, 0.0, replaces=False), h)
    assert torch.equal(blend(h, y, 1.0, replaces=True), y)
    assert torch.equal(blend(h, y, 0.0, replaces=True), h)
    assert torch.equal(blend(h, y, 0.25, replaces=False), h + 0.25 * y)
    assert torch.equal(blend(h, y, 0.25, replaces=True), 0.75 * h + 0.25 * y)


def test_upstream_receives_its_gradient_by_the_identity_and_by_the_kernel():
    h = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 4)
    for alpha in (0.3, 1.0):
        (gradient,) = torch.autograd.grad(blend(h, h @ weight, alpha, replaces=False).sum(), h)
        expected = torch.ones(3, 4) + alpha * (torch.ones(3, 4) @ weight.T)
        assert torch.allclose(gradient, expected)
