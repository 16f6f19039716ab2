"""Every figure here is worked out by hand in the test's own arithmetic, not by calling the table's formulas."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.leyline import BlueprintIR, Node, SiteKind, SiteSignature, ops
from esper.leyline.lower import lower
from esper.tolaria.flops import StepCosts, count_flops

B, C, H, W = 2, 4, 6, 6


def image():
    return torch.randn(B, C, H, W, requires_grad=True)


def forward(module, x):
    return count_flops(lambda: module(x))


def backward(module, x):
    """The FLOPs of the backward alone."""
    out = module(x)
    return count_flops(lambda: out.backward(torch.ones_like(out)))


def test_counting_does_not_touch_what_other_threads_run():
    kernel, h = nn.Sequential(nn.Linear(4, 4), nn.GELU()), torch.randn(8, 4, requires_grad=True)
    counts, inside, done = [], threading.Event(), threading.Event()

    def counted():
        inside.set()
        done.wait(60)

    thread = threading.Thread(target=lambda: counts.append(count_flops(counted)))
    thread.start()
    inside.wait(60)
    try:
        gradients = torch.autograd.grad(kernel(h).sum(), [h, *kernel.parameters()])
    finally:
        done.set()
        thread.join(60)
    assert len(gradients) == 3
    assert counts == [0]


def test_linear_forward_and_backward():
    x = torch.randn(5, 8, requires_grad=True)
    layer = nn.Linear(8, 3)
    assert forward(layer, x) == 2 * 5 * 8 * 3
    assert backward(layer, x) == 2 * (2 * 5 * 8 * 3) + 5 * 3  # dx, dW and the sum over the batch for the bias


def test_input_that_wants_no_gradient_saves_one_product():
    x = torch.randn(5, 8)
    assert backward(nn.Linear(8, 3, bias=False), x) == 2 * 5 * 8 * 3


def test_batched_matrix_product():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5 * 6


def test_matrix_vector_and_dot_product():
    a, v = torch.randn(4, 5), torch.randn(5)
    assert count_flops(lambda: a @ v) == 2 * 4 * 5
    assert count_flops(lambda: v @ v) == 2 * 5


def test_convolution():
    layer = nn.Conv2d(C, 8, 3, padding=1)
    macs = B * 8 * H * W * C * 9
    assert forward(layer, image()) == 2 * macs
    assert backward(layer, image()) == 2 * (2 * macs) + B * 8 * H * W


def test_strided_convolution_counts_its_output_positions():
    assert forward(nn.Conv2d(C, 8, 3, stride=2, padding=1), image()) == 2 * B * 8 * 3 * 3 * C * 9


def test_grouped_convolution():
    layer = nn.Conv2d(C, 8, 3, padding=1, groups=2, bias=False)
    macs = B * 8 * H * W * (C // 2) * 9
    assert forward(layer, image()) == 2 * macs
    assert backward(layer, image()) == 2 * (2 * macs)


def test_depthwise_convolution_backward_is_twice_its_forward():
    layer = nn.Conv2d(C, C, 3, padding=1, groups=C, bias=False)
    macs = B * C * H * W * 9
    assert forward(layer, image()) == 2 * macs
    assert backward(layer, image()) == 2 * (2 * macs)


def test_transposed_convolution():
    layer = nn.ConvTranspose2d(C, 8, 2, stride=2, bias=False)
    macs = B * H * W * C * 8 * 4
    assert forward(layer, image()) == 2 * macs
    assert backward(layer, image()) == 2 * (2 * macs)


def test_one_dimensional_convolution():
    x = torch.randn(2, 3, 10)
    assert forward(nn.Conv1d(3, 5, 3), x) == 2 * 2 * 5 * 8 * 3 * 3


HEADS, T, D = 2, 7, 4


def attention_inputs():
    return [torch.randn(B, HEADS, T, D, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_on_cpu(causal):
    q, k, v = attention_inputs()
    pairs = B * HEADS * T * T
    flops = count_flops(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal))
    assert flops == pairs * (2 * D + 2 * D + 1 + 5)
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # five products of the forward's size (scores again, dV, dP, dQ, dK), scaling twice, softmax again, its backward
    assert count_flops(lambda: out.backward(torch.ones_like(out))) == pairs * (5 * 2 * D + 2 + 5 + 4)


def test_attention_by_the_math_path_adds_only_scaling():
    q, k, v = attention_inputs()
    pairs = B * HEADS * T * T
    with sdpa_kernel(SDPBackend.MATH):
        flops = count_flops(lambda: functional.scaled_dot_product_attention(q, k, v))
    assert flops == pairs * (2 * D + 2 * D + 5) + 2 * (B * HEADS * T * D)  # q and k are scaled before the product


def test_cross_attention_counts_queries_times_keys():
    q, k, v = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    assert count_flops(lambda: functional.scaled_dot_product_attention(q, k, v)) == 3 * 9 * (2 * 4 + 2 * 4 + 1 + 5)


N = B * C * H * W


@pytest.mark.parametrize(
    ("norm", "per_element"),
    [
        (nn.BatchNorm2d(C), 8),
        (nn.BatchNorm2d(C, affine=False), 6),
        (nn.GroupNorm(2, C), 8),
        (nn.GroupNorm(2, C, affine=False), 6),
        (nn.LayerNorm((C, H, W)), 8),
        (nn.LayerNorm((C, H, W), elementwise_affine=False), 6),
    ],
)
def test_norms(norm, per_element):
    assert forward(norm, image()) == per_element * N
    assert backward(norm, image()) == 9 * N


def test_batch_norm_by_running_statistics_is_one_multiply_add():
    norm = nn.BatchNorm2d(C).eval()
    assert forward(norm, image()) == 2 * N
    assert backward(norm, image()) == (1 + 5) * N
    assert backward(norm.requires_grad_(requires_grad=False), image()) == N


def test_rms_norm():
    x = torch.randn(3, 8)
    # square, mean, scale and weight an element; the inverse root (and its epsilon) a row
    assert forward(nn.RMSNorm(8, eps=1e-6), x) == 4 * 24 + 2 * 3


@pytest.mark.parametrize(
    ("activation", "per_element"),
    [(nn.ReLU(), 1), (nn.LeakyReLU(), 1), (nn.Sigmoid(), 4), (nn.SiLU(), 5), (nn.Tanh(), 6), (nn.GELU(), 8)],
)
def test_activations_count_the_same_each_way(activation, per_element):
    assert forward(activation, image()) == per_element * N
    assert backward(activation, image()) == per_element * N


def test_in_place_activation_counts_as_the_other():
    assert count_flops(lambda: functional.relu_(torch.ones(3, 5))) == 15


def test_softmax():
    x = torch.randn(3, 8, requires_grad=True)
    assert forward(nn.Softmax(-1), x) == 5 * 24
    assert backward(nn.Softmax(-1), x) == 4 * 24


def test_pooling_counts_every_element_of_every_window():
    assert forward(nn.MaxPool2d(2), image()) == B * C * 3 * 3 * 4
    assert forward(nn.AvgPool2d(3, stride=1), image()) == B * C * 4 * 4 * 9
    assert forward(nn.AdaptiveAvgPool2d(1), image()) == N
    assert backward(nn.AvgPool2d(2), image()) == B * C * 3 * 3 * 4


def test_lookup_and_reshape_are_free():
    table = nn.Embedding(10, 4)
    assert forward(table, torch.tensor([1, 2, 3])) == 0
    assert forward(nn.Flatten(), image()) == 0


def test_lstm_is_not_free():
    x = torch.randn(5, 2, 3)  # (T, B, I)
    hidden = 4
    products = 2 * 5 * 2 * (4 * hidden * 3 + 4 * hidden * hidden)
    assert forward(nn.LSTM(3, hidden), x) == products + 5 * 2 * hidden * (3 * 4 + 2 * 6 + 4)


def test_backward_counts_the_same_whether_gradients_exist():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 8)

    def step():
        model(x).sum().backward()

    first = count_flops(step)
    assert model[0].weight.grad is not None
    assert count_flops(step) == first > 0


def test_residual_addition_in_place_counts():
    x, y = torch.ones(3, 5), torch.ones(3, 5)
    assert count_flops(lambda: x.add_(y)) == 15


def test_counting_computes_the_same_and_compiles_nothing():
    import torch._dynamo.utils as dynamo

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(C, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), image()
    before = {name: dict(counts) for name, counts in dynamo.counters.items()}
    outputs = []
    count_flops(lambda: outputs.append(model.eval()(x)))
    assert torch.equal(outputs[0], model(x))
    assert {name: dict(counts) for name, counts in dynamo.counters.items()} == before


MAP = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=4, extent=(6, 6))
SEQUENCE = SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(7,))
CAUSAL = SEQUENCE.model_copy(update={"causal": True})
VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=12)


@pytest.mark.parametrize(
    ("op", "params", "site"),
    [
        ("conv2d", {"kernel": 3, "groups": 2}, MAP),
        ("conv2d", {"kernel": 5}, MAP),
        ("depthwise", {"kernel": 3}, MAP),
        ("linear", {}, VECTOR),
        ("linear", {}, SEQUENCE),
        ("attention", {"heads": 2}, SEQUENCE),
        ("attention", {"heads": 2}, CAUSAL),
        ("groupnorm", {"groups": 2}, MAP),
        ("layernorm", {}, SEQUENCE),
        ("scale", {}, MAP),
        *((op, {}, MAP) for op in ("relu", "gelu", "silu", "tanh", "sigmoid", "softmax")),
    ],
)
def test_the_trainer_counts_what_the_blueprint_estimates(op, params, site):
    kind = tuple(SiteKind)
    ir = BlueprintIR(fit=kind, nodes=(Node(id="n", op=op, params=params),), output="n")
    kernel, h = lower(ir, site), torch.randn(site.shape(3))
    assert count_flops(lambda: kernel(h)) == 3 * ops.count_flops(ir, site) > 0


def test_the_blueprint_estimates_of_rms_norm_leave_out_the_rows_alone():
    ir = BlueprintIR(fit=(SiteKind.SEQUENCE,), nodes=(Node(id="n", op="rmsnorm"),), output="n")
    kernel, h = lower(ir, SEQUENCE), torch.randn(SEQUENCE.shape(3))
    rows = 3 * 7  # the epsilon and the root of each
    assert count_flops(lambda: kernel(h)) == 3 * ops.count_flops(ir, SEQUENCE) + 2 * rows


def test_step_costs_run_once_for_each_kind():
    costs, runs = StepCosts(), []
    a, b = torch.randn(3, 4), torch.randn(4, 5)

    def run():
        runs.append(1)
        return count_flops(lambda: a @ b)

    kind = {"topology_version": 1, "shapes": (3, 4), "mode": "train"}
    assert costs.known(**kind) is None
    assert costs.cost(run, **kind) == costs.cost(run, **kind) == costs.known(**kind) == 2 * 3 * 4 * 5
    assert len(runs) == 1
    costs.cost(run, **{**kind, "mode": "eval"})
    costs.cost(run, **{**kind, "shapes": (2, 4)})
    assert len(runs) == 3


def test_step_costs_forget_an_older_topology():
    costs = StepCosts()
    costs.cost(lambda: 0, topology_version=1, shapes=(), mode="train")
    costs.cost(lambda: 0, topology_version=2, shapes=(), mode="train")
    assert costs.known(topology_version=1, shapes=(), mode="train") is None
    assert costs.known(topology_version=2, shapes=(), mode="train") == 0
