"""Urabrask's checks: every library design passes, and each check fails on a kernel made to break it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.leyline import BlueprintIR, Node, SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.urabrask.gauntlet import examine

VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=6)
CAUSAL = SiteSignature(kind=SiteKind.SEQUENCE, channels=4, extent=(6,), causal=True)
LINEAR = BlueprintIR(
    fit=(SiteKind.VECTOR, SiteKind.SEQUENCE), nodes=(Node(id="lin", op="linear"),), output="lin"
)  # r(h) = W h + b


def failed(module: nn.Module, ir: BlueprintIR = LINEAR, signature: SiteSignature = VECTOR) -> set[str]:
    return {check.name for check in examine(module, ir, signature).checks if not check.passed}


class Broken(nn.Module):
    """A linear layer whose output is put through `spoil`."""

    def __init__(self, spoil, features: int = 6) -> None:
        super().__init__()
        self.lin = nn.Linear(features, features)
        self.spoil = spoil

    def forward(self, h):
        return self.spoil(self, h, self.lin(h))


def test_a_sound_kernel_passes_and_is_left_as_it_came():
    module = lower(LINEAR, VECTOR).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    report = examine(module, LINEAR, VECTOR)
    assert report.passed
    assert report.reason == ""
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda m, h, out: out[:, :3], "shape"),
        (lambda m, h, out: out.double(), "shape"),
        (lambda m, h, out: out / 0.0, "finite_forward"),
        (lambda m, h, out: out + h.detach().square().sqrt() * 0 + (h - h).sqrt(), "finite_gradient"),
        (lambda m, h, out: out.detach() + h, "finite_gradient"),
        (lambda m, h, out: out + torch.rand(()), "deterministic"),
        (lambda m, h, out: out - out.mean(0), "batch_independent"),
        (lambda m, h, out: out * (1.0 + m.training), "same_in_eval"),
        (lambda m, h, out: out.reshape(4, 6), "shape.batch_1"),
        (lambda m, h, out: out.view(2, -1, 6).flatten(0, 1) if len(out) > 1 else out, "shape.odd_batch"),
    ],
)
def test_each_check_fails_on_what_it_looks_for(spoil, name: str):
    assert name in failed(Broken(spoil))


def test_declared_zero_must_be_exact():
    ir = LINEAR.model_copy(update={"zero_at_birth": True})
    assert failed(lower(LINEAR, VECTOR), ir) == {"zero_at_birth"}
    almost = Broken(lambda m, h, out: out * 0 + 1e-30)
    assert "zero_at_birth" in failed(almost, ir)


def test_a_leak_from_the_future_is_found():
    leak = Broken(lambda m, h, out: out + h.mean(1, keepdim=True), features=4)
    assert failed(leak, LINEAR, CAUSAL) == {"causal"}
    assert failed(lower(LINEAR, CAUSAL), LINEAR, CAUSAL) == set()


def test_a_wrong_parameter_count_is_found():
    module = Broken(lambda m, h, out: out)
    module.extra = nn.Parameter(torch.zeros(1))
    assert failed(module) == {"parameter_count", "finite_gradient"}


def test_a_kernel_that_cannot_run_has_failed_with_the_reason():
    report = examine(nn.Linear(5, 5), LINEAR, VECTOR)
    assert not report.passed
    assert "mat1 and mat2" in report.reason


def test_examine_refuses_to_check_nothing():
    module = lower(LINEAR, VECTOR)
    with pytest.raises(ValueError, match="batch"):
        examine(module, LINEAR, VECTOR, batch=1)
    with pytest.raises(ValueError, match="seed"):
        examine(module, LINEAR, VECTOR, seeds=())
