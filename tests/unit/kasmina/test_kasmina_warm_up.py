"""The last look at a kernel before it is used: what Urabrask let through, and what it cannot have seen."""

from __future__ import annotations

import pytest
import torch
from kasmina_support import random_ir
from torch import nn

from esper.kasmina.warm_up import warm_up
from esper.leyline import KernelRejectedError, SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.leyline.ops import fits, memory_bytes
from esper.urza.library import load_library

CPU = torch.device("cpu")
VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=8)
SITES = (
    VECTOR,
    SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(6, 6)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(12,)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(12,), causal=True),
)


@pytest.mark.parametrize("name", sorted(load_library()))
def test_every_design_of_the_library_passes(name):
    ir = load_library()[name].ir
    sites = [site for site in SITES if fits(ir, site) is None]
    assert sites
    for site in sites:
        module = lower(ir, site)
        before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        drawn = torch.get_rng_state()
        warm_up(module, memory_bytes(ir, site), site, CPU)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert module.training
        assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def _raise(_kernel, _h, _y):
    raise ValueError("no")


BAD = {
    "two things": lambda _kernel, _h, y: y + torch.rand_like(y),
    "in eval mode": lambda kernel, _h, y: y if kernel.training else 2.0 * y,
    "puts out": lambda _kernel, _h, y: y[..., :-1],
    "not finite": lambda _kernel, _h, y: y / 0.0,
    "allocates": lambda _kernel, _h, y: y + torch.ones(1 << 20).mean() - 1.0,
    "gradient is not": lambda _kernel, h, _y: Reversed.apply(h),
    "raised ValueError": _raise,
}


@pytest.mark.parametrize("words", BAD)
def test_what_misbehaves_is_refused(words):
    module = nn.Sequential(lower(random_ir(), VECTOR))
    hook = BAD[words]
    module.register_forward_hook(lambda kernel, args, y: hook(kernel, args[0], y))
    with torch.random.fork_rng(), pytest.raises(KernelRejectedError, match=words):
        warm_up(module, memory_bytes(random_ir(), VECTOR), VECTOR, CPU)
