"""Correctness: forward and every gradient, in the kernel's dtype, against the same module in float64.

Both run with the same moved weights, over several inputs: an ordinary batch a seed, a single sample, an odd number of
samples, and an ordinary batch that is not contiguous in memory. What native code computes is checked the same way,
with `discrepancy`.

Where rounding puts one ReLU on the other side of zero, a gradient is off by one value and nobody is wrong. A mistake
is there for every input of its shape, so an input whose error is too large is drawn again, and its least error counts.
No rounding makes a NaN of a number: an error that is not finite counts at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from esper.leyline.deviation import largest
from esper.urabrask.comparing import (
    NONE,
    Discrepancy,
    compare,
    forward_tolerance,
    gradient_tolerance,
)
from esper.urabrask.finding import Finding, merge, verdict
from esper.urabrask.subject import ODD_BATCH, Pass, Subject, normal, run_pass

MAX_DRAWS = 3
_NEXT_DRAW = 1_000


@dataclass(frozen=True, slots=True)
class Draw:
    """An input to be drawn.

    Attributes:
        lay: gives the drawn values another place in memory.
    """

    batch: int
    seed: int
    lay: Callable[[torch.Tensor], torch.Tensor] = lambda h: h

    def of(self, subject: Subject, again: int = 0) -> torch.Tensor:
        """The input; `again` counts what was drawn of it before."""
        drawn = normal(subject.signature.shape(self.batch), self.seed + _NEXT_DRAW * again)
        return self.lay(drawn.to(subject.dtype))


def correctness(subject: Subject) -> Finding:
    """`correct_forward` and `correct_gradient` over contiguous inputs, `correct_strided` over the others."""
    forward_limit = forward_tolerance(subject.signature.dtype)
    gradient_limit = gradient_tolerance(subject.signature.dtype)

    def run(h: torch.Tensor) -> Pass:
        return run_pass(subject.module, h, subject.stirred)

    dense = discrepancy(subject, run, ordinary_draws(subject))
    strided = discrepancy(subject, run, strided_draws(subject))
    figures = {"error_forward": dense.forward, "error_gradient": dense.gradient}
    return merge(
        verdict(
            "correct_forward", dense.forward <= forward_limit, value=dense.forward, limit=forward_limit, figures=figures
        ),
        verdict(
            "correct_gradient",
            dense.gradient <= gradient_limit,
            value=dense.gradient,
            limit=gradient_limit,
            detail=_of(dense),
        ),
        verdict(
            "correct_strided",
            strided.forward <= forward_limit and strided.gradient <= gradient_limit,
            value=largest(strided.forward, strided.gradient),
            limit=gradient_limit,
        ),
    )


def discrepancy(subject: Subject, run: Callable[[torch.Tensor], Pass], draws: Sequence[Draw]) -> Discrepancy:
    """The largest errors of `run` over inputs, against the subject in float64 with its moved weights."""
    worst = NONE
    for draw in draws:
        worst = worst.worse(_least(subject, run, draw))
    return worst


def ordinary_draws(subject: Subject) -> list[Draw]:
    """A batch a seed, one sample, and an odd number of them."""
    first = subject.seeds[0]
    return [*(Draw(subject.batch, seed) for seed in subject.seeds), Draw(1, first), Draw(ODD_BATCH, first)]


def strided_draws(subject: Subject) -> list[Draw]:
    """The first batch as two views of other memory: every second value of a row, and with batch innermost."""
    first = subject.seeds[0]
    return [Draw(subject.batch, first, every_second), Draw(subject.batch, first, batch_innermost)]


def every_second(h: torch.Tensor) -> torch.Tensor:
    """The same values, each with another one beside it in memory."""
    return torch.stack((h, torch.zeros_like(h)), dim=-1).flatten(-2)[..., ::2]


def batch_innermost(h: torch.Tensor) -> torch.Tensor:
    """The same values, with the batch innermost in memory."""
    return h.movedim(0, -1).contiguous().movedim(-1, 0)


def _least(subject: Subject, run: Callable[[torch.Tensor], Pass], draw: Draw) -> Discrepancy:
    dtype = subject.signature.dtype
    tried: list[Discrepancy] = []
    for again in range(MAX_DRAWS):
        h = draw.of(subject, again)
        exact = run_pass(subject.exact, h.to(torch.float64).contiguous(), subject.exact_stirred)
        tried.append(compare(run(h), exact))
        if tried[-1].forward <= forward_tolerance(dtype) and tried[-1].gradient <= gradient_tolerance(dtype):
            return tried[-1]
        if not math.isfinite(tried[-1].forward) or not math.isfinite(tried[-1].gradient):
            return tried[-1]
    return min(tried, key=lambda found: (found.forward, found.gradient))


def _of(found: Discrepancy) -> str:
    return f"{found.gradient:.3g} of {found.worst}" if found.worst else ""
