"""FLOPs of running a piece of PyTorch once, forward or forward and backward, by one analytic table.

torch's own counter is right for dense matrix products and convolutions, but on CPU it takes attention, norms and
LSTM as 0 and the backward of a depthwise convolution as many times too much; the table here replaces those formulas
and adds the elementwise ops. The figures of the forward are those of `esper.leyline.flops`, from which a blueprint's
estimate is made too. This module does not know who pays; that is `esper.tolaria.ledger`.

Convention, beside that of `esper.leyline.flops`
    An op that it does not list counts 1 an element, whatever the function. The backward of an activation counts what
    its forward does; that of a product, two products. Lookups, copies, comparisons, masks, reshapes and random
    numbers count 0, and so does adding to a `.grad` that exists, so that the figure does not depend on whether
    gradients were cleared. Attention counts the full square of positions, causal or not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from esper.leyline import flops as one

SOFTMAX_BACKWARD = 4  # multiply, sum, subtract, multiply
SCALING = 1  # of an attention score
AFFINE = 2
NORM_BACKWARD = 9  # x^ again (2), the sums of dy and of dy * x^ (3), dy - c1 - x^ * c2 (3), scale (1)
FOLDED, FOLDED_BACKWARD, FOLDED_PARAMETERS = 2, 1, 5  # batch norm by running statistics is one multiply-add
RMS_BACKWARD = 7
LSTM_STATE = 3 * one.ELEMENTWISE["sigmoid"] + 2 * one.ELEMENTWISE["tanh"] + 4  # c = f * c + i * g; h = o * tanh(c)

Shape = Sequence[int]

aten = torch.ops.aten


def _convolution_macs(x: Shape, w: Shape, out: Shape, *, transposed: bool) -> int:
    """Multiply-adds; `w` holds the channels of one group only, so that groups need no factor."""
    positions = x[2:] if transposed else out[2:]
    return x[0] * prod(positions) * prod(w)


def _convolution(x: Shape, w: Shape, _b: Any, _s: Any, _p: Any, _d: Any, transposed: bool, *_: Any, **kw: Any) -> int:
    return 2 * _convolution_macs(x, w, kw["out_shape"], transposed=transposed)


def _convolution_backward(grad: Shape, x: Shape, w: Shape, *rest: Any, **_: Any) -> int:
    """The gradients of input and weight each pair every multiply of the forward once; that of the bias is a sum."""
    transposed, (for_input, for_weight, for_bias) = rest[4], rest[7]
    macs = _convolution_macs(x, w, grad, transposed=transposed)
    return 2 * macs * (int(for_input) + int(for_weight)) + prod(grad) * int(for_bias)


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    pairs = prod(q[:-1]) * k[-2]  # (B, heads, queries) x keys
    return pairs * (2 * q[-1] + 2 * v[-1] + SCALING + one.SOFTMAX)


def _attention_backward(_grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    """Scores again, then the gradients of values, weights, queries and keys."""
    pairs = prod(q[:-1]) * k[-2]
    return pairs * (3 * 2 * q[-1] + 2 * 2 * v[-1] + 2 * SCALING + one.SOFTMAX + SOFTMAX_BACKWARD)


def _norm(elements: int, weight: Shape | None) -> int:
    return elements * (one.NORM if weight is not None else one.NORM - AFFINE)


def _batch_norm(x: Shape, weight: Shape | None, _b: Any, _m: Any, _v: Any, training: bool, *_: Any, **__: Any) -> int:
    return _norm(prod(x), weight) if training else FOLDED * prod(x)


def _batch_norm_backward(grad: Shape, *rest: Any, **_: Any) -> int:
    training, wanted = rest[6], rest[8]
    if training:
        return prod(grad) * NORM_BACKWARD
    return prod(grad) * (FOLDED_BACKWARD + FOLDED_PARAMETERS * int(wanted[1]))


def _cudnn_batch_norm_backward(x: Shape, *_: Any, **__: Any) -> int:
    return prod(x) * NORM_BACKWARD


def _group_norm(x: Shape, weight: Shape | None, *_: Any, **__: Any) -> int:
    return _norm(prod(x), weight)


def _layer_norm(x: Shape, _normalized: Any, weight: Shape | None, *_: Any, **__: Any) -> int:
    return _norm(prod(x), weight)


def _norm_backward(grad: Shape, *_: Any, **__: Any) -> int:
    return prod(grad) * NORM_BACKWARD


def _rms_norm(x: Shape, _normalized: Any, weight: Shape | None, *_: Any, **__: Any) -> int:
    return one.rmsnorm(prod(x)) - (0 if weight is not None else prod(x))


def _rms_norm_backward(grad: Shape, *_: Any, **__: Any) -> int:
    return prod(grad) * RMS_BACKWARD


def _lstm(x: Shape, w_input: Shape, w_hidden: Shape, *_: Any, **__: Any) -> int:
    """One layer, one direction; x is (T, B, I) or (B, T, I)."""
    hidden = w_hidden[1]
    gates = x[0] * x[1] * hidden * LSTM_STATE
    return 2 * x[0] * x[1] * (prod(w_input) + prod(w_hidden)) + gates


def _lstm_backward(x: Shape, w_input: Shape, w_hidden: Shape, *_: Any, **__: Any) -> int:
    return 2 * _lstm(x, w_input, w_hidden)


def _matrix_vector(matrix: Shape, _vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _add_matrix_vector(_c: Shape, matrix: Shape, _vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _dot(x: Shape, _y: Shape, **_: Any) -> int:
    return 2 * prod(x)


def _window(x: Shape, kernel: Sequence[int], *_: Any, **kw: Any) -> int:
    """Pooling: one operation for each element of each window."""
    out = kw["out_shape"]
    out = out if isinstance(out, torch.Size) else out[0]  # max pooling also returns indices
    kernel_size = prod(kernel) if len(kernel) > 1 else kernel[0] ** (len(x) - 2)
    return prod(out) * kernel_size


def _window_backward(grad: Shape, _x: Shape, kernel: Sequence[int], *_: Any, **__: Any) -> int:
    kernel_size = prod(kernel) if len(kernel) > 1 else kernel[0] ** (len(grad) - 2)
    return prod(grad) * kernel_size


def _per_input(factor: int) -> Callable[..., int]:
    def formula(x: Shape, *_: Any, **__: Any) -> int:
        return factor * prod(x)

    return formula


def _per_output(factor: int) -> Callable[..., int]:
    def formula(*_: Any, **kw: Any) -> int:
        out = kw["out_shape"]
        return factor * prod(out if isinstance(out, torch.Size) else out[0])

    return formula


def _in_place(x: torch.Tensor, *_: Any, **__: Any) -> int:
    """One an element, but 0 for counters, and inside a backward, where autograd adds to gradients that exist."""
    inside_backward = torch._C._current_graph_task_id() != -1  # noqa: SLF001 - torch's own counter asks this way
    return 0 if inside_backward or not x.is_floating_point() else x.numel()


_in_place._get_raw = True  # type: ignore[attr-defined]  # noqa: SLF001 - how the counter is told to hand over tensors

_ELEMENTWISE_OPS = (
    "add sub rsub mul div neg abs exp log log1p pow sqrt rsqrt reciprocal square sin cos maximum minimum clamp addcmul "
    "addcdiv lerp hardtanh hardtanh_ leaky_relu leaky_relu_ elu elu_ mish hardswish "
    "hardswish_ hardsigmoid softplus glu log_sigmoid_forward _prelu_kernel mul_ div_ sub_ "
    "hardtanh_backward leaky_relu_backward elu_backward mish_backward "
    "hardswish_backward hardsigmoid_backward softplus_backward glu_backward "
    "log_sigmoid_backward _prelu_kernel_backward max_pool2d_with_indices_backward upsample_nearest2d "
    "upsample_bilinear2d native_dropout native_dropout_backward"
)
_ACTIVATIONS = {
    **{name: name for name in ("relu", "sigmoid", "silu", "tanh", "gelu")},
    **{f"{name}_": name for name in ("relu", "sigmoid", "silu", "tanh")},
    **{f"{name}_backward": name for name in ("sigmoid", "silu", "tanh", "gelu")},
    "threshold_backward": "relu",
}
_REDUCTIONS = (
    "sum mean amax amin prod cumsum _adaptive_avg_pool2d adaptive_max_pool2d mse_loss l1_loss huber_loss "
    "smooth_l1_loss binary_cross_entropy_with_logits binary_cross_entropy upsample_nearest2d_backward "
    "upsample_bilinear2d_backward"
)

TABLE: dict[Any, Callable[..., int]] = {
    **{getattr(aten, name): _per_output(1) for name in _ELEMENTWISE_OPS.split()},
    **{getattr(aten, name): _per_output(one.ELEMENTWISE[of]) for name, of in _ACTIVATIONS.items()},
    **{getattr(aten, name): _per_input(1) for name in _REDUCTIONS.split()},
    aten.add_: _in_place,
    aten.mv: _matrix_vector,
    aten.addmv: _add_matrix_vector,
    aten.dot: _dot,
    aten.vdot: _dot,
    aten.convolution: _convolution,
    aten._convolution: _convolution,  # noqa: SLF001 - ops of torch begin with an underscore
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention: _attention,  # noqa: SLF001
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,  # noqa: SLF001
    aten._scaled_dot_product_efficient_attention: _attention,  # noqa: SLF001
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,  # noqa: SLF001
    aten._scaled_dot_product_cudnn_attention: _attention,  # noqa: SLF001
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,  # noqa: SLF001
    aten._softmax: _per_input(one.SOFTMAX),  # noqa: SLF001
    aten._safe_softmax: _per_input(one.SOFTMAX),  # noqa: SLF001
    aten._log_softmax: _per_input(one.SOFTMAX),  # noqa: SLF001
    aten._softmax_backward_data: _per_input(SOFTMAX_BACKWARD),  # noqa: SLF001
    aten._log_softmax_backward_data: _per_input(SOFTMAX_BACKWARD),  # noqa: SLF001
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit: _batch_norm,  # noqa: SLF001
    aten.cudnn_batch_norm: _batch_norm,
    aten.native_batch_norm_backward: _batch_norm_backward,
    aten.cudnn_batch_norm_backward: _cudnn_batch_norm_backward,
    aten.native_group_norm: _group_norm,
    aten.native_group_norm_backward: _norm_backward,
    aten.native_layer_norm: _layer_norm,
    aten.native_layer_norm_backward: _norm_backward,
    aten._fused_rms_norm: _rms_norm,  # noqa: SLF001
    aten._fused_rms_norm_backward: _rms_norm_backward,  # noqa: SLF001
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: _lstm_backward,
    aten.max_pool2d_with_indices: _window,
    aten.avg_pool2d: _window,
    aten.avg_pool2d_backward: _window_backward,
}
"""Formula of each aten op, called with the shapes of its arguments and `out_shape`; the rest is torch's own."""


def _with_overloads(table: dict[Any, Callable[..., int]]) -> dict[Any, Callable[..., int]]:
    """Adds each op's overloads as keys: the counter takes an op apart first unless it finds the overload itself."""
    overloads = {getattr(op, name): formula for op, formula in table.items() for name in op.overloads()}
    return {**table, **overloads}


def _by_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """The formula as the counter calls it: with what an op was given, tensors and all."""
    if getattr(formula, "_get_raw", False):
        return formula

    def of_tensors(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args, kwargs, out_shape = tree_map(_shape, (args, kwargs, out_val))
        return formula(*args, out_shape=out_shape, **kwargs)

    of_tensors._get_raw = True  # type: ignore[attr-defined]  # noqa: SLF001
    return of_tensors


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


_MAPPING = {op: _by_shapes(formula) for op, formula in _with_overloads(TABLE).items()}
"""Wrapped here, once: the counter would do it each time it is made, which takes longer than to count a kernel."""


def count_flops(run: Callable[[], Any]) -> int:
    """Runs `run` once and returns the FLOPs of all that it did, a backward within it included.

    It is a real run: buffers, gradients and the random generator change as by any other; a caller that must not
    disturb its host runs on copies under forked RNG. Nothing is compiled.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MAPPING)
    counter.mod_tracker = _Nowhere()  # pyright: ignore[reportAttributeAccessIssue]
    with counter:
        run()
    return int(counter.get_total_flops())


class _Nowhere:
    """In place of torch's `ModuleTracker`, which tells the counter in which module an op runs. That one hooks every
    module of the process: a kernel that the loader tried in its thread meanwhile met the hooks, and failed.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class StepCosts:
    """Remembers what a step costs, so that each kind of step is counted once and then only looked up.

    A kind is a topology, the shapes of the inputs and a mode (`train`, `eval`, ...). Counts of an older topology are
    dropped: a topology does not come back.
    """

    def __init__(self) -> None:
        self._topology: int | None = None
        self._costs: dict[tuple[Hashable, str], int] = {}

    def cost(self, count: Callable[[], int], *, topology_version: int, shapes: Hashable, mode: str) -> int:
        """Returns the FLOPs of one step of this kind; calls `count` only where they are not known yet."""
        if topology_version != self._topology:
            self._costs.clear()
            self._topology = topology_version
        key = (shapes, mode)
        if key not in self._costs:
            self._costs[key] = count()
        return self._costs[key]

    def known(self, *, topology_version: int, shapes: Hashable, mode: str) -> int | None:
        """Returns the count if it is known; for a caller that must prepare copies before it can count."""
        return self._costs.get((shapes, mode)) if topology_version == self._topology else None

    def state_dict(self) -> list[list[Any]]:
        """Returns the counts of the present topology as (shapes, mode, FLOPs)."""
        return [[shapes, mode, flops] for (shapes, mode), flops in self._costs.items()]

    def load_state_dict(self, state: Sequence[Sequence[Any]], *, topology_version: int) -> None:
        """Takes over counts of the same topology under the number that it has here."""
        self._topology = topology_version
        self._costs = {(shapes, mode): int(flops) for shapes, mode, flops in state}
