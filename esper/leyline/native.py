"""The native code of a kernel, as its manifest describes it: what it was built for, what it takes, how fast it is.

The code itself lies in the container's payload: one library for the forward, one for the backward, and beside each,
where it calls ops that torch has no C interface for, the JSON that tells torch how to call them. No torch here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from esper.leyline.contract import Contract, Finite, now
from esper.leyline.kernels import Check
from esper.leyline.target import Target

FASTER = 0.97
"""Native code is used where it takes at most this share of the eager module's time: the rest is measuring noise."""

FORWARD, BACKWARD = "forward", "backward"
OUTPUT, FRESH = -1, -2
"""In `NativeFacts.saved`: y, and the forward's next further output."""


class Rung(StrEnum):
    """What a kernel runs from: native code, or the module that was built from its IR."""

    NATIVE = "native"
    IR = "ir"


class RungChange(Contract):
    """What a seed's kernel runs from, from `step` on, and why. Neither its parameters nor its stage change by it.

    Attributes:
        kernel_id: of the kernel at the site; its native code may have come in another container.
        trace_id: of the adaptation.
    """

    run_id: str
    step: Annotated[int, Field(ge=0)]
    epoch: Annotated[int, Field(ge=0)]
    site: str
    seed: str
    blueprint: str | None = None
    kernel_id: str | None = None
    rung: Rung
    reason: str
    trace_id: str = ""
    timestamp: Finite = Field(default_factory=now)


class PartTiming(Contract):
    """CPU time of a part of a training step against the eager module's.

    Attributes:
        ratio, spread: median and interquartile range over pairs of blocks, native / eager.
        native_ms, eager_ms: medians of one such part.
    """

    ratio: Annotated[Finite, Field(gt=0)]
    spread: Annotated[Finite, Field(ge=0)]
    native_ms: Annotated[Finite, Field(gt=0)]
    eager_ms: Annotated[Finite, Field(gt=0)]


class Timing(Contract):
    """CPU time of a training step (forward and backward) against the eager module's, both in one process.

    Attributes:
        ratio: median over pairs of blocks, native / eager; below 1 is faster.
        spread: interquartile range of the pairs' ratios.
        num_pairs: how many pairs.
        batch: samples in a step.
        num_threads: of torch.
        native_ms, eager_ms: median process-CPU milliseconds of one step (GPU: elapsed).
        forward, backward: the same of both parts, from fewer pairs of blocks of their own; figures that decide nothing.
    """

    ratio: Annotated[Finite, Field(gt=0)]
    spread: Annotated[Finite, Field(ge=0)]
    num_pairs: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)]
    num_threads: Annotated[int, Field(ge=1)] = 1
    native_ms: Annotated[Finite, Field(gt=0)]
    eager_ms: Annotated[Finite, Field(gt=0)]
    forward: PartTiming | None = None
    backward: PartTiming | None = None

    @property
    def is_faster(self) -> bool:
        """Whether it is worth loading."""
        return self.ratio < FASTER


class NativeFacts(Contract):
    """A forward and a backward library, and how they are called.

    forward(*parameters, h) -> (y, *fresh); backward(*saved, dL/dy) -> gradients. All tensors are contiguous and of one
    dtype.

    Attributes:
        target: the machine it runs on.
        dtype: of h, parameters and y, such as `float32`; it computes in nothing else.
        parameters: state-dict keys, in the order in which they are passed.
        shape: of one sample of h.
        min_batch, max_batch: batches that the code was generated for.
        saved: where each of the backward's first inputs comes from: the index of one of the forward's inputs (h is the
            last), `OUTPUT` for y, or `FRESH` for the forward's next further output.
        gradients: which of the forward's inputs the backward's results belong to, in order; the others get none.
        keeps_input, keeps_output: whether anything saved shares memory with h, or with y.
        tolerance: largest deviation from the eager module, as a share of the largest value of the output or gradient.
        timing: None until it was measured.
    """

    target: Target
    dtype: str
    parameters: tuple[str, ...]
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    min_batch: Annotated[int, Field(ge=1)]
    max_batch: Annotated[int, Field(ge=1)]
    saved: tuple[Annotated[int, Field(ge=-2)], ...]
    gradients: tuple[Annotated[int, Field(ge=0)], ...]
    keeps_input: bool
    keeps_output: bool
    tolerance: Annotated[Finite, Field(ge=0)] = 0.0
    timing: Timing | None = None

    @property
    def is_consistent(self) -> bool:
        """Whether it takes some batch and names only inputs that there are."""
        return self.min_batch <= self.max_batch and max(*self.saved, *self.gradients, 0, 0) <= len(self.parameters)

    def member(self, which: str, suffix: str = "so") -> str:
        """The payload member of one library (`FORWARD`, `BACKWARD`), or of what lies beside it."""
        return f"payload/{self.target.name}/{which}.{suffix}"


class NativeVerdict(Contract):
    """What Urabrask found of native code.

    Attributes:
        checks: against float64, and the speed; a failed one means that the code must not be used.
        tolerance: as in `NativeFacts`.
        timing: None if it computes something else, and so was not timed.
        figures: for the report, equal for equal code: `native_saved_bytes` and `eager_saved_bytes`, which a forward
            keeps for its backward beside the parameters, at the batch that was timed.
    """

    checks: tuple[Check, ...]
    tolerance: Annotated[Finite, Field(ge=0)]
    timing: Timing | None
    figures: dict[str, Finite] = Field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why the code is not worth keeping; empty if it is."""
        failed = [_failure(check) for check in self.checks if not check.passed]
        if failed or self.timing is None:
            return "; ".join(failed) or "it was not timed"
        if not self.timing.is_faster:
            return f"it takes {self.timing.ratio:.2f} of the eager module's time"
        return ""


def _failure(check: Check) -> str:
    """A check that compares with a limit of 0, or with none, says in its own words what it found."""
    return f"{check.name} {check.value} exceeds {check.limit}" if check.limit else f"{check.name}: {check.detail}"
