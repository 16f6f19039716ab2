"""What one operation costs, in FLOPs of the forward pass. A multiply-add counts 2; a bias is the first addend.

The figures are analytic and exact for products; for the rest they are conventions, stated once here, so that the
blueprint's estimate and the trainer's ledger agree. Sizes are element counts; a batch is the caller's factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ELEMENTWISE: Mapping[str, int] = MappingProxyType(
    {
        "add": 1,
        "sub": 1,
        "mul": 1,
        "scale": 1,
        "gate": 1,
        "relu": 1,
        "sigmoid": 4,  # negate, exp, add, divide
        "silu": 5,  # sigmoid and a product
        "tanh": 6,  # two exponentials, their difference, sum and quotient, a negation
        "gelu": 8,  # the erf form: scale, erf (5), add, product
    }
)
"""FLOPs an element."""

NORM = 8
"""FLOPs an element of layer and group norm: mean (1), variance (3), normalise (2), affine (2)."""

RMSNORM = 4
"""FLOPs an element: square and sum (2), normalise (1), weight (1)."""

SOFTMAX = 5
"""FLOPs an element: maximum, subtract, exp, sum, divide."""


def elementwise(op: str, elements: int) -> int:
    """FLOPs of an element-wise op of this name; raises `KeyError` for one that is not in the table."""
    return ELEMENTWISE[op] * elements


def linear(positions: int, in_features: int, out_features: int) -> int:
    """FLOPs of a dense layer at each of `positions`."""
    return 2 * positions * in_features * out_features


def matmul(rows: int, inner: int, columns: int) -> int:
    """FLOPs of (rows, inner) @ (inner, columns)."""
    return 2 * rows * inner * columns


def conv2d(out_positions: int, in_channels: int, out_channels: int, kernel: int, groups: int = 1) -> int:
    """FLOPs of a square convolution; padding is counted as data."""
    return 2 * out_positions * out_channels * (in_channels // groups) * kernel * kernel


def norm(elements: int) -> int:
    """FLOPs of layer norm or group norm with affine parameters."""
    return NORM * elements


def rmsnorm(elements: int) -> int:
    """FLOPs of RMS norm with a weight."""
    return RMSNORM * elements


def softmax(elements: int) -> int:
    """FLOPs of a softmax over any axis."""
    return SOFTMAX * elements


def mean(elements: int) -> int:
    """FLOPs of averaging `elements` values away."""
    return elements


def attention(queries: int, keys: int, width: int, heads: int = 1) -> int:
    """FLOPs of scaled dot-product attention without its projections, `width` features over all heads.

    A causal mask does not lower the figure: whether masked blocks are skipped depends on the kernel torch picks.
    """
    scores = heads * queries * keys
    return matmul(queries, width, keys) + scores + softmax(scores) + matmul(queries, keys, width)
