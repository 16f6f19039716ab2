"""The allow-list of ops, as one table: arity, parameters, and the rules for shape, FLOPs and parameter count.

Shapes are per sample, without the batch, and their rank says the layout: (C,) a vector, (T, C) a sequence,
(C, H, W) a feature map. A rule raises `BlueprintError` with the reason when an op does not fit; at a causal site it
also refuses whatever lets a position see a later one. What an op *does* is `lower`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from esper.leyline import flops as cost
from esper.leyline.errors import BlueprintError
from esper.leyline.kernels import SiteKind, SiteSignature

Shape = tuple[int, ...]
Values = Mapping[str, Any]
"""An op's parameters with defaults filled in and dim expressions evaluated."""

Kind = Literal["dim", "int", "float", "bool", "choice"]


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of an op.

    Attributes:
        kind: `dim` takes an integer or a dim expression; the others take a literal.
        default: its value when omitted; None makes it required.
        low, high: inclusive bounds, of numbers.
        choices: of a `choice`.
    """

    kind: Kind
    default: int | float | bool | str | None = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Op:
    """One entry of the table.

    Attributes:
        shape: (input shapes, parameters, site) to output shape; raises `BlueprintError`.
        flops: (input shapes, output shape, parameters) to forward FLOPs of one sample.
        count: (input shapes, parameters) to the number of trainable values.
        min_inputs, max_inputs: arity.
    """

    shape: Callable[[tuple[Shape, ...], Values, SiteSignature], Shape]
    flops: Callable[[tuple[Shape, ...], Shape, Values], int]
    params: Mapping[str, ParamSpec] = field(default_factory=dict)
    count: Callable[[tuple[Shape, ...], Values], int] = lambda _inputs, _p: 0
    min_inputs: int = 1
    max_inputs: int = 1


def features_of(shape: Shape) -> int:
    """The channels of a shape: the first axis of a feature map, the last of the others."""
    return shape[0] if len(shape) == 3 else shape[-1]


_LAYOUTS = {1: "a vector", 2: "a sequence", 3: "a feature map"}


def _refuse(reason: str, remedy: str | None = None) -> BlueprintError:
    return BlueprintError(reason, remedy=remedy)


def _need_rank(shape: Shape, *ranks: int) -> None:
    if len(shape) not in ranks:
        wanted = " or ".join(_LAYOUTS[rank] for rank in ranks)
        raise _refuse(f"takes {wanted}, not {_LAYOUTS[len(shape)]} of shape {shape}")


def _need_order(site: SiteSignature, what: str) -> None:
    if site.causal:
        raise _refuse(f"{what} lets a position see later ones, and the site is causal", "use attention")


# ---------------------------------------------------------------- shapes


def _same(inputs: tuple[Shape, ...], _p: Values, _site: SiteSignature) -> Shape:
    return inputs[0]


def _equal(inputs: tuple[Shape, ...], _p: Values, _site: SiteSignature) -> Shape:
    if inputs[0] != inputs[1]:
        raise _refuse(f"takes two equal shapes, not {inputs[0]} and {inputs[1]}", "use gate to spread a vector")
    return inputs[0]


def _linear_shape(inputs: tuple[Shape, ...], p: Values, _site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 1, 2)
    return (*inputs[0][:-1], p["out"])


def _conv_shape(inputs: tuple[Shape, ...], p: Values, _site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 3)
    if p["kernel"] % 2 == 0:
        raise _refuse(f"a kernel of {p['kernel']} cannot keep the size", "use an odd kernel")
    channels, out, groups = inputs[0][0], p.get("out", inputs[0][0]), p.get("groups", 1)
    if channels % groups or out % groups:
        raise _refuse(f"{groups} groups do not divide {channels} input and {out} output channels", "use gcd(C, n)")
    return (out, *inputs[0][1:])


def _groupnorm_shape(inputs: tuple[Shape, ...], p: Values, _site: SiteSignature) -> Shape:
    shape = inputs[0]
    _need_rank(shape, 1, 3)
    if shape[0] % p["groups"]:
        raise _refuse(f"{p['groups']} groups do not divide {shape[0]} channels", "use gcd(C, n)")
    if math.prod(shape) // p["groups"] < 2:
        raise _refuse(f"a group holds one value of {shape}, which has no variance", "use fewer groups")
    return shape


def _rownorm_shape(inputs: tuple[Shape, ...], _p: Values, _site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 1, 2)
    return inputs[0]


def _softmax_shape(inputs: tuple[Shape, ...], p: Values, site: SiteSignature) -> Shape:
    if p["over"] == "positions":
        _need_rank(inputs[0], 2)
        _need_order(site, "a softmax over positions")
    return inputs[0]


def _matmul_shape(inputs: tuple[Shape, ...], p: Values, site: SiteSignature) -> Shape:
    left, right = inputs
    _need_rank(left, 2)
    _need_rank(right, 2)
    _need_order(site, "matmul")
    inner, columns = reversed(right) if p["transpose"] else right
    if left[1] != inner:
        raise _refuse(f"cannot multiply {left} by {right}{' transposed' if p['transpose'] else ''}")
    return (left[0], columns)


def _attention_shape(inputs: tuple[Shape, ...], p: Values, _site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 2)
    if p["width"] % p["heads"]:
        raise _refuse(f"{p['heads']} heads do not divide a width of {p['width']}", "use gcd(C, n) heads")
    return inputs[0]


def _pool_shape(inputs: tuple[Shape, ...], _p: Values, site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 2, 3)
    _need_order(site, "pool")
    return (features_of(inputs[0]),)


def _gate_shape(inputs: tuple[Shape, ...], _p: Values, _site: SiteSignature) -> Shape:
    _need_rank(inputs[1], 1)
    if features_of(inputs[0]) != inputs[1][0]:
        raise _refuse(f"a gate of {inputs[1][0]} values does not fit {features_of(inputs[0])} channels")
    return inputs[0]


def _broadcast_shape(inputs: tuple[Shape, ...], _p: Values, site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 1)
    extent = site.extent
    return (*extent, *inputs[0]) if site.kind is SiteKind.SEQUENCE else (*inputs[0], *extent)


def _concat_shape(inputs: tuple[Shape, ...], _p: Values, _site: SiteSignature) -> Shape:
    axis = 0 if len(inputs[0]) == 3 else -1
    rest = {(len(s), s[1:] if axis == 0 else s[:-1]) for s in inputs}
    if len(rest) > 1:
        raise _refuse(f"joins channels, and {', '.join(map(str, inputs))} differ in more than those")
    total = sum(features_of(s) for s in inputs)
    return (total, *inputs[0][1:]) if axis == 0 else (*inputs[0][:-1], total)


def _to_sequence_shape(inputs: tuple[Shape, ...], _p: Values, _site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 3)
    channels, height, width = inputs[0]
    return (height * width, channels)


def _to_map_shape(inputs: tuple[Shape, ...], _p: Values, site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 2)
    if site.kind is not SiteKind.FEATURE_MAP or math.prod(site.extent) != inputs[0][0]:
        raise _refuse(f"{inputs[0][0]} positions do not fill the site's extent {site.extent}")
    return (inputs[0][1], *site.extent)


def _flatten_shape(inputs: tuple[Shape, ...], _p: Values, site: SiteSignature) -> Shape:
    _need_order(site, "flatten")
    return (math.prod(inputs[0]),)


def _unflatten_shape(inputs: tuple[Shape, ...], _p: Values, site: SiteSignature) -> Shape:
    _need_rank(inputs[0], 1)
    target = site.shape(1)[1:]
    if math.prod(target) != inputs[0][0]:
        raise _refuse(f"{inputs[0][0]} values do not fill the site's shape {target}")
    return target


# ---------------------------------------------------------------- FLOPs and parameters


def _free(_inputs: tuple[Shape, ...], _out: Shape, _p: Values) -> int:
    return 0


def _elementwise(name: str) -> Callable[[tuple[Shape, ...], Shape, Values], int]:
    return lambda _inputs, out, _p: cost.elementwise(name, math.prod(out))


def _linear_flops(inputs: tuple[Shape, ...], _out: Shape, p: Values) -> int:
    return cost.linear(math.prod(inputs[0][:-1]), inputs[0][-1], p["out"])


def _linear_count(inputs: tuple[Shape, ...], p: Values) -> int:
    return (inputs[0][-1] + p["bias"]) * p["out"]


def _conv_flops(inputs: tuple[Shape, ...], out: Shape, p: Values) -> int:
    channels = inputs[0][0]
    return cost.conv2d(math.prod(out[1:]), channels, out[0], p["kernel"], p.get("groups", channels))


def _conv_count(inputs: tuple[Shape, ...], p: Values) -> int:
    channels = inputs[0][0]
    out, groups = p.get("out", channels), p.get("groups", channels)
    return out * (channels // groups * p["kernel"] ** 2 + p["bias"])


def _attention_flops(inputs: tuple[Shape, ...], _out: Shape, p: Values) -> int:
    length, features = inputs[0]
    projections = cost.linear(length, features, 3 * p["width"]) + cost.linear(length, p["width"], features)
    return projections + cost.attention(length, length, p["width"], p["heads"])


def _attention_count(inputs: tuple[Shape, ...], p: Values) -> int:
    features, width = inputs[0][-1], p["width"]
    return (features + p["bias"]) * 3 * width + (width + p["bias"]) * features


def _matmul_flops(inputs: tuple[Shape, ...], out: Shape, _p: Values) -> int:
    return cost.matmul(out[0], inputs[0][1], out[1])


# ---------------------------------------------------------------- the table

_BIAS = ParamSpec("bool", default=True)
_EPS = ParamSpec("float", default=1e-5, low=1e-12, high=1.0)
INITS = ("default", "zeros", "neighbour")
_INIT = ParamSpec("choice", default="default", choices=INITS)
_OUT = ParamSpec("dim", default="C", low=1)


def _activation(name: str) -> Op:
    return Op(_same, _elementwise(name))


def _binary(name: str) -> Op:
    return Op(_equal, _elementwise(name), min_inputs=2, max_inputs=2)


OPS: Mapping[str, Op] = MappingProxyType(
    {
        # layers with weights
        "linear": Op(_linear_shape, _linear_flops, {"out": _OUT, "bias": _BIAS, "init": _INIT}, _linear_count),
        "conv2d": Op(
            _conv_shape,
            _conv_flops,
            {
                "out": _OUT,
                "kernel": ParamSpec("int", default=3, low=1, high=15),
                "groups": ParamSpec("dim", default=1, low=1),
                "bias": _BIAS,
                "init": _INIT,
            },
            _conv_count,
        ),
        "depthwise": Op(
            _conv_shape,
            _conv_flops,
            {"kernel": ParamSpec("int", default=3, low=1, high=15), "bias": _BIAS, "init": _INIT},
            _conv_count,
        ),
        "attention": Op(
            _attention_shape,
            _attention_flops,
            {"width": _OUT, "heads": ParamSpec("dim", default=1, low=1), "bias": _BIAS, "init": _INIT},
            _attention_count,
        ),
        "scale": Op(
            _same,
            _elementwise("scale"),
            {"value": ParamSpec("float", default=1.0, low=-1e3, high=1e3)},
            lambda inputs, _p: features_of(inputs[0]),
        ),
        # norms: none over the batch
        "groupnorm": Op(
            _groupnorm_shape,
            lambda inputs, _out, _p: cost.norm(math.prod(inputs[0])),
            {"groups": ParamSpec("dim", default=1, low=1), "eps": _EPS},
            lambda inputs, _p: 2 * inputs[0][0],
        ),
        "layernorm": Op(
            _rownorm_shape,
            lambda inputs, _out, _p: cost.norm(math.prod(inputs[0])),
            {"eps": _EPS},
            lambda inputs, _p: 2 * inputs[0][-1],
        ),
        "rmsnorm": Op(
            _rownorm_shape,
            lambda inputs, _out, _p: cost.rmsnorm(math.prod(inputs[0])),
            {"eps": _EPS},
            lambda inputs, _p: inputs[0][-1],
        ),
        # element-wise
        **{name: _activation(name) for name in ("relu", "gelu", "silu", "tanh", "sigmoid")},
        **{name: _binary(name) for name in ("add", "sub", "mul")},
        # products and sums over axes
        "matmul": Op(
            _matmul_shape,
            _matmul_flops,
            {"transpose": ParamSpec("bool", default=False)},
            min_inputs=2,
            max_inputs=2,
        ),
        "softmax": Op(
            _softmax_shape,
            lambda _inputs, out, _p: cost.softmax(math.prod(out)),
            {"over": ParamSpec("choice", default="features", choices=("features", "positions"))},
        ),
        "pool": Op(_pool_shape, lambda inputs, _out, _p: cost.mean(math.prod(inputs[0]))),
        # vectors back to positions
        "gate": Op(_gate_shape, _elementwise("gate"), min_inputs=2, max_inputs=2),
        "broadcast": Op(_broadcast_shape, _free),
        # layout
        "concat": Op(_concat_shape, _free, min_inputs=2, max_inputs=4),
        "to_sequence": Op(_to_sequence_shape, _free),
        "to_map": Op(_to_map_shape, _free),
        "flatten": Op(_flatten_shape, _free),
        "unflatten": Op(_unflatten_shape, _free),
    }
)
"""Every op by name."""

WEIGHTED = frozenset(name for name, op in OPS.items() if "init" in op.params)
"""Ops with weights whose `init` can be chosen."""
