"""Numerical stability: finite where float64 is finite, whatever comes in. NaN and infinity are no crash, and a sample
that holds one spoils no other.
"""

from __future__ import annotations

import torch

from esper.urabrask.finding import Finding, merge, verdict
from esper.urabrask.subject import Pass, Subject, forward, run_pass

LARGE = {"float64": 1e6, "float32": 1e4, "bfloat16": 1e4, "float16": 1e2}
TINY = {"float64": 1e-100, "float32": 1e-30, "bfloat16": 1e-30, "float16": 1e-6}
"""Factors of a standard normal input, by dtype."""

HEADROOM = {"float16": (1.0, 2.0, 3.0, 4.0)}
_HEADROOM_WIDE = (2.0, 4.0, 8.0, 12.0, 16.0)
"""Decades above an ordinary input that are tried, by dtype."""


def finite_forward(subject: Subject) -> Finding:
    """The output holds no NaN and no infinity, for ordinary inputs and for ones a hundred times as large."""
    largest = 0.0
    for h in subject.inputs():
        for factor in (1.0, 100.0):
            out = forward(subject.module, h * factor)
            if not bool(out.isfinite().all()):
                return verdict("finite_forward", False, detail=f"not finite at {factor:g} x normal input")
            largest = max(largest, float(out.abs().max()))
    return verdict("finite_forward", True, value=largest)


def finite_gradient(subject: Subject) -> Finding:
    """Every parameter and the input get a gradient, and it is finite."""
    for h in subject.inputs():
        found = run_pass(subject.module, h)
        for name, gradient in found.gradients.items():
            if gradient is None:
                return verdict("finite_gradient", False, detail=f"{name} gets no gradient")
            if not bool(gradient.isfinite().all()):
                return verdict("finite_gradient", False, detail=f"the gradient of {name} is not finite")
    return verdict("finite_gradient", True, value=1 + len(list(subject.module.parameters())))


def stability(subject: Subject) -> Finding:
    """`stable_large`, `_tiny`, `_zero`, `_nan` and `_inf`: outputs and gradients, with moved weights."""
    h = subject.first_input()
    poisoned = extremes(h, subject.signature.dtype)
    findings = [_compared(subject, name, one, h) for name, one in poisoned.items()]
    return merge(*findings, Finding(figures={"headroom_decades": headroom(subject)}))


def extremes(h: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    """What an ordinary h is turned into, by the name of the check."""
    return {
        "stable_large": h * LARGE[dtype],
        "stable_tiny": h * TINY[dtype],
        "stable_zero": torch.zeros_like(h),
        "stable_nan": _with_first_value(h, torch.nan),
        "stable_inf": _with_first_value(h, torch.inf),
    }


def headroom(subject: Subject) -> float:
    """Decades by which an ordinary input can be scaled up with the output still finite; 0 if the first is too many."""
    h = subject.first_input(1)
    reached = 0.0
    for decades in tried_decades(subject.signature.dtype):
        out = forward(subject.module, h * 10.0**decades, subject.stirred)
        if not bool(out.isfinite().all()):
            break
        reached = decades
    return reached


def tried_decades(dtype: str) -> tuple[float, ...]:
    """What `headroom` tries; the last is the most it can find."""
    return HEADROOM.get(dtype, _HEADROOM_WIDE)


def _with_first_value(h: torch.Tensor, value: float) -> torch.Tensor:
    """One value of one sample replaced: what becomes of the others shows whether it spreads."""
    changed = h.clone()
    changed.view(-1)[0] = value
    return changed


def _compared(subject: Subject, name: str, h: torch.Tensor, ordinary: torch.Tensor) -> Finding:
    try:
        found = run_pass(subject.module, h, subject.stirred)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return verdict(name, False, detail=f"raises: {' '.join(str(error).split())}")
    exact = run_pass(subject.exact, h.to(torch.float64), subject.exact_stirred)
    lost = _lost(found, exact, subject.dtype)
    if not bool(h[0].isfinite().all()):
        alone = forward(subject.exact, ordinary.to(torch.float64), subject.exact_stirred)
        lost["the other samples"] = int((alone[1:].isfinite() & ~found.out[1:].isfinite()).sum())
    lost = {key: count for key, count in lost.items() if count}
    words = ", ".join(f"{count} values of {key}" for key, count in lost.items())
    detail = f"not finite where float64 is: {words}" if lost else ""
    return verdict(name, not lost, value=sum(lost.values()), limit=0, detail=detail)


def _lost(found: Pass, exact: Pass, dtype: torch.dtype) -> dict[str, int]:
    """Values that are not finite though float64's are and the dtype could hold them, by output and gradient."""
    pairs = {"the output": (found.out, exact.out)} | {
        f"the gradient of {key}": (found.gradients[key], gradient) for key, gradient in exact.gradients.items()
    }
    most = torch.finfo(dtype).max
    return {
        key: int((expected.isfinite() & (expected.abs() <= most) & ~actual.isfinite()).sum())
        for key, (actual, expected) in pairs.items()
        if actual is not None and expected is not None
    }
