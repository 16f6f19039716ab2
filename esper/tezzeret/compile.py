"""One compilation: a leased job in, a kernel out, signed or not yet. Knows neither the hub it comes from nor who
examines it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esper.leyline import (
    BlueprintIR,
    Check,
    CompiledKernelArtifact,
    CompileJob,
    KernelRejectedError,
    Pipeline,
    SiteSignature,
    UnavailableError,
    ValidationReport,
    compile_key,
)
from esper.leyline.canonical import canonical_hash
from esper.leyline.catalogue import BenchmarkResult
from esper.leyline.container import KernelManifest, kernel_id_of, pack
from esper.leyline.kernels import merged_tags
from esper.leyline.limits import DEFAULT_LIMITS, IRLimits, screen
from esper.leyline.native import NativeFacts, NativeVerdict, Timing
from esper.leyline.ops import count_flops, count_parameters, memory_bytes, needs_neighbour

if TYPE_CHECKING:
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from torch import nn

    from esper.leyline.runtime import NativeKernel
    from esper.tezzeret.native import NativeCode

Examine = Callable[["nn.Module", BlueprintIR, SiteSignature], ValidationReport]
"""Urabrask's part: a lowered module with its initial weights to a report."""

ExamineNative = Callable[["nn.Module", SiteSignature, "NativeKernel"], NativeVerdict]
"""Urabrask's part too: the same module, and native code for it, to a verdict."""


@dataclass(frozen=True, slots=True)
class Unsigned:
    """A kernel that was built and examined, and that nobody has vouched for yet. It pickles: a child process may build
    it that never sees a key.

    Attributes:
        manifest: all but its `members`; the report in it carries no timings.
        weights: initial parameters by state-dict key.
        payload: native code by member name.
        report: Urabrask's, with its timings.
        compile_s: seconds the build took.
    """

    manifest: KernelManifest
    weights: Mapping[str, np.ndarray]
    payload: Mapping[str, bytes]
    report: ValidationReport
    compile_s: float

    @property
    def timing(self) -> Timing | None:
        """Of the native code that was tried, kept or not; None where there was none."""
        native = self.manifest.native
        return self.manifest.dropped if native is None else native.timing


def compile_kernel(
    job: CompileJob,
    *,
    fingerprint: str,
    private_key: Ed25519PrivateKey,
    examine: Examine,
    examine_native: ExamineNative | None = None,
    limits: IRLimits = DEFAULT_LIMITS,
) -> tuple[CompiledKernelArtifact, bytes]:
    """Lowers, initialises, examines and signs: `build`, then `sign`.

    Returns:
        The record and the container.

    Raises:
        BlueprintError: if the IR is malformed or does not fit the signature.
        KernelRejectedError: if it is above a limit, a check fails, or this compiler does not make such kernels.
    """
    built = build(job, fingerprint=fingerprint, examine=examine, examine_native=examine_native, limits=limits)
    return sign(built, private_key)


def build(
    job: CompileJob,
    *,
    fingerprint: str,
    examine: Examine,
    examine_native: ExamineNative | None = None,
    limits: IRLimits = DEFAULT_LIMITS,
) -> Unsigned:
    """Screens, lowers, initialises and examines; needs no key, and so may run where none is to be.

    By the FAST pipeline manifest and weights depend on the job and the fingerprint alone, so that a job done twice
    gives the same kernel id: the report in the manifest carries no timings. OPTIMIZED adds native code where it is
    right and measured faster; where it is not, the kernel runs from its IR (optimization level 0), and the report says
    why.

    Args:
        job: what to build.
        fingerprint: of this build.
        examine: Urabrask's gauntlet.
        examine_native: Urabrask's judgement of native code; without it only FAST kernels are made.
        limits: static ones, looked at before anything is built.

    Raises:
        BlueprintError: if the IR is malformed or does not fit the signature.
        KernelRejectedError: if it is above a limit, a check fails, or this compiler does not make such kernels.
        UnavailableError: if OPTIMIZED is asked for where nothing native can be compiled.
    """
    if job.pipeline is not Pipeline.FAST and examine_native is None:
        raise KernelRejectedError(
            f"this compiler does not make {job.pipeline.value} kernels", field="pipeline", remedy="ask for fast"
        )
    started = time.perf_counter()
    blueprint, signature = job.blueprint, job.signature
    ir = blueprint.ir
    ir_hash = canonical_hash(ir)
    if ir_hash != blueprint.ir_hash:
        raise KernelRejectedError("the blueprint's hash is not that of its IR", field="ir_hash")
    key = compile_key(ir_hash, signature, job.pipeline, fingerprint)
    screened = screen(ir, signature, limits)
    module = _initial(ir, signature, key)
    report = examine(module, ir, signature)
    report = report.model_copy(update={"checks": (*screened, *report.checks)})
    if not report.passed:
        raise KernelRejectedError(report.reason, field=blueprint.name)
    native = Native()
    if examine_native is not None and job.pipeline is Pipeline.OPTIMIZED:
        native = _native(module, signature, examine_native)
        figures = {**report.figures, **native.figures}
        report = report.model_copy(update={"checks": (*report.checks, *native.checks), "figures": figures})
    manifest = KernelManifest(
        ir=ir,
        ir_hash=ir_hash,
        compile_key=key,
        signature=signature,
        pipeline=job.pipeline,
        optimization_level=int(native.facts is not None),
        fingerprint=fingerprint,
        blueprint_id=blueprint.blueprint_id,
        blueprint_name=blueprint.name,
        num_parameters=count_parameters(ir, signature),
        flops_per_sample=count_flops(ir, signature),
        memory_bytes=memory_bytes(ir, signature),
        zero_at_birth=ir.zero_at_birth,
        replaces=ir.replaces,
        needs_neighbour=needs_neighbour(ir),
        tags=merged_tags(blueprint.tags, report.tags),
        report=report.repeatable(),
        native=native.facts,
        dropped=native.dropped,
    )
    return Unsigned(manifest, _weights(module), native.payload, report, time.perf_counter() - started)


def sign(unsigned: Unsigned, private_key: Ed25519PrivateKey) -> tuple[CompiledKernelArtifact, bytes]:
    """Packs and signs what `build` made.

    Returns:
        The record and the container.

    Raises:
        KernelRejectedError: for a name, dtype or size that a reader would refuse.
    """
    manifest = unsigned.manifest
    data = pack(manifest, unsigned.weights, private_key, payload=unsigned.payload)
    artifact = CompiledKernelArtifact(
        kernel_id=kernel_id_of(data),
        compile_key=manifest.compile_key,
        blueprint_id=manifest.blueprint_id,
        blueprint_name=manifest.blueprint_name,
        signature=manifest.signature,
        pipeline=manifest.pipeline,
        optimization_level=manifest.optimization_level,
        fingerprint=manifest.fingerprint,
        num_parameters=manifest.num_parameters,
        flops_per_sample=manifest.flops_per_sample,
        memory_bytes=manifest.memory_bytes,
        size_bytes=len(data),
        zero_at_birth=manifest.zero_at_birth,
        replaces=manifest.replaces,
        needs_neighbour=manifest.needs_neighbour,
        tags=manifest.tags,
        report=unsigned.report,
        compile_s=unsigned.compile_s,
    )
    return artifact, data


def benchmark(artifact: CompiledKernelArtifact, timing: Timing) -> BenchmarkResult:
    """The measurement for Urza. A kernel whose native code was not kept runs as the eager module: its speed is 1, and
    what the code would have made of it is among the figures.
    """
    kept = artifact.optimization_level > 0
    return BenchmarkResult(
        benchmark_id=f"train_step-{artifact.kernel_id}",
        kernel_id=artifact.kernel_id,
        name="train_step",
        speed=1.0 / timing.ratio if kept else 1.0,
        spread=timing.spread / timing.ratio**2 if kept else 0.0,
        batch=timing.batch,
        figures={
            "native_ratio": timing.ratio,
            "native_ratio_spread": timing.spread,
            "native_ms": timing.native_ms,
            "eager_ms": timing.eager_ms,
            "num_threads": timing.num_threads,
            **_parts(timing),
        },
        machine=artifact.fingerprint,
    )


def _parts(timing: Timing) -> dict[str, float]:
    """Forward and backward apart, where they were timed so."""
    return {
        f"{name}_{what}": value
        for name, part in (("forward", timing.forward), ("backward", timing.backward))
        if part is not None
        for what, value in (
            ("native_ratio", part.ratio),
            ("native_ratio_spread", part.spread),
            ("native_ms", part.native_ms),
            ("eager_ms", part.eager_ms),
        )
    }


@dataclass(frozen=True, slots=True)
class Native:
    """What came of an attempt at native code; by default, none was made.

    Attributes:
        facts, payload: of code that is kept.
        checks: for the report of the kernel, which passes them all: without code it runs from its IR.
        dropped: timing of code that was not kept.
        figures: of the code, for the report, kept or not.
    """

    facts: NativeFacts | None = None
    payload: Mapping[str, bytes] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    dropped: Timing | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


def _native(module: nn.Module, signature: SiteSignature, examine_native: ExamineNative) -> Native:
    """Compiles, examines and times native code, and keeps it if it is right and faster.

    Raises:
        UnavailableError: if it cannot be compiled here: nothing is known of the design's native code then.
    """
    from esper.tezzeret.native import compile_native

    try:
        code = compile_native(module, signature)
        kernel = _opened(code)
        verdict = examine_native(module, signature, kernel)
    except KernelRejectedError as error:
        return Native(checks=(_dropped(str(error)),))
    return settle(code, verdict)


def _opened(code: NativeCode) -> NativeKernel:
    """The libraries, loaded where they were just compiled: if that fails, it is this machine that is at fault."""
    from esper.leyline.runtime import open_native

    name = hashlib.sha256(b"".join(code.payload.values())).hexdigest()
    try:
        return open_native(name, code.facts, code.payload)
    except KernelRejectedError as error:
        raise UnavailableError(f"native code does not load where it was compiled: {error}") from error


def settle(code: NativeCode, verdict: NativeVerdict) -> Native:
    """Keeps native code if it is right and faster."""
    if verdict.reason:
        # what was found wrong is in the words: the kernel itself, which runs from its IR, has failed nothing
        told = tuple(check for check in verdict.checks if check.passed)
        return Native(checks=(*told, _dropped(verdict.reason)), dropped=verdict.timing, figures=verdict.figures)
    facts = code.facts.model_copy(update={"tolerance": verdict.tolerance, "timing": verdict.timing})
    return Native(facts, code.payload, verdict.checks, figures=verdict.figures)


def _dropped(reason: str) -> Check:
    return Check(name="native", passed=True, detail=f"no native code, it runs from its IR: {reason}")


def _initial(ir: BlueprintIR, signature: SiteSignature, key: str) -> nn.Module:
    from esper.leyline.lower import initialise, lower, seed_of

    module = lower(ir, signature)
    initialise(module, ir, seed_of(key))
    return module


def _weights(module: nn.Module) -> dict[str, np.ndarray]:
    """The state dict as numpy. Half precision has no numpy form everywhere; float32 holds it exactly."""
    import torch

    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    return {
        name: tensor.detach().to(wide.get(tensor.dtype, tensor.dtype)).numpy()
        for name, tensor in module.state_dict().items()
    }
