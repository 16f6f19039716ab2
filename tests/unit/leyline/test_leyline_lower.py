"""What an IR means as torch: every op against its definition, and what a lowered module may be put through."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import fx, nn

from esper.leyline import BlueprintIR, Node, SiteKind, SiteSignature, ops
from esper.leyline.lower import initialise, lower, seed_of
from esper.leyline.optable import OPS

VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=6)
MAP = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=8, extent=(5, 4))
SEQUENCE = SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(6,))
CAUSAL = SEQUENCE.model_copy(update={"causal": True})


def graph(*nodes: Node) -> BlueprintIR:
    return BlueprintIR(fit=tuple(SiteKind), nodes=nodes, output=nodes[-1].id)


def one(op: str, **params) -> BlueprintIR:
    return graph(Node(id="n", op=op, params=params))


def pair(op: str, **params) -> BlueprintIR:
    """op(h, tanh h)"""
    return graph(Node(id="t", op="tanh"), Node(id="n", op=op, inputs=("h", "t"), params=params))


def attention_by_hand(module: nn.Module, h_BTC: torch.Tensor, heads: int, *, causal: bool) -> torch.Tensor:
    """Softmax attention written out, head by head. B batch, T position, C channel."""
    qkv = F.linear(h_BTC, module.get_parameter("n.qkv.weight"), module.get_parameter("n.qkv.bias"))
    q, k, v = qkv.chunk(3, dim=-1)
    mixed = []
    for q1, k1, v1 in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = q1 @ k1.transpose(1, 2) / q1.shape[-1] ** 0.5
        if causal:
            length = h_BTC.shape[1]
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ v1)
    return F.linear(torch.cat(mixed, -1), module.get_parameter("n.out.weight"), module.get_parameter("n.out.bias"))


CASES = {
    "linear": (one("linear"), SEQUENCE, lambda m, h: F.linear(h, m.n.weight, m.n.bias)),
    "conv2d": (one("conv2d", groups=2), MAP, lambda m, h: F.conv2d(h, m.n.weight, m.n.bias, padding=1, groups=2)),
    "depthwise": (
        one("depthwise", kernel=5, bias=False),
        MAP,
        lambda m, h: F.conv2d(h, m.n.weight, padding=2, groups=8),
    ),
    "attention": (one("attention", heads=2), SEQUENCE, lambda m, h: attention_by_hand(m, h, 2, causal=False)),
    "attention-causal": (one("attention", heads=4), CAUSAL, lambda m, h: attention_by_hand(m, h, 4, causal=True)),
    "scale": (one("scale", value=-2.5), SEQUENCE, lambda m, h: -2.5 * h),
    "scale-map": (one("scale", value=3.0), MAP, lambda m, h: 3.0 * h),
    "groupnorm": (one("groupnorm", groups=4, eps=1e-3), MAP, lambda m, h: F.group_norm(h, 4, eps=1e-3)),
    "layernorm": (one("layernorm"), SEQUENCE, lambda m, h: F.layer_norm(h, (8,))),
    "rmsnorm": (one("rmsnorm"), VECTOR, lambda m, h: h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()),
    **{
        name: (one(name), VECTOR, lambda m, h, f=f: f(h))
        for name, f in (("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu))
    },
    **{
        name: (one(name), VECTOR, lambda m, h, f=f: f(h))
        for name, f in (("tanh", torch.tanh), ("sigmoid", torch.sigmoid))
    },
    "add": (pair("add"), MAP, lambda m, h: h + h.tanh()),
    "sub": (pair("sub"), MAP, lambda m, h: h - h.tanh()),
    "mul": (pair("mul"), MAP, lambda m, h: h * h.tanh()),
    "matmul": (
        graph(
            Node(id="s", op="matmul", inputs=("h", "h"), params={"transpose": True}),
            Node(id="n", op="matmul", inputs=("s", "h")),
        ),
        SEQUENCE,
        lambda m, h: h @ h.mT @ h,
    ),
    "softmax": (one("softmax"), SEQUENCE, lambda m, h: h.softmax(2)),
    "softmax-map": (one("softmax"), MAP, lambda m, h: h.softmax(1)),
    "softmax-positions": (one("softmax", over="positions"), SEQUENCE, lambda m, h: h.softmax(1)),
    "pool": (
        graph(Node(id="p", op="pool"), Node(id="n", op="broadcast", inputs=("p",))),
        SEQUENCE,
        lambda m, h: h.mean(1, keepdim=True).expand_as(h),
    ),
    "broadcast": (
        graph(Node(id="p", op="pool"), Node(id="n", op="broadcast", inputs=("p",))),
        MAP,
        lambda m, h: h.mean((2, 3), keepdim=True).expand_as(h),
    ),
    "broadcast-vector": (one("broadcast"), VECTOR, lambda m, h: h),
    "gate": (
        graph(Node(id="p", op="pool"), Node(id="n", op="gate", inputs=("h", "p"))),
        MAP,
        lambda m, h: h * h.mean((2, 3), keepdim=True),
    ),
    "gate-sequence": (
        graph(Node(id="p", op="pool"), Node(id="n", op="gate", inputs=("h", "p"))),
        SEQUENCE,
        lambda m, h: h * h.mean(1, keepdim=True),
    ),
    "concat": (
        graph(
            Node(id="t", op="tanh"),
            Node(id="c", op="concat", inputs=("t", "h")),
            Node(id="n", op="conv2d", inputs=("c",), params={"kernel": 1}),
        ),
        MAP,
        lambda m, h: F.conv2d(torch.cat([h.tanh(), h], 1), m.n.weight, m.n.bias),
    ),
    "to_sequence": (
        graph(
            Node(id="s", op="to_sequence"),
            Node(id="l", op="linear", inputs=("s",)),
            Node(id="n", op="to_map", inputs=("l",)),
        ),
        MAP,
        lambda m, h: F.conv2d(h, m.l.weight[:, :, None, None], m.l.bias),
    ),
    "to_map": (
        graph(Node(id="s", op="to_sequence"), Node(id="n", op="to_map", inputs=("s",))),
        MAP,
        lambda m, h: h,
    ),
    "flatten": (
        graph(
            Node(id="f", op="flatten"),
            Node(id="l", op="linear", inputs=("f",), params={"out": "C*T"}),
            Node(id="n", op="unflatten", inputs=("l",)),
        ),
        SEQUENCE,
        lambda m, h: F.linear(h.flatten(1), m.l.weight, m.l.bias).view_as(h),
    ),
    "unflatten": (
        graph(Node(id="f", op="flatten"), Node(id="n", op="unflatten", inputs=("f",))),
        MAP,
        lambda m, h: h,
    ),
}
params = pytest.mark.parametrize(("ir", "site", "meaning"), CASES.values(), ids=CASES)


def sample(site: SiteSignature, batch: int = 3) -> torch.Tensor:
    return torch.randn(site.shape(batch), generator=torch.Generator().manual_seed(3))


def test_every_op_has_a_case():
    assert {name.partition("-")[0] for name in CASES} == set(OPS)


@params
def test_an_op_computes_its_definition(ir, site, meaning):
    module = lower(ir, site)
    initialise(module, ir, seed=5)
    for batch in (1, 3):
        h = sample(site, batch)
        torch.testing.assert_close(module(h), meaning(module, h), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in module.parameters()) == ops.count_parameters(ir, site)


@params
def test_shapes_are_as_inferred(ir, site, meaning):
    found: dict[str, tuple[int, ...]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n):
            out = super().run_node(n)
            if n.op in ("call_module", "placeholder"):
                found[str(n.target)] = tuple(out.shape[1:])
            return out

    Watch(lower(ir, site)).run(sample(site))
    inferred = ops.infer(ir, site)
    assert found["h"] == inferred["h"]
    for name in found.keys() & inferred.keys():
        assert found[name] == inferred[name]


@params
def test_it_is_plain_torch(ir, site, meaning):
    """Copies, pickles and exports, for any batch size."""
    module = lower(ir, site)
    h = sample(site)
    expected = module(h)
    assert torch.equal(copy.deepcopy(module)(h), expected)
    data = pickle.dumps(module)
    assert b"esper" not in data
    assert torch.equal(pickle.loads(data)(h), expected)
    kinds = {type(child) for child in module.modules() if child is not module}
    assert all(kind.__module__.startswith("torch.nn.") for kind in kinds)


@pytest.mark.parametrize("name", ["attention", "broadcast"])
def test_it_exports_with_a_free_batch(name: str):
    ir, site, _ = CASES[name]
    module = lower(ir, site)
    program = torch.export.export(module, (sample(site, 4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    h = sample(site, 7)
    torch.testing.assert_close(program.module()(h), module(h))


@pytest.mark.parametrize("name", CASES)
def test_it_runs_under_autocast_and_in_half_precision(name: str):
    ir, site, _ = CASES[name]
    module = lower(ir, site)
    with torch.autocast("cpu", torch.bfloat16):
        for h in (sample(site), sample(site).bfloat16()):
            out = module(h.requires_grad_())
            assert out.shape == h.shape
            out.float().sum().backward()
    half = lower(ir, site.model_copy(update={"dtype": "bfloat16"}))
    assert half(sample(site).bfloat16()).dtype is torch.bfloat16


def test_weights_depend_on_seed_alone_and_leave_the_global_generator():
    ir, site, _ = CASES["attention"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one_, other, third = (lower(ir, site) for _ in range(3))
    initialise(one_, ir, seed=9)
    torch.rand(3)
    torch.manual_seed(1)
    initialise(other, ir, seed=9)
    initialise(third, ir, seed=10)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in one_.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
        assert not torch.equal(tensor, third.state_dict()[name])


def test_weights_do_not_depend_on_names_or_listing():
    nodes = (Node(id="a", op="linear"), Node(id="b", op="linear", inputs=("a",)))
    renamed = (Node(id="zz", op="linear", inputs=("y",)), Node(id="y", op="linear"))
    first = lower(graph(*nodes), VECTOR)
    second = lower(BlueprintIR(fit=(SiteKind.VECTOR,), nodes=renamed, output="zz"), VECTOR)
    assert torch.equal(first.get_parameter("a.weight"), second.get_parameter("y.weight"))
    assert torch.equal(first.get_parameter("b.weight"), second.get_parameter("zz.weight"))
    assert not torch.equal(first.get_parameter("a.weight"), first.get_parameter("b.weight"))


def test_zeros_are_exact_and_move_no_other_layer():
    def stack(init: str) -> tuple[BlueprintIR, nn.Module]:
        ir = graph(Node(id="a", op="linear", params={"init": init}), Node(id="b", op="linear", inputs=("a",)))
        return ir, lower(ir, VECTOR)

    _, plain = stack("default")
    _, zeroed = stack("zeros")
    _, neighbour = stack("neighbour")
    assert torch.equal(zeroed.get_parameter("a.weight"), torch.zeros(6, 6))
    assert torch.equal(zeroed.get_parameter("a.bias"), torch.zeros(6))
    assert torch.equal(zeroed.get_parameter("b.weight"), plain.get_parameter("b.weight"))
    assert torch.equal(neighbour.get_parameter("a.weight"), plain.get_parameter("a.weight"))
    attention = one("attention", init="zeros")
    assert torch.equal(lower(attention, SEQUENCE)(sample(SEQUENCE)), torch.zeros(SEQUENCE.shape(3)))


@pytest.mark.parametrize("op", ["linear", "conv2d"])
def test_default_weights_are_spread_as_torchs_own(op: str):
    wide = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=64, extent=(2, 2))
    site = SiteSignature(kind=SiteKind.VECTOR, channels=200) if op == "linear" else wide
    module = lower(one(op), site)
    torch_own = nn.Linear(200, 200) if op == "linear" else nn.Conv2d(64, 64, 3)
    weight = module.get_parameter("n.weight")
    assert float(weight.detach().std()) == pytest.approx(float(torch_own.weight.detach().std()), rel=0.05)
    assert float(weight.detach().mean()) == pytest.approx(0.0, abs=1e-3)


def test_seed_of_a_key():
    assert seed_of("f" * 64) == (1 << 63) - 1
    assert seed_of("0" * 63 + "f") == 0
    torch.Generator().manual_seed(seed_of("f" * 64))


def test_reserved_ids_cover_what_a_graph_module_has():
    module = fx.GraphModule(nn.Module(), fx.Graph())
    taken = {name for name in dir(module) if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name)}
    assert taken <= ops.RESERVED


def test_a_state_dict_is_named_by_nodes():
    ir = graph(
        Node(id="mix", op="attention"),
        Node(id="amount", op="scale", inputs=("mix",)),
        Node(id="norm", op="layernorm", inputs=("amount",)),
    )
    module = lower(ir, SEQUENCE)
    assert set(module.state_dict()) == {
        "mix.qkv.weight",
        "mix.qkv.bias",
        "mix.out.weight",
        "mix.out.bias",
        "amount",
        "norm.weight",
        "norm.bias",
    }
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    assert [node.target for node in module.graph.nodes if node.op == "placeholder"] == ["h"]
