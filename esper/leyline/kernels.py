"""What a kernel is: the place it fits, how it was made, what is known of it. No tensors here, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

from pydantic import Field, model_validator

from esper.leyline.contract import API_VERSION, Contract, Finite, Fraction, Name, Sha256, now
from esper.leyline.errors import ConflictError


class SiteKind(StrEnum):
    """The layout of a site's tensor h; B is the batch."""

    VECTOR = "vector"  # (B, C)
    FEATURE_MAP = "feature_map"  # (B, C, H, W)
    SEQUENCE = "sequence"  # (B, T, C)


_NUM_EXTENTS = {SiteKind.VECTOR: 0, SiteKind.FEATURE_MAP: 2, SiteKind.SEQUENCE: 1}


class SiteSignature(Contract):
    """All that a kernel must know of its place.

    Attributes:
        kind: layout of the tensor.
        channels: C, the features at one position.
        extent: the positions: () for a vector, (H, W) for a feature map, (T,) for a sequence.
        dtype: torch dtype name without the prefix, such as `float32`.
        device: device target, `cpu` or `cuda`.
        causal: for a sequence, whether a position may see only itself and those before it (language models).
    """

    kind: SiteKind
    channels: Annotated[int, Field(ge=1, le=1 << 20)]
    extent: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = ()
    dtype: Annotated[str, Field(pattern=r"^(float64|float32|bfloat16|float16)$")] = "float32"
    device: Annotated[str, Field(pattern=r"^(cpu|cuda)$")] = "cpu"
    causal: bool = False

    @model_validator(mode="after")
    def _extent_fits_kind(self) -> SiteSignature:
        expected = _NUM_EXTENTS[self.kind]
        if len(self.extent) != expected:
            raise ValueError(f"extent of a {self.kind.value} has {expected} entries, not {len(self.extent)}")
        if self.causal and self.kind is not SiteKind.SEQUENCE:
            raise ValueError("causal holds for a sequence only")
        return self

    @property
    def key(self) -> str:
        """A short canonical form, such as `feature_map-16x8x8-float32-cpu` or `sequence-64x32-float32-cpu-causal`."""
        dims = "x".join(str(n) for n in (self.channels, *self.extent))
        return f"{self.kind.value}-{dims}-{self.dtype}-{self.device}" + ("-causal" if self.causal else "")

    def dims(self) -> dict[str, int]:
        """The symbols that a blueprint's dims may use: C, and H, W or T where the kind has them."""
        names = {SiteKind.VECTOR: (), SiteKind.FEATURE_MAP: ("H", "W"), SiteKind.SEQUENCE: ("T",)}[self.kind]
        return {"C": self.channels, **dict(zip(names, self.extent, strict=True))}

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape of h for a batch of `batch` samples."""
        if self.kind is SiteKind.SEQUENCE:
            return (batch, *self.extent, self.channels)
        return (batch, self.channels, *self.extent)


class Pipeline(StrEnum):
    """How a kernel is made. FAST rebuilds the module from its IR; OPTIMIZED adds native code."""

    FAST = "fast"
    OPTIMIZED = "optimized"


def device_for(signature: SiteSignature, pipeline: Pipeline) -> str:
    """The device that a compiler needs: native code is built and tried on its target, the rest is built on the CPU."""
    return signature.device if pipeline is Pipeline.OPTIMIZED else "cpu"


class KernelStatus(StrEnum):
    """State of a kernel in Urza."""

    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    RETIRED = "RETIRED"


class BlueprintStatus(StrEnum):
    """State of a blueprint in Urza. COMPILING is leased: it names a worker and a deadline."""

    UNVALIDATED = "UNVALIDATED"
    COMPILING = "COMPILING"
    VALIDATED = "VALIDATED"
    INVALID = "INVALID"
    RETIRED = "RETIRED"


BLUEPRINT_TRANSITIONS: dict[BlueprintStatus, frozenset[BlueprintStatus]] = {
    BlueprintStatus.UNVALIDATED: frozenset({BlueprintStatus.COMPILING, BlueprintStatus.RETIRED}),
    BlueprintStatus.COMPILING: frozenset(
        # back to UNVALIDATED when the lease ran out
        {BlueprintStatus.VALIDATED, BlueprintStatus.INVALID, BlueprintStatus.UNVALIDATED}
    ),
    # a new target signature sends a known blueprint through the compiler again
    BlueprintStatus.VALIDATED: frozenset({BlueprintStatus.COMPILING, BlueprintStatus.RETIRED}),
    # a target that was never tried gives a design that failed elsewhere another trial
    BlueprintStatus.INVALID: frozenset({BlueprintStatus.UNVALIDATED, BlueprintStatus.RETIRED}),
    BlueprintStatus.RETIRED: frozenset(),
}
KERNEL_TRANSITIONS: dict[KernelStatus, frozenset[KernelStatus]] = {
    KernelStatus.VALIDATED: frozenset({KernelStatus.REJECTED, KernelStatus.RETIRED}),
    KernelStatus.REJECTED: frozenset({KernelStatus.RETIRED}),
    KernelStatus.RETIRED: frozenset(),
}


def check_blueprint_transition(old: BlueprintStatus, new: BlueprintStatus) -> None:
    """Raises `ConflictError` unless the status table has the arrow."""
    if new not in BLUEPRINT_TRANSITIONS[old]:
        raise ConflictError(f"a blueprint cannot go from {old} to {new}", field="status")


def check_kernel_transition(old: KernelStatus, new: KernelStatus) -> None:
    """Raises `ConflictError` unless the status table has the arrow."""
    if new not in KERNEL_TRANSITIONS[old]:
        raise ConflictError(f"a kernel cannot go from {old} to {new}", field="status")


class Check(Contract):
    """One check of Urabrask's: what was looked at, whether it held, and the figure behind it."""

    name: Name
    passed: bool
    value: Finite | None = None
    limit: Finite | None = None
    detail: str = ""


class Latency(Contract):
    """How long something took: a figure, never a verdict, since it is another on every machine and at every hour.

    Attributes:
        name: what was timed, such as `forward`.
        median_ms, spread_ms: median and interquartile range over the repetitions.
        batch: samples in each.
    """

    name: Name
    median_ms: Annotated[Finite, Field(ge=0)]
    spread_ms: Annotated[Finite, Field(ge=0)] = 0.0
    num_repeats: Annotated[int, Field(ge=1)] = 1
    batch: Annotated[int, Field(ge=1)] = 1


class KernelTag(StrEnum):
    """Tags that only Urabrask gives, from what it found (`esper.urabrask.risk` has the thresholds).

    A blueprint that bears one of them by declaration loses it unless it was earned.
    """

    ZERO_AT_BIRTH = "zero_at_birth"
    LOW_MEMORY = "low_memory"
    HIGH_SPEED = "high_speed"
    LOW_RISK = "low_risk"
    HIGH_RISK = "high_risk"


class ValidationReport(Contract):
    """What Urabrask found. A kernel is VALIDATED only if every check passed.

    Attributes:
        figures: what was counted or computed; equal for equal kernels. Names carry units (`peak_bytes`).
        latencies: what was timed.
        risk_score: from 0 to 1, how much may go wrong with a kernel that passed (`esper.urabrask.risk`); 1 for one
            that failed; None in reports from before there were scores.
        risk_terms: what the score is made of, each from 0 to 1.
        tags: that follow from the figures.
        seconds: the examination took.
    """

    checks: tuple[Check, ...]
    figures: dict[Name, Finite] = Field(default_factory=dict)
    latencies: tuple[Latency, ...] = ()
    risk_score: Fraction | None = None
    risk_terms: dict[Name, Fraction] = Field(default_factory=dict)
    tags: tuple[KernelTag, ...] = ()
    seconds: Finite = 0.0

    def repeatable(self) -> ValidationReport:
        """Itself without anything that a clock said: equal for equal kernels, as a signed container needs it."""
        return self.model_copy(update={"latencies": (), "seconds": 0.0})

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """The failed checks in words; empty when all passed."""
        return "; ".join(f"{c.name}: {c.detail or c.value}" for c in self.checks if not c.passed)


class CompiledKernelArtifact(Contract):
    """The record of one kernel: everything but its bytes.

    Attributes:
        kernel_id: SHA-256 of the signed container; names the blob.
        compile_key: hash of (IR, signature, pipeline, fingerprint); same key, same work.
        blueprint_id, blueprint_name: the design it was made from.
        signature: the place it fits.
        pipeline, optimization_level: how it was made; level 0 is eager from IR, 1 and up native code.
        fingerprint: the build it was made by (`target_fingerprint`).
        num_parameters: trainable parameters.
        flops_per_sample: estimated forward FLOPs for one sample (a multiply-add counts 2).
        memory_bytes: parameters plus activations of one sample.
        size_bytes: size of the container.
        zero_at_birth: whether r(h) is exactly 0 with the initial parameters.
        replaces: whether the site blends `(1-a) h + a k(h)` instead of `h + a r(h)`.
        needs_neighbour: whether parameters are copied from the neighbouring block at graft.
        tags: the blueprint's and those that Urabrask gave (`merged_tags`).
        compile_s: seconds the compilation took.
        created_at: seconds since the epoch; not part of the container.
    """

    api_version: int = API_VERSION
    kernel_id: Sha256
    compile_key: Sha256
    blueprint_id: Name
    blueprint_name: Name
    signature: SiteSignature
    pipeline: Pipeline = Pipeline.FAST
    optimization_level: Annotated[int, Field(ge=0, le=3)] = 0
    fingerprint: str
    num_parameters: Annotated[int, Field(ge=0)]
    flops_per_sample: Annotated[int, Field(ge=0)]
    memory_bytes: Annotated[int, Field(ge=0)]
    size_bytes: Annotated[int, Field(ge=1)]
    zero_at_birth: bool
    replaces: bool = False
    needs_neighbour: bool = False
    tags: tuple[Name, ...] = ()
    status: KernelStatus = KernelStatus.VALIDATED
    report: ValidationReport
    compile_s: Finite = 0.0
    created_at: Finite = Field(default_factory=now)

    @property
    def runs_from(self) -> str:
        """`native`, or `ir`: a kernel by any pipeline whose native code was not kept runs as the eager module."""
        return "native" if self.optimization_level > 0 else "ir"

    @property
    def risk_score(self) -> float | None:
        """The report's, see `ValidationReport`."""
        return self.report.risk_score


def merged_tags(declared: Iterable[str], earned: Iterable[KernelTag]) -> tuple[str, ...]:
    """The tags of a kernel: its blueprint's, without any that only Urabrask gives, then those that it has given."""
    reserved = {tag.value for tag in KernelTag}
    own = [tag for tag in declared if tag not in reserved]
    return tuple(dict.fromkeys([*own, *(tag.value for tag in earned)]))


def compile_key(ir_hash: str, signature: SiteSignature, pipeline: Pipeline, fingerprint: str) -> str:
    """Hashes what determines a compilation.

    The key makes a repeated submission idempotent and seeds the kernel's initial weights.

    Returns:
        64 hexadecimal digits.
    """
    text = json.dumps([ir_hash, signature.key, pipeline.value, fingerprint], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
