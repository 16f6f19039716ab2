"""One turn of a compiler: claim a job, compile it, hand the kernel over. Waiting for the next is the actor's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.leyline import (
    AssetHub,
    BlueprintError,
    CompiledKernelArtifact,
    CompileJob,
    KernelRejectedError,
    LeaseLostError,
)
from esper.leyline.limits import DEFAULT_LIMITS, IRLimits
from esper.tezzeret.compile import Examine, compile_kernel

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Idle:
    """There was nothing to claim."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """The hub has acknowledged the kernel: it is durable."""

    job: CompileJob
    artifact: CompiledKernelArtifact


@dataclass(frozen=True, slots=True)
class Rejected:
    """The job has no kernel, and why; the hub knows."""

    job: CompileJob
    reason: str


@dataclass(frozen=True, slots=True)
class Overtaken:
    """The lease ran out meanwhile and the job is another worker's."""

    job: CompileJob


Outcome = Idle | Compiled | Rejected | Overtaken
"""How one turn ended."""


def work_once(
    hub: AssetHub,
    *,
    worker: str,
    fingerprint: str,
    private_key: Ed25519PrivateKey,
    examine: Examine,
    lease_s: float = 60.0,
    limits: IRLimits = DEFAULT_LIMITS,
) -> Outcome:
    """Claims at most one job and sees it through.

    A blueprint that is at fault is reported to the hub with the reason. Any other error (no hub, no disk) is raised
    and leaves the lease to run out, so that another worker tries.

    Args:
        hub: Urza.
        worker: this worker's name.
        fingerprint: this worker's build.
        private_key: the signer's.
        examine: Urabrask's gauntlet.
        lease_s: seconds the job may take.
        limits: what one kernel may cost.

    Raises:
        TransientError: if the hub does not answer.
    """
    job = hub.claim(worker, fingerprint=fingerprint, lease_s=lease_s)
    if job is None:
        return Idle()
    try:
        artifact, data = compile_kernel(
            job, fingerprint=fingerprint, private_key=private_key, examine=examine, limits=limits
        )
    except (BlueprintError, KernelRejectedError) as error:
        return _reject(hub, job, str(error))
    except RuntimeError as error:
        # torch's own refusal, such as no memory for the weights; the next worker would meet it too
        return _reject(hub, job, f"torch: {' '.join(str(error).split())[:300]}")
    try:
        stored = hub.complete(job, artifact, data)
    except LeaseLostError:
        _log.warning("kernel.overtaken", extra={"job": job.job_id, "blueprint": job.blueprint.name})
        return Overtaken(job)
    _log.info(
        "kernel.compiled",
        extra={"job": job.job_id, "blueprint": job.blueprint.name, "kernel_id": stored.kernel_id},
    )
    return Compiled(job, stored)


def _reject(hub: AssetHub, job: CompileJob, reason: str) -> Outcome:
    try:
        hub.fail(job, reason)
    except LeaseLostError:
        return Overtaken(job)
    _log.warning("kernel.rejected", extra={"job": job.job_id, "blueprint": job.blueprint.name, "reason": reason})
    return Rejected(job, reason)
