"""How a kernel's output enters the live path: the course of alpha, and the arithmetic at the site. Pure functions.

Alpha goes from 0 to 1 over a number of steps; the first step of a ramp already blends a little, the last is exactly 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

SIGMOID_STEEPNESS = 12.0
"""Slope of the sigmoid ramp at its middle, times 4; rescaled so that it still meets 0 and 1 at its ends."""


def linear(progress: float) -> float:
    """Alpha at `progress` in [0, 1], in even steps."""
    return progress


def cosine(progress: float) -> float:
    """Alpha at `progress` in [0, 1], flat at both ends."""
    return 0.5 - 0.5 * math.cos(math.pi * progress)


def sigmoid(progress: float) -> float:
    """Alpha at `progress` in [0, 1], flatter at both ends than the cosine and steeper between."""
    low, value, high = (1.0 / (1.0 + math.exp(-SIGMOID_STEEPNESS * (x - 0.5))) for x in (0.0, progress, 1.0))
    return (value - low) / (high - low)


RAMPS: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}
)
"""The ramps by the names of the configuration."""


def alpha_at(ramp: str, done: int, total: int) -> float:
    """Alpha after `done` of `total` steps: exactly 0.0 before the first and exactly 1.0 from the last on."""
    if done <= 0:
        return 0.0
    if done >= total:
        return 1.0
    return min(1.0, max(0.0, RAMPS[ramp](done / total)))


def blend(h: torch.Tensor, y: torch.Tensor, alpha: float, *, replaces: bool) -> torch.Tensor:
    """The site's output for its input `h` and the kernel's output `y`, both of one shape.

    Nothing is detached: upstream of the site the gradient arrives by the identity and by the kernel (a kernel that
    replaces takes the identity away only as far as alpha says so). The output has the dtype of `h`: under autocast the
    kernel's last operation may have chosen another.
    """
    y = y.to(h.dtype)
    if replaces:
        return y if alpha == 1.0 else (1.0 - alpha) * h + alpha * y
    return h + y if alpha == 1.0 else h + alpha * y
