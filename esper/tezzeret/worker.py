"""One turn of a compiler: claim a job, have it built, hand the kernel over. Waiting for the next is the actor's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.leyline import (
    AssetHub,
    CompiledKernelArtifact,
    CompileJob,
    EsperError,
    Fault,
    LeaseLostError,
    TransientError,
    UnavailableError,
)
from esper.tezzeret.builder import Builder, Verdict
from esper.tezzeret.compile import Unsigned, benchmark, sign
from esper.tezzeret.wire import Broken, Refused

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
    """The job has no kernel and will have none, and why; the hub knows."""

    job: CompileJob
    reason: str


@dataclass(frozen=True, slots=True)
class Returned:
    """The compiler failed, how and why; the hub lets the job be tried again."""

    job: CompileJob
    reason: str
    fault: Fault


@dataclass(frozen=True, slots=True)
class Overtaken:
    """The lease was lost meanwhile and the job is another worker's."""

    job: CompileJob


Outcome = Idle | Compiled | Rejected | Returned | Overtaken
"""How one turn ended."""


def work_once(
    hub: AssetHub,
    builder: Builder,
    *,
    worker: str,
    private_key: Ed25519PrivateKey,
    device: str = "cpu",
    lease_s: float = 60.0,
    should_end: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Claims at most one job and sees it through, renewing its lease meanwhile.

    A blueprint that is at fault is reported to the hub with the reason, and so is a compiler that failed. If this
    worker cannot go on (no hub, no compiler, or it has to end), the job is given back, or else its lease runs out.

    Args:
        hub: Urza.
        builder: who builds.
        worker: this worker's name, and life; see `AssetHub.claim`.
        private_key: the signer's.
        device: what the builder compiles for.
        lease_s: seconds of a lease; it is renewed when a third of it has passed.
        should_end: asked while the work goes on.

    Raises:
        TransientError: if the hub does not answer, the builder cannot build, or the worker should end.
    """
    fingerprint = builder.fingerprint()
    job = hub.claim(worker, fingerprint=fingerprint, device=device, lease_s=lease_s)
    if job is None:
        return Idle()
    lease = _Lease(hub, job, lease_s)

    def tick() -> None:
        if should_end():
            raise UnavailableError("the worker ends")
        lease.keep()

    try:
        verdict = builder.build(job, tick)
        if isinstance(verdict, Unsigned):
            verdict = _as_ordered(verdict, job, fingerprint)
        return _hand_over(hub, job, verdict, private_key)
    except LeaseLostError:
        _log.warning("kernel.overtaken", extra=_about(job))
        return Overtaken(job)
    except TransientError as error:
        _give_back(hub, job, Fault.NONE, error)
        raise
    except Exception as error:
        # whatever it is, it must not come again for ever
        _give_back(hub, job, Fault.ERROR, error)
        raise


def _hand_over(hub: AssetHub, job: CompileJob, verdict: Verdict, private_key: Ed25519PrivateKey) -> Outcome:
    """Tells the hub what became of a job."""
    if isinstance(verdict, Refused):
        hub.fail(job, verdict.reason, log=verdict.log)
        return _rejected(job, verdict.reason)
    if isinstance(verdict, Broken):
        if not hub.release(job, verdict.fault, verdict.reason, log=verdict.log):
            return _rejected(job, verdict.reason)
        _log.warning("kernel.returned", extra=_about(job) | {"reason": verdict.reason})
        return Returned(job, verdict.reason, verdict.fault)
    artifact, data = sign(verdict, private_key)
    stored = hub.complete(job, artifact, data)
    if verdict.timing is not None and stored.kernel_id == artifact.kernel_id:
        hub.benchmark(benchmark(stored, verdict.timing))
    _log.info("kernel.compiled", extra=_about(job) | {"kernel_id": stored.kernel_id})
    return Compiled(job, stored)


class _Lease:
    """Keeps a lease while the work goes on."""

    def __init__(self, hub: AssetHub, job: CompileJob, lease_s: float) -> None:
        self._hub, self._job, self._lease_s = hub, job, lease_s
        self._renewed = time.monotonic()

    def keep(self) -> None:
        """Renews it when it is time; raises `LeaseLostError` if it was lost."""
        if time.monotonic() - self._renewed < self._lease_s / 3:
            return
        self._renewed = time.monotonic()
        try:
            self._job = self._hub.renew(self._job, lease_s=self._lease_s)
        except LeaseLostError:
            raise
        except TransientError as error:
            # the hub may be back before the lease runs out; a result that comes late counts as well
            _log.warning("lease.not_renewed", extra=_about(self._job) | {"reason": str(error)})


def _as_ordered(built: Unsigned, job: CompileJob, fingerprint: str) -> Unsigned | Broken:
    """What was built, if it is what was ordered: a signature must vouch for nothing else."""
    manifest, blueprint = built.manifest, job.blueprint
    found = (manifest.ir, manifest.signature, manifest.pipeline, manifest.fingerprint, manifest.blueprint_id)
    if found == (blueprint.ir, job.signature, job.pipeline, fingerprint, blueprint.blueprint_id):
        return built
    return Broken(fault=Fault.ERROR, reason="the compiler built something else than was ordered")


def _give_back(hub: AssetHub, job: CompileJob, fault: Fault, why: Exception) -> None:
    try:
        hub.release(job, fault, f"the worker could not go on: {type(why).__name__}: {why}")
    except EsperError as error:
        _log.warning("lease.left", extra=_about(job) | {"reason": str(error)})


def _rejected(job: CompileJob, reason: str) -> Rejected:
    _log.warning("kernel.rejected", extra=_about(job) | {"reason": reason})
    return Rejected(job, reason)


def _about(job: CompileJob) -> dict[str, str]:
    return {"job": job.job_id, "blueprint": job.blueprint.name}
