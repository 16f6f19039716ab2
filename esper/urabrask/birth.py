"""Birth: what the kernel does to its site before it has learned anything."""

from __future__ import annotations

import math

import torch

from esper.leyline.deviation import largest
from esper.urabrask.finding import Finding, merge, verdict
from esper.urabrask.subject import Subject, forward


def birth(subject: Subject) -> Finding:
    """`zero_at_birth` where it is declared: the output is exactly 0 with the initial parameters, however h lies in
    memory and whatever its size. The figure `birth_change` is what the site's output changes by at full blend, as a
    share of h.
    """
    outs = [(h, forward(subject.module, h)) for h in (*subject.inputs(), *_odd(subject))]
    change = largest(*(_change(h, out, replaces=subject.ir.replaces) for h, out in outs))
    if not math.isfinite(change):
        name = "zero_at_birth" if subject.ir.zero_at_birth else "birth"
        return verdict(name, False, detail="the output is not finite, by the layout or the size of h")
    figures = Finding(figures=verdict("birth", True, figures={"birth_change": change}).figures)
    if not subject.ir.zero_at_birth:
        return figures
    worst = largest(*(float(out.abs().max()) for _, out in outs))
    return merge(verdict("zero_at_birth", worst == 0.0, value=worst, limit=0.0), figures)


def _odd(subject: Subject) -> list[torch.Tensor]:
    h = subject.first_input()
    return [100.0 * h, h.movedim(0, -1).contiguous().movedim(-1, 0)]


def _change(h: torch.Tensor, out: torch.Tensor, *, replaces: bool) -> float:
    moved = (out - h if replaces else out).double()
    return float(moved.norm() / h.double().norm())
