"""Paired comparison, and how a kernel enters the live path: what both signals and trials speak of."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from esper.leyline.contract import Contract, Finite


class EvidenceKind(StrEnum):
    """How a figure was obtained, and so what it can say."""

    SHADOW = "shadow"  # paired: validation with the shadow on, minus validation of the untouched host
    HARM = "harm"  # validation against the pre-graft band; says nothing of worth
    FORK = "fork"  # paired against a run that does not grow
    NONE = "none"  # no evidence was taken (`direct`)


PAIRED = frozenset({EvidenceKind.SHADOW, EvidenceKind.FORK})
"""Kinds that compare with not growing, and so can say what growth is worth."""


class Evidence(Contract):
    """A paired comparison on validation data, in units of the task's loss.

    Attributes:
        gain: mean of (baseline loss - candidate loss) over pairs; positive is better.
        stderr: standard error of `gain`.
        baseline, candidate: mean losses of the two sides.
        num_pairs: samples (or batches, for a loss without per-sample form) that were compared.
    """

    kind: EvidenceKind
    gain: Finite = 0.0
    stderr: Annotated[Finite, Field(ge=0.0)] = 0.0
    baseline: Finite = 0.0
    candidate: Finite = 0.0
    num_pairs: Annotated[int, Field(ge=0)] = 0
    reason: str = ""


class BlendStrategy(StrEnum):
    """How a trained kernel enters the live path."""

    RAMP = "ramp"  # alpha follows a curve
    DIRECT = "direct"  # from its first step, untrained: needs a kernel that is zero at birth
    GRAD_NORM_GATED = "grad_norm_gated"  # a curve that holds while the kernel's gradient is far larger than usual
    DRIFT_CONTROLLED = "drift_controlled"  # a curve on which the site's output moves by a bounded share at each step
    PERFORMANCE_LINKED = "performance_linked"  # a curve of which each good validation releases a quarter
