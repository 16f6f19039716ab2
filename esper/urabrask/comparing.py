"""How far a computation in a short dtype may be from the same one in float64, and how far one is.

Errors are norms over norms, not maxima: one wrong value among ten thousand is still an error of 1e-2, far above what
rounding does in float32, while a ReLU that falls to the other side of zero by rounding is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from esper.leyline.deviation import largest
from esper.urabrask.subject import Pass

_FORWARD = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 8e-2, "float16": 2e-2}
_GRADIENT = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.4, "float16": 0.15}

_FLOOR = 0.01
"""Share of the whole gradient's norm that is added to a parameter's own: a gradient that is zero by algebra, such as
that of a bias before a norm, is rounding noise of the rest."""


def forward_tolerance(dtype: str) -> float:
    """Room for rounding and another order of summation, not for a mistake."""
    return _FORWARD[dtype]


def gradient_tolerance(dtype: str) -> float:
    """The same for gradients. In half precision every pass has ReLUs that rounding puts on the other side of zero: one
    in a hundred is a tenth of the norm.
    """
    return _GRADIENT[dtype]


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """The largest relative errors of a pass, and of which gradient; infinite where anything was NaN."""

    forward: float
    gradient: float
    worst: str

    def worse(self, other: Discrepancy) -> Discrepancy:
        """The larger of each."""
        gradient = largest(self.gradient, other.gradient)
        worst = self.worst if largest(self.gradient) == gradient else other.worst
        return Discrepancy(largest(self.forward, other.forward), gradient, worst)


NONE = Discrepancy(0.0, 0.0, "")


def compare(found: Pass, exact: Pass) -> Discrepancy:
    """Compares a pass with the same one in float64. A gradient that only one of them has counts as an error of 1."""
    forward = relative_error(found.out, exact.out)
    whole = sum(float(g.square().sum()) for g in exact.gradients.values() if g is not None) ** 0.5
    worst, name = 0.0, ""
    for key, gradient in exact.gradients.items():
        other = found.gradients[key]
        if gradient is None or other is None:
            error = 0.0 if gradient is other else 1.0
        else:
            error = relative_error(other, gradient, _FLOOR * whole)
        if error > worst:
            worst, name = error, key
    return Discrepancy(forward, worst, name)


def relative_error(found: torch.Tensor, exact: torch.Tensor, floor: float = 0.0) -> float:
    """The norm of the difference over that of `exact` plus `floor`; 0 for two zeros, infinite where one is not
    finite.
    """
    difference = float((found.to(torch.float64) - exact).norm())
    scale = float(exact.norm()) + floor
    if not math.isfinite(difference):
        return math.inf
    return 0.0 if difference == 0.0 else largest(difference / max(scale, 1e-300))
