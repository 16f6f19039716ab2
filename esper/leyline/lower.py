"""The meaning of an IR: a `torch.fx.GraphModule` made of plain torch, and its initial weights.

The result needs Esper neither to run nor to load: submodules are `torch.nn` modules named by node id, the rest are
calls of torch functions, so it pickles, deep-copies and exports. Weights depend on the IR's canonical form and the
seed alone, and torch's global random state is neither read nor moved.

Tensor layouts: vector (B, C), sequence (B, T, C), feature map (B, C, H, W).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own convention
from torch import fx, nn

from esper.leyline.blueprints import INPUT, BlueprintIR, Node
from esper.leyline.kernels import SiteSignature
from esper.leyline.ops import canonical_order, infer, resolve
from esper.leyline.optable import Shape, Values, features_of

QKV = "qkv"
OUT = "out"
"""The two projections of an attention node: submodules `<node>.qkv` and `<node>.out`."""


def lower(ir: BlueprintIR, signature: SiteSignature) -> fx.GraphModule:
    """Builds the module that computes r(h), or k(h) where the IR replaces, on the CPU in the signature's dtype.

    It has one placeholder, `h`, takes any batch size and the same in train and eval. Its weights are those of
    `initialise` with seed 0.

    Raises:
        BlueprintError: if the IR is malformed or does not fit.
    """
    shapes = infer(ir, signature)
    root = nn.Module()
    graph = fx.Graph()
    values: dict[str, fx.Node] = {INPUT: graph.placeholder(INPUT)}
    for node in canonical_order(ir):
        place = _Place(root, graph, node, resolve(node, signature), signature, tuple(shapes[i] for i in node.inputs))
        values[node.id] = _BUILDERS[node.op](place, [values[name] for name in node.inputs])
    graph.output(values[ir.output])
    graph.lint()
    module = fx.GraphModule(root, graph)
    initialise(module, ir, seed=0)
    return module


def seed_of(compile_key: str) -> int:
    """The seed of a kernel's initial weights: the first 63 bits of its compile key."""
    return int(compile_key[:16], 16) >> 1


def initialise(module: nn.Module, ir: BlueprintIR, seed: int) -> None:
    """Sets all weights of a lowered module in place, from a private generator.

    Linear, convolution and attention weights are uniform in +-1/sqrt(fan-in), as torch's own layers are; norms start
    as the identity, `scale` at its value. `init: zeros` zeroes a layer (of attention, the output projection), which
    consumes the same random numbers, so that no other layer changes. `init: neighbour` starts as `default`: who
    grafts copies the neighbour's weights over it.

    Args:
        module: from `lower(ir, ...)`, on any device and in any floating dtype.
        ir: what it was lowered from.
        seed: at least 0, below 2**63.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for node in canonical_order(ir):
            if node.op == "scale":
                module.get_parameter(node.id).fill_(float(node.params.get("value", 1.0)))
            elif node.op in ("groupnorm", "layernorm", "rmsnorm"):
                _reset_norm(module.get_submodule(node.id))
            elif node.op in ("linear", "conv2d", "depthwise"):
                _reset_layer(module.get_submodule(node.id), generator, zeros=node.params.get("init") == "zeros")
            elif node.op == "attention":
                zeros = node.params.get("init") == "zeros"
                _reset_layer(module.get_submodule(f"{node.id}.{QKV}"), generator, zeros=False)
                _reset_layer(module.get_submodule(f"{node.id}.{OUT}"), generator, zeros=zeros)


def _reset_layer(layer: nn.Module, generator: torch.Generator, *, zeros: bool) -> None:
    weight = layer.get_parameter("weight")
    bound = 1.0 / math.sqrt(max(1, weight[0].numel()))
    for parameter in layer.parameters(recurse=False):
        drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        if zeros:
            parameter.zero_()
        else:
            parameter.copy_(drawn)


def _reset_norm(norm: nn.Module) -> None:
    for name, parameter in norm.named_parameters(recurse=False):
        parameter.fill_(1.0 if name == "weight" else 0.0)


# ---------------------------------------------------------------- one builder an op


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node is built: its parameters are resolved, its inputs' shapes are per sample."""

    root: nn.Module
    graph: fx.Graph
    node: Node
    values: Values
    signature: SiteSignature
    shapes: tuple[Shape, ...]

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.signature.dtype)

    def call(self, function: Callable[..., object], *args: object, **kwargs: object) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)  # pyright: ignore[reportArgumentType]

    def layer(self, module: nn.Module, value: fx.Node, name: str | None = None) -> fx.Node:
        name = self.node.id if name is None else name
        owner, _, leaf = name.rpartition(".")
        self.root.get_submodule(owner).add_module(leaf, module)
        return self.graph.call_module(name, (value,))


_Builder = Callable[[_Place, list[fx.Node]], fx.Node]


def _empty(kind: type[nn.Module], place: _Place, *args: int, **kwargs: object) -> nn.Module:
    """A layer whose weights are not drawn: drawing would move torch's global generator."""
    return kind(*args, **kwargs, device="meta", dtype=place.dtype).to_empty(device="cpu")


def _linear(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    p = place.values
    return place.layer(_empty(nn.Linear, place, place.shapes[0][-1], p["out"], bias=p["bias"]), inputs[0])


def _conv(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    p, channels = place.values, place.shapes[0][0]
    conv = _empty(
        nn.Conv2d,
        place,
        channels,
        p.get("out", channels),
        p["kernel"],
        padding=p["kernel"] // 2,
        groups=p.get("groups", channels),
        bias=p["bias"],
    )
    return place.layer(conv, inputs[0])


def _attention(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    p, features, name = place.values, place.shapes[0][-1], place.node.id
    width, heads = p["width"], p["heads"]
    place.root.add_module(name, nn.ModuleDict())
    qkv = place.layer(_empty(nn.Linear, place, features, 3 * width, bias=p["bias"]), inputs[0], f"{name}.{QKV}")
    by_head = place.call(torch.unflatten, qkv, -1, (3, heads, width // heads))
    by_role = place.call(torch.permute, by_head, (2, 0, 3, 1, 4))  # (3, B, heads, T, features of a head)
    q, k, v = (place.call(operator.getitem, by_role, i) for i in range(3))
    mixed = place.call(F.scaled_dot_product_attention, q, k, v, is_causal=place.signature.causal)
    joined = place.call(torch.flatten, place.call(torch.transpose, mixed, 1, 2), -2)
    return place.layer(_empty(nn.Linear, place, width, features, bias=p["bias"]), joined, f"{name}.{OUT}")


def _scale(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    shape = place.shapes[0]
    extent = (1, 1) if len(shape) == 3 else ()
    values = torch.empty(features_of(shape), *extent, dtype=place.dtype)
    place.root.register_parameter(place.node.id, nn.Parameter(values))
    return place.call(torch.mul, inputs[0], place.graph.get_attr(place.node.id))


def _groupnorm(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    p = place.values
    return place.layer(_empty(nn.GroupNorm, place, p["groups"], place.shapes[0][0], eps=p["eps"]), inputs[0])


def _layernorm(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.layer(_empty(nn.LayerNorm, place, place.shapes[0][-1], eps=place.values["eps"]), inputs[0])


def _rmsnorm(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    """Not `nn.RMSNorm`, which warns and leaves its fast path where autocast hands it h and weight in two dtypes."""
    features, name = place.shapes[0][-1], place.node.id
    place.root.add_module(name, nn.ParameterDict({"weight": nn.Parameter(torch.ones(features, dtype=place.dtype))}))
    normed = place.call(torch.rms_norm, inputs[0], (features,), None, place.values["eps"])
    return place.call(torch.mul, normed, place.graph.get_attr(f"{name}.weight"))


def _function(function: Callable[..., object]) -> _Builder:
    return lambda place, inputs: place.call(function, *inputs)


def _matmul(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    left, right = inputs
    if place.values["transpose"]:
        right = place.call(torch.transpose, right, -2, -1)
    return place.call(torch.matmul, left, right)


def _softmax(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    over_channels_first = len(place.shapes[0]) == 3 or place.values["over"] == "positions"
    return place.call(torch.softmax, inputs[0], dim=1 if over_channels_first else -1)


def _pool(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.call(torch.mean, inputs[0], dim=(2, 3) if len(place.shapes[0]) == 3 else 1)


def _gate(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    rank = len(place.shapes[0])
    return place.call(torch.mul, inputs[0], _spread(place, inputs[1], rank))


def _broadcast(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    target = place.signature.shape(1)[1:]
    spread = _spread(place, inputs[0], len(target))
    features = place.shapes[0][0]
    extent = place.signature.extent
    shape = (-1, features, *extent) if len(target) == 3 else (-1, *extent, features)
    # a method call: fx cannot print `torch.Tensor.expand` as a function, and so could not unpickle it
    return place.graph.call_method("expand", (spread, *shape)) if extent else spread


def _spread(place: _Place, vector: fx.Node, rank: int) -> fx.Node:
    """Gives a (B, C) vector the axes it needs to broadcast over the positions of `rank`."""
    if rank == 1:
        return vector
    if rank == 2:
        return place.call(torch.unsqueeze, vector, 1)
    return place.call(torch.unflatten, vector, -1, (-1, 1, 1))


def _concat(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.call(torch.cat, inputs, dim=1 if len(place.shapes[0]) == 3 else -1)


def _to_sequence(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.call(torch.transpose, place.call(torch.flatten, inputs[0], 2), 1, 2)


def _to_map(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.call(torch.unflatten, place.call(torch.transpose, inputs[0], 1, 2), -1, place.signature.extent)


def _flatten(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.call(torch.flatten, inputs[0], 1)


def _unflatten(place: _Place, inputs: list[fx.Node]) -> fx.Node:
    return place.call(torch.unflatten, inputs[0], -1, place.signature.shape(1)[1:])


_BUILDERS: dict[str, _Builder] = {
    "linear": _linear,
    "conv2d": _conv,
    "depthwise": _conv,
    "attention": _attention,
    "scale": _scale,
    "groupnorm": _groupnorm,
    "layernorm": _layernorm,
    "rmsnorm": _rmsnorm,
    "relu": _function(torch.relu),
    "gelu": _function(F.gelu),
    "silu": _function(F.silu),
    "tanh": _function(torch.tanh),
    "sigmoid": _function(torch.sigmoid),
    "add": _function(torch.add),
    "sub": _function(torch.sub),
    "mul": _function(torch.mul),
    "matmul": _matmul,
    "softmax": _softmax,
    "pool": _pool,
    "gate": _gate,
    "broadcast": _broadcast,
    "concat": _concat,
    "to_sequence": _to_sequence,
    "to_map": _to_map,
    "flatten": _flatten,
    "unflatten": _unflatten,
}
