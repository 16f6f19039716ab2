"""Native code for benchmarks that need it, made as a worker of the pool does: in another process, which then ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.leyline import AssetHub, KernelRejectedError, Pipeline, SiteSignature
from esper.leyline.native import FASTER, NativeVerdict
from esper.leyline.runtime import NativeKernel

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from torch import nn

TIMES = 3
"""A hub lets a job be tried again after a compiler failed."""


def compile_native_kernel(hub: AssetHub, kernel_id: str, private_key: Ed25519PrivateKey) -> str:
    """Has native code compiled for the design and the site of a kernel; returns the new kernel's id.

    Args:
        hub: has the kernel, and gets the new one; it has no other work.
        kernel_id: of the kernel.
        private_key: signs the new one.

    Raises:
        KernelRejectedError: if there is no native code, and why.
    """
    from actors.tezzeret import GAUNTLET
    from esper.tezzeret.process import CompilerProcess
    from esper.tezzeret.worker import Compiled, Rejected, Returned, work_once

    kernel = hub.kernel(kernel_id)
    blueprint = hub.blueprint(kernel.blueprint_id)
    hub.submit_blueprint(
        blueprint.ir, name=blueprint.name, targets=(kernel.signature,), submitted_by="bench",
        pipelines=(Pipeline.OPTIMIZED,),
    )  # fmt: skip
    compiler = CompilerProcess(GAUNTLET, examine_native=f"{__name__}:{examine_whatever_it_gains.__name__}")
    outcome = None
    try:
        for _ in range(TIMES):
            outcome = work_once(hub, compiler, worker="bench", private_key=private_key)
            if isinstance(outcome, Compiled | Rejected):
                break
    finally:
        compiler.close()
    if isinstance(outcome, Compiled) and hub.kernel(outcome.artifact.kernel_id).pipeline is Pipeline.OPTIMIZED:
        return outcome.artifact.kernel_id
    reason = outcome.reason if isinstance(outcome, Rejected | Returned) else "see the kernel's report"
    raise KernelRejectedError(f"{blueprint.name} has no native code for {kernel.signature.key}: {reason}")


def examine_whatever_it_gains(module: nn.Module, signature: SiteSignature, kernel: NativeKernel) -> NativeVerdict:
    """Urabrask's judgement, but that code which is not faster is kept too: a benchmark of its coming and going does not
    depend on what it gains.
    """
    from esper.urabrask.native import examine_native

    verdict = examine_native(module, signature, kernel)
    if verdict.timing is None:
        return verdict
    ratio = min(verdict.timing.ratio, 0.99 * FASTER)
    return verdict.model_copy(update={"timing": verdict.timing.model_copy(update={"ratio": ratio})})
