"""One compilation: a leased job in, a signed kernel out. Knows neither the hub it comes from nor who examines it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from esper.leyline import (
    BlueprintIR,
    CompiledKernelArtifact,
    CompileJob,
    KernelRejectedError,
    Pipeline,
    SiteSignature,
    ValidationReport,
    compile_key,
)
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import KernelManifest, kernel_id_of, pack
from esper.leyline.ops import count_flops, count_parameters, memory_bytes, needs_neighbour

if TYPE_CHECKING:
    import numpy as np
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from torch import nn

Examine = Callable[["nn.Module", BlueprintIR, SiteSignature], ValidationReport]
"""Urabrask's part: a lowered module with its initial weights to a report."""


def compile_kernel(
    job: CompileJob, *, fingerprint: str, private_key: Ed25519PrivateKey, examine: Examine
) -> tuple[CompiledKernelArtifact, bytes]:
    """Lowers, initialises, examines and signs.

    The container depends on the job, the fingerprint and the key alone, so that a job done twice gives the same
    kernel id: the report inside it carries no timings.

    Returns:
        The record and the container.

    Raises:
        BlueprintError: if the IR is malformed or does not fit the signature.
        KernelRejectedError: if a check fails, or the pipeline is not FAST.
    """
    if job.pipeline is not Pipeline.FAST:
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
    module = _build(ir, signature, key)
    report = examine(module, ir, signature)
    if not report.passed:
        raise KernelRejectedError(report.reason, field=blueprint.name)
    manifest = KernelManifest(
        ir=ir,
        ir_hash=ir_hash,
        compile_key=key,
        signature=signature,
        pipeline=job.pipeline,
        fingerprint=fingerprint,
        blueprint_id=blueprint.blueprint_id,
        blueprint_name=blueprint.name,
        num_parameters=count_parameters(ir, signature),
        flops_per_sample=count_flops(ir, signature),
        memory_bytes=memory_bytes(ir, signature),
        zero_at_birth=ir.zero_at_birth,
        replaces=ir.replaces,
        needs_neighbour=needs_neighbour(ir),
        tags=blueprint.tags,
        report=report.model_copy(update={"seconds": 0.0}),
    )
    data = pack(manifest, _weights(module), private_key)
    artifact = CompiledKernelArtifact(
        kernel_id=kernel_id_of(data),
        compile_key=key,
        blueprint_id=blueprint.blueprint_id,
        blueprint_name=blueprint.name,
        signature=signature,
        pipeline=job.pipeline,
        optimization_level=manifest.optimization_level,
        fingerprint=fingerprint,
        num_parameters=manifest.num_parameters,
        flops_per_sample=manifest.flops_per_sample,
        memory_bytes=manifest.memory_bytes,
        size_bytes=len(data),
        zero_at_birth=manifest.zero_at_birth,
        replaces=manifest.replaces,
        needs_neighbour=manifest.needs_neighbour,
        tags=manifest.tags,
        report=report,
        compile_s=time.perf_counter() - started,
    )
    return artifact, data


def _build(ir: BlueprintIR, signature: SiteSignature, key: str) -> nn.Module:
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
