"""How alpha moves by one step, for each strategy that blends. Pure: from what was measured to the next course.

    ramp                along the curve, whatever happens
    grad_norm_gated     along the curve, but it holds while the kernel's gradient is far larger than usual
    drift_controlled    along the curve, but the site's output moves by a bounded share of itself at each step
    performance_linked  a quarter of the curve at a time: each validation no worse than before the graft releases the
                        next, each worse one takes one back

What was not measured moves nothing: unmeasured is not healthy. Only the first step after the graft, before which there
is nothing to measure, goes by the curve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from esper.kasmina.blending import alpha_at
from esper.leyline.signals import BlendStrategy

QUARTERS = 4
"""Parts of the curve that `performance_linked` releases one by one."""
TYPICAL_WEIGHT = 0.1
"""What one more gradient norm weighs in the running mean of all."""

MEASURED = frozenset({BlendStrategy.GRAD_NORM_GATED, BlendStrategy.DRIFT_CONTROLLED, BlendStrategy.PERFORMANCE_LINKED})
"""Strategies that may hold alpha, and so may never reach 1."""


@dataclass(frozen=True, slots=True)
class Course:
    """Where the blending of one seed stands.

    Attributes:
        alpha: in [0, 1].
        done, total: steps of the curve.
        typical: running mean of the gradient norms so far; 0 before the first.
        released: quarters of the curve that may be gone, for `performance_linked`.
    """

    alpha: float
    done: int
    total: int
    typical: float = 0.0
    released: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the configuration: `ramp`, `gate_factor` and `drift_limit` of `KasminaConfig`."""

    ramp: str = "cosine"
    gate_factor: float = 2.0
    drift_limit: float = 0.05


def move(strategy: BlendStrategy, course: Course, measured: float | None, limits: Limits) -> Course:
    """The course after one more step.

    Args:
        strategy: of the seed; `direct` has no course.
        course: before the step.
        measured: for `grad_norm_gated` the norm of the kernel's gradient at the step before, as the optimizer saw it;
            for `drift_controlled` the norm of what alpha = 1 would add to the site's output, as a share of that
            output's norm. None where it was not measured.
        limits: of the configuration.
    """
    match strategy:
        case BlendStrategy.GRAD_NORM_GATED:
            return _gated(course, measured, limits)
        case BlendStrategy.DRIFT_CONTROLLED:
            return _drift_controlled(course, measured, limits)
        case BlendStrategy.PERFORMANCE_LINKED:
            return _performance_linked(course, limits)
        case BlendStrategy.RAMP:
            return _go_to(course, course.done + 1, limits)
        case BlendStrategy.DIRECT:
            raise ValueError("a direct seed is blended in from its first step: it has no course")


def judged(released: int, val_loss: float, baseline: float) -> int:
    """Quarters released after one more validation: one more where it is no worse than before the graft, else one
    less.
    """
    return min(QUARTERS, released + 1) if val_loss <= baseline else max(0, released - 1)


def _go_to(course: Course, done: int, limits: Limits) -> Course:
    done = min(max(done, 0), course.total)
    return replace(course, done=done, alpha=alpha_at(limits.ramp, done, course.total))


def _gated(course: Course, norm: float | None, limits: Limits) -> Course:
    onward = _go_to(course, course.done + 1, limits)
    if norm is None or not math.isfinite(norm):
        return onward if norm is None and course.done == 0 else course
    if course.typical == 0.0:
        return replace(onward, typical=norm)
    ceiling = limits.gate_factor * course.typical
    # what is held back counts no more than the ceiling, but it counts: a lasting change of level opens the gate again
    typical = (1 - TYPICAL_WEIGHT) * course.typical + TYPICAL_WEIGHT * min(norm, ceiling)
    return replace(onward if norm <= ceiling else course, typical=typical)


def _drift_controlled(course: Course, reach: float | None, limits: Limits) -> Course:
    onward = _go_to(course, course.done + 1, limits)
    if reach is None or not math.isfinite(reach):
        if reach is not None or course.alpha > 0.0:
            return course
        reach = 1.0  # nothing is known before the first step: as if the kernel's output were as large as the site's
    if (onward.alpha - course.alpha) * reach <= limits.drift_limit:
        return onward
    return replace(course, alpha=course.alpha + limits.drift_limit / reach)


def _performance_linked(course: Course, limits: Limits) -> Course:
    target = -(-course.total * course.released // QUARTERS)
    step = (target > course.done) - (target < course.done)
    return _go_to(course, course.done + step, limits)
