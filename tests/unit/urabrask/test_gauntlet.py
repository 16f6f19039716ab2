"""Urabrask's checks: every library design passes, and each check fails on a kernel made to break just it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.leyline import BlueprintIR, Node, SiteKind, SiteSignature
from esper.leyline.lower import lower
from esper.leyline.ops import count_flops, count_parameters
from esper.urabrask import subject
from esper.urabrask.comparing import NONE, Discrepancy, compare
from esper.urabrask.gauntlet import examine
from esper.urabrask.subject import Pass
from esper.urza.library import designs_for

VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=6)
IMAGE = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=4, extent=(6, 5))
CAUSAL = SiteSignature(kind=SiteKind.SEQUENCE, channels=4, extent=(6,), causal=True)
SEQUENCE = SiteSignature(kind=SiteKind.SEQUENCE, channels=4, extent=(6,))
LINEAR = BlueprintIR(
    fit=(SiteKind.VECTOR, SiteKind.SEQUENCE), nodes=(Node(id="lin", op="linear"),), output="lin"
)  # r(h) = W h + b


SITES = (VECTOR, IMAGE, CAUSAL)
FIRST_SITES = {design.name: (design, site) for site in reversed(SITES) for design in designs_for(site)}
"""Each library design and the first of these sites that it fits."""
REPEATED = ("mlp_adapter", "gated_mlp", "attention_head", "residual_conv", "depthwise_se", "norm_replace")
"""Of every kind of layer one."""


def chain(*nodes: Node, **fields) -> BlueprintIR:
    """Nodes that each read the one before."""
    linked = [
        node.model_copy(update={"inputs": (nodes[i - 1].id,)}) if i and node.inputs == ("h",) else node
        for i, node in enumerate(nodes)
    ]
    return BlueprintIR(fit=(SiteKind.VECTOR,), nodes=tuple(linked), output=nodes[-1].id, **fields)


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


class WrongInFloat32(torch.autograd.Function):
    """The identity, whose gradient is 5% too large, but not in float64."""

    @staticmethod
    def forward(ctx, x):
        ctx.factor = 1.05 if x.dtype is torch.float32 else 1.0
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN, but not in float64."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient if gradient.dtype is torch.float64 else gradient * torch.nan


def nan_at(place, batches):
    """Spoils the output, the gradient of h (the first) or those of the layer (the last), in batches of these sizes."""

    def spoil(module, h, out):
        if len(h) not in batches or h.dtype is torch.float64:
            return out
        if place == "first":
            return out + 0.01 * NanGradient.apply(h) - 0.01 * h
        return NanGradient.apply(out) if place == "last" else out * torch.nan

    return spoil


def infinite_far_out(module, h, out):
    far = torch.where((h.detach() > 50.0) & (h.detach() < 1e3), torch.inf, 1.0)
    return out * far


def raising_at(predicate):
    def spoil(module, h, out):
        if bool(predicate(h).any()):
            raise RuntimeError("cannot")
        return out

    return spoil


def test_a_sound_kernel_passes_and_is_left_as_it_came():
    module = lower(LINEAR, VECTOR).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    report = examine(module, LINEAR, VECTOR)
    assert report.passed
    assert report.reason == ""
    assert not module.training
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])  # float32: the tests of the library
def test_every_library_design_passes_in_every_dtype(dtype: str):
    reasons = {}
    for name, (design, site) in FIRST_SITES.items():
        signature = site.model_copy(update={"dtype": dtype})
        reasons[name] = examine(lower(design.ir, signature), design.ir, signature).reason
    assert len(reasons) >= 16
    assert not any(reasons.values()), reasons


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.key)
def test_every_library_design_passes_at_every_site_in_every_dtype(site: SiteSignature, dtype: str):
    signature = site.model_copy(update={"dtype": dtype})
    reasons = {
        design.name: examine(lower(design.ir, signature), design.ir, signature).reason
        for design in designs_for(signature)
    }
    assert len(reasons) >= 8
    assert not any(reasons.values()), reasons


EVERY_SHAPE = {"shape", "shape.batch_1", "shape.odd_batch"}


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda m, h, out: out.double(), EVERY_SHAPE),
        (infinite_far_out, {"finite_forward", "birth"}),
        (lambda m, h, out: out + 0.01 * (out.dtype is torch.float32), {"correct_forward", "correct_strided"}),
        (lambda m, h, out: WrongInFloat32.apply(out), {"correct_gradient", "correct_strided"}),
        (lambda m, h, out: out + 0.01 * (not h.is_contiguous()), {"correct_strided"}),
        (lambda m, h, out: out * 1e35 * 1e-35, {"stable_large"}),
        (lambda m, h, out: out * (h / h.square().mean(-1, keepdim=True).sqrt()), {"stable_tiny"}),
        (lambda m, h, out: out * (h / (h.abs().sum(-1, keepdim=True) + 1e-60)), {"stable_zero"}),
        (raising_at(torch.isnan), {"stable_nan"}),
        (raising_at(torch.isinf), {"stable_inf"}),
        (lambda m, h, out: out + h.detach().mean() * 0.0, {"stable_nan", "stable_inf"}),
        (lambda m, h, out: out + 1e-6 * torch.rand(()), {"deterministic", "same_in_eval"}),
        (lambda m, h, out: out + 0.01 * h[-1:], {"batch_independent"}),
        (lambda m, h, out: out * (1.0 + m.training), {"same_in_eval"}),
    ],
)
def test_each_check_fails_on_what_it_looks_for(spoil, names: set[str]):
    assert failed(Broken(spoil)) == names


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda m, h, out: out[:, :3], "shape"),
        (lambda m, h, out: out / 0.0, "finite_forward"),
        (lambda m, h, out: out + h.detach().square().sqrt() * 0 + (h - h).sqrt(), "finite_gradient"),
        (lambda m, h, out: out.detach() + h, "finite_gradient"),
        (lambda m, h, out: out.reshape(4, 6), "shape.batch_1"),
        (lambda m, h, out: out.view(2, -1, 6).flatten(0, 1) if len(out) > 1 else out, "shape.odd_batch"),
    ],
)
def test_some_faults_show_in_many_ways(spoil, name: str):
    assert name in failed(Broken(spoil))


@pytest.mark.parametrize("batches", [{1, 3, 4}, {1}, {3}])
@pytest.mark.parametrize(
    ("place", "name"), [("output", "correct_forward"), ("first", "correct_gradient"), ("last", "correct_gradient")]
)
def test_a_nan_anywhere_is_found(place: str, name: str, batches: set[int]):
    assert name in failed(Broken(nan_at(place, batches)))


def test_a_nan_is_kept_whatever_comes_after_it():
    nan, fine = Discrepancy(float("nan"), float("nan"), "w"), Discrepancy(1e-9, 1e-9, "b")
    for worst in (nan.worse(fine), fine.worse(nan), NONE.worse(nan).worse(fine)):
        assert worst.forward == float("inf")
        assert worst.gradient == float("inf")
        assert worst.worst == "w"
    ones = torch.ones(2, dtype=torch.float64)
    gradients = {"a": ones, "b": ones, "c": ones}
    for spoiled in gradients:
        found = compare(Pass(ones, gradients | {spoiled: ones * torch.nan}), Pass(ones, gradients))
        assert (found.forward, found.gradient, found.worst) == (0.0, float("inf"), spoiled)


def nan_by_layout(module, h, out):
    return out if h.is_contiguous() else out * torch.nan


def test_a_nan_for_one_layout_at_birth_is_found():
    assert {"birth", "correct_strided"} <= failed(Broken(nan_by_layout))


def test_a_wrong_parameter_count_is_found():
    assert failed(nn.Linear(6, 6, bias=False)) == {"parameter_count"}


def test_declared_zero_must_be_exact():
    ir = LINEAR.model_copy(update={"zero_at_birth": True})
    assert failed(lower(LINEAR, VECTOR), ir) == {"zero_at_birth"}
    almost = Broken(lambda m, h, out: out * 0 + 1e-30)
    assert "zero_at_birth" in failed(almost, ir)
    zero = chain(Node(id="lin", op="linear", params={"init": "zeros"}), zero_at_birth=True)
    assert failed(lower(zero, VECTOR), zero) == set()


def test_a_dead_parameter_is_found_in_a_design_that_kills_it():
    ir = chain(
        Node(id="one", op="linear", params={"out": 1}),
        Node(id="always_1", op="softmax"),  # of one feature
        Node(id="last", op="linear"),
    )
    report = examine(lower(ir, VECTOR), ir, VECTOR)
    assert [check.name for check in report.checks if not check.passed] == ["gradient_health"]
    assert "dead: no gradient in 20 steps for one.weight, one.bias" in report.reason


def test_an_exploding_parameter_is_found_in_a_design_that_amplifies():
    factors = [Node(id=f"by_{n}", op="scale", params={"value": 100.0}) for n in range(3)]
    ir = chain(*factors)
    report = examine(lower(ir, VECTOR), ir, VECTOR)
    assert [check.name for check in report.checks if not check.passed] == ["gradient_health"]
    assert "exploding: the gradient of by_0" in report.reason


def test_an_output_that_runs_away_is_found():
    ir = chain(Node(id="by", op="scale", params={"value": 150.0}))
    report = examine(lower(ir, VECTOR), ir, VECTOR)
    assert [check.name for check in report.checks if not check.passed] == ["gradient_health"]
    assert "exploding: the output is 1" in report.reason


def test_an_overflow_within_a_design_is_found():
    squares = [Node(id="h2", op="mul", inputs=("h", "h"))]
    squares += [Node(id=f"h{2**n}", op="mul", inputs=(f"h{2 ** (n - 1)}",) * 2) for n in range(2, 5)]
    ir = chain(*squares, Node(id="norm", op="layernorm"))
    assert {"finite_forward", "stable_large"} <= failed(lower(ir, VECTOR), ir)


def test_a_leak_from_the_future_is_found():
    leak = Broken(lambda m, h, out: out + h.mean(1, keepdim=True), features=4)
    assert failed(leak, LINEAR, CAUSAL) == {"causal"}
    assert failed(lower(LINEAR, CAUSAL), LINEAR, CAUSAL) == set()


def test_a_kernel_that_cannot_run_has_failed_with_the_reason():
    report = examine(nn.Linear(5, 5), LINEAR, VECTOR)
    assert not report.passed
    assert "mat1 and mat2" in report.reason
    assert (report.risk_score, report.tags, report.latencies) == (1.0, (), ())


def test_examine_refuses_to_check_nothing():
    module = lower(LINEAR, VECTOR)
    with pytest.raises(ValueError, match="batch"):
        examine(module, LINEAR, VECTOR, batch=1)
    with pytest.raises(ValueError, match="seed"):
        examine(module, LINEAR, VECTOR, seeds=())


@pytest.mark.parametrize(
    ("name", "site"),
    [(name, FIRST_SITES[name][1]) for name in REPEATED]
    + [pytest.param(d.name, site, marks=pytest.mark.soak) for site in SITES for d in designs_for(site)],
    ids=lambda given: getattr(given, "key", given),
)
def test_verdicts_figures_and_score_repeat(name: str, site: SiteSignature):
    ir = FIRST_SITES[name][0].ir
    torch.manual_seed(1)
    first = examine(lower(ir, site), ir, site)
    torch.manual_seed(2)
    again = examine(lower(ir, site), ir, site)
    assert first.repeatable() == again.repeatable()
    assert {latency.name for latency in first.latencies} == {"forward", "step"}


def test_costs_are_figures_of_the_report():
    ir = chain(
        Node(id="up", op="linear", params={"out": "2*C"}), Node(id="act", op="relu"), Node(id="lin", op="linear")
    )
    figures = examine(lower(ir, VECTOR), ir, VECTOR).figures
    assert figures["parameters"] == count_parameters(ir, VECTOR) == 6 * 12 + 12 + 12 * 6 + 6
    assert figures["flops_per_sample"] == count_flops(ir, VECTOR)
    # for two samples: the parameters, h, the hidden layer after its ReLU, the output
    assert figures["train_peak_bytes"] == 4 * (figures["parameters"] + 2 * (6 + 12 + 6))


def test_a_dear_site_is_examined_at_a_smaller_extent_with_the_same_weights():
    wide = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=16, extent=(64, 64))
    ir = BlueprintIR(fit=(SiteKind.FEATURE_MAP,), nodes=(Node(id="conv", op="conv2d"),), output="conv")
    module = lower(ir, wide)
    moved, near = subject.nearer(module, ir, wide, batch=4)
    assert near.extent == (16, 16)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in moved.state_dict().items())
    small = wide.model_copy(update={"extent": (8, 8)})
    cheap = lower(ir, small)
    assert subject.nearer(cheap, ir, small, batch=4) == (cheap, small)


def test_a_kernel_whose_parameters_depend_on_the_extent_stays_at_its_site():
    site = SiteSignature(kind=SiteKind.SEQUENCE, channels=64, extent=(256,))
    ir = BlueprintIR(
        fit=(SiteKind.SEQUENCE,),
        nodes=(
            Node(id="flat", op="pool"),
            Node(id="up", op="linear", inputs=("flat",), params={"out": "T"}),
            Node(id="down", op="linear", inputs=("up",)),
            Node(id="back", op="broadcast", inputs=("down",)),
        ),
        output="back",
    )
    module = lower(ir, site)
    assert subject.nearer(module, ir, site, batch=4) == (module, site)
