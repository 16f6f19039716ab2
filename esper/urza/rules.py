"""What each request changes: pure functions from the catalog and a request to facts.

They refuse what the catalog's state does not allow, so that a fact, once written, always applies. No facts means
that the request was carried out before: repeating any request is harmless.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from esper.leyline import (
    Blueprint,
    BlueprintError,
    BlueprintIR,
    BlueprintStatus,
    CompiledKernelArtifact,
    CompileJob,
    ConflictError,
    Fault,
    FieldReport,
    KernelRejectedError,
    KernelStatus,
    LeaseLostError,
    Pipeline,
    SiteSignature,
    compile_key,
)
from esper.leyline.blueprints import parse_ir
from esper.leyline.canonical import canonical_hash
from esper.leyline.catalogue import BenchmarkResult
from esper.leyline.errors import excerpt
from esper.leyline.kernels import check_blueprint_transition, check_kernel_transition
from esper.leyline.ops import fits
from esper.urza import records
from esper.urza.catalog import Catalog, Target, TargetState, target_id
from esper.urza.records import EventKind, Fact

MAX_ERRORS, MAX_DEATHS = 3, 2
"""So often the compiler of one target may fail, and die or fall silent, before the target counts as failed."""

MAX_LOG = 8_192
"""Characters of a compiler's log that are kept, the last ones."""

MAX_METADATA = 16_384
"""Characters of a blueprint's metadata as JSON."""

SELF = "urza"
"""The worker's name in the record where a target was settled without one, by a kernel that exists."""


def blueprint_id(name: str, ir_hash: str) -> str:
    """The id of a design under a name: the same submission, repeated, is the same blueprint."""
    return hashlib.sha256(f"{name}\n{ir_hash}".encode()).hexdigest()[:32]


def submit(
    catalog: Catalog,
    ir: BlueprintIR,
    *,
    name: str,
    targets: Sequence[SiteSignature],
    pipelines: Sequence[Pipeline],
    tags: Sequence[str],
    priority: int,
    submitted_by: str,
    parent_id: str | None,
    metadata: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    time: float,
) -> tuple[str, list[Fact]]:
    """Registers a design and queues it where it fits and is not settled for the builds `fingerprints` (by device).

    Returns:
        The blueprint's id and the facts.

    Raises:
        BlueprintError: if the IR or a field is malformed.
        NotFoundError: if there is no such parent.
        ConflictError: if the blueprint is retired.
    """
    ir = _read_again(ir)
    ir_hash = canonical_hash(ir)
    id_ = blueprint_id(name, ir_hash)
    if parent_id is not None:
        catalog.blueprint(parent_id)
    known = {one.blueprint_id: one for one in catalog.blueprints(name=name)}
    facts = []
    if id_ not in known:
        try:
            new = Blueprint(
                blueprint_id=id_,
                name=name,
                version=len(known) + 1,
                parent_id=parent_id,
                ir=ir,
                ir_hash=ir_hash,
                tags=tuple(tags),
                priority=priority,
                metadata=_checked(metadata),
                submitted_by=submitted_by,
                created_at=time,
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise BlueprintError(f"{first['msg']}, got {excerpt(first['input'])}", field=field) from error
        facts.append(Fact(EventKind.BLUEPRINT_SUBMITTED, id_, new))
    elif known[id_].status is BlueprintStatus.RETIRED:
        raise ConflictError(f"blueprint {name} is retired", field="name", remedy="submit it under another name")
    old = {target.job_id: target for target in catalog.targets(id_)}
    for signature, pipeline in itertools.product(dict.fromkeys(targets), dict.fromkeys(pipelines)):
        job_id = target_id(id_, signature, pipeline)
        target = old.get(job_id)
        misfit = fits(ir, signature) if target is None else None
        if target is None or _is_wanted_again(target, priority, fingerprints):
            body = records.TargetNamed(
                blueprint_id=id_, signature=signature, pipeline=pipeline, priority=priority, reason=misfit or ""
            )
            facts.append(Fact(EventKind.TARGET_UNFIT if misfit else EventKind.TARGET_QUEUED, job_id, body))
    return id_, facts


def _read_again(ir: BlueprintIR) -> BlueprintIR:
    """The IR as the log will give it back: what another process pickled need not be what its class says."""
    try:
        return parse_ir(ir.model_dump_json(warnings="none"))
    except (PydanticSerializationError, AttributeError) as error:
        raise BlueprintError(f"is no IR: {str(error)[:100]}", field="ir") from error


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as they will be read back: plain JSON of a size that a catalogue can hold many of."""
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BlueprintError(f"is not plain JSON: {error}", field="metadata") from error
    if len(text) > MAX_METADATA:
        raise BlueprintError(f"has {len(text)} characters of JSON, at most {MAX_METADATA}", field="metadata")
    return json.loads(text)


def _is_wanted_again(target: Target, priority: int, fingerprints: Mapping[str, str]) -> bool:
    if target.state is TargetState.QUEUED:
        return priority > target.priority
    if target.state in {TargetState.COMPILED, TargetState.FAILED}:
        fingerprint = fingerprints.get(target.device)
        # the last of the errors ended it: what was wrong may have been the compilers' machines
        given_up = target.state is TargetState.FAILED and target.errors >= MAX_ERRORS - 1
        return given_up or (fingerprint is not None and fingerprint not in target.settled)
    return False


def claim(
    catalog: Catalog, worker: str, *, fingerprint: str, device: str, lease_s: float, time: float
) -> tuple[Target | None, list[Fact]]:
    """Leases the most urgent target that needs `device` to `worker`, or none.

    A worker holds at most one lease: one that asks again, because a reply was lost, gets what it holds. Leases that
    ran out are ended first. Targets whose kernel exists already, from the same IR, are settled without work, and those
    whose very work another worker does at this moment wait for it. Where that kernel was rejected or retired, the
    target has failed with that reason: the same work of the same build gives the same code, so to do it again would
    bring back under another id what somebody has taken out of use. Another build, or another IR, is other work.

    Returns:
        The target, as it was before the facts, and the facts.
    """
    targets = catalog.open_targets()
    leased = [target for target in targets if target.state is TargetState.LEASED]
    for target in leased:
        if (target.worker, target.fingerprint) == (worker, fingerprint) and target.deadline > time:
            return target, []
    facts = [_end_lease(target) for target in leased if _is_dead(target, worker, time)]
    ended = {fact.id for fact in facts if fact.kind is EventKind.TARGET_EXPIRED}
    lost = {fact.id for fact in facts}
    busy = {catalog.compile_key(target, target.fingerprint) for target in leased if target.job_id not in lost}
    for target in targets:
        if target.state is TargetState.LEASED and target.job_id not in ended:
            continue
        if target.device != device:
            continue
        key = catalog.compile_key(target, fingerprint)
        kernel = catalog.kernel_by_compile_key(key)
        if kernel is None and key in busy:
            continue
        if kernel is None:
            return target, [*facts, _lease(target, worker, fingerprint, time + lease_s)]
        facts += [_lease(target, SELF, fingerprint, time), _settled(catalog, target, kernel)]
    return None, facts


def _is_dead(target: Target, worker: str, time: float) -> bool:
    """Whether the holder of a lease has fallen silent, or `worker` is another life of it."""
    name = target.worker.partition("#")[0]
    return target.deadline <= time or (target.worker != worker and name == worker.partition("#")[0])


def _end_lease(target: Target) -> Fact:
    deaths = target.deaths + 1
    if deaths < MAX_DEATHS:
        return Fact(EventKind.TARGET_EXPIRED, target.job_id, records.TargetExpired(worker=target.worker))
    before = f"; before: {target.reason}" if target.reason else ""
    reason = f"given up: its worker died or hung, the {deaths}. time{before}"
    failed = records.TargetFailed(fingerprint=target.fingerprint, reason=reason)
    return Fact(EventKind.TARGET_FAILED, target.job_id, failed)


def renew(catalog: Catalog, job: CompileJob, *, lease_s: float, time: float) -> list[Fact]:
    """Moves a lease's deadline.

    Raises:
        LeaseLostError: if the lease was ended.
    """
    target = catalog.target(job.job_id)
    if not _holds(target, job):
        raise LeaseLostError(f"the lease of {target.job_id} ran out and was ended")
    return [Fact(EventKind.TARGET_RENEWED, target.job_id, records.TargetRenewed(deadline=time + lease_s))]


def release(catalog: Catalog, job: CompileJob, fault: Fault, reason: str, log: str) -> list[Fact]:
    """Queues a target again that came back without a kernel, or gives it up.

    Raises:
        LeaseLostError: if another worker has the work.
    """
    target = catalog.target(job.job_id)
    is_over = target.state is not TargetState.LEASED and target.lease == job.lease
    if is_over or not _holds(target, job):
        return []  # said before, or the lease was ended and counted
    errors, deaths = target.errors + (fault is Fault.ERROR), target.deaths + (fault is Fault.DEATH)
    log = log[-MAX_LOG:]
    if errors < MAX_ERRORS and deaths < MAX_DEATHS:
        body = records.TargetReleased(fault=fault, reason=reason, log=log)
        return [Fact(EventKind.TARGET_RELEASED, target.job_id, body)]
    words = f"given up after {target.attempts} attempts: {reason}"
    failed = records.TargetFailed(fingerprint=target.fingerprint, reason=words, log=log)
    return [Fact(EventKind.TARGET_FAILED, target.job_id, failed)]


def complete(
    catalog: Catalog, job: CompileJob, artifact: CompiledKernelArtifact, *, time: float
) -> tuple[str, list[Fact]]:
    """Settles a target with its kernel.

    Late is not lost: a worker whose lease ran out is accepted as long as no other has the work. Where the same work
    gave a kernel already, that one stands; if it was rejected or retired, the target has failed: see `claim`.

    Returns:
        The id of the kernel that stands, and the facts.

    Raises:
        LeaseLostError: if another worker has the work, or it was given up.
        ConflictError: if the artifact is not what the job asked for, or the blueprint is retired.
        KernelRejectedError: if a check of the artifact's report failed.
    """
    target = catalog.target(job.job_id)
    _check_artifact(catalog, target, artifact)
    stands = catalog.kernel_by_compile_key(artifact.compile_key)
    is_said = target.state is TargetState.FAILED and target.lease == job.lease and stands is not None
    if stands is not None and (target.state is TargetState.COMPILED or (is_said and catalog.verdict(stands))):
        return stands.kernel_id, []
    facts = [] if _holds(target, job) else [_lease(target, job.worker, artifact.fingerprint, time)]
    _check_not_retired(catalog, target)
    if stands is None:
        stands = artifact
        facts.append(Fact(EventKind.KERNEL_STORED, artifact.kernel_id, artifact))
    return stands.kernel_id, [*facts, _settled(catalog, target, stands)]


def fail(catalog: Catalog, job: CompileJob, reason: str, log: str, *, time: float) -> list[Fact]:
    """Settles a target without a kernel, for the build that tried.

    Raises:
        LeaseLostError: if another worker has the work.
    """
    target = catalog.target(job.job_id)
    if target.state is TargetState.FAILED and target.lease == job.lease:
        return []
    _check_not_retired(catalog, target)
    facts = [] if _holds(target, job) else [_lease(target, job.worker, target.fingerprint, time)]
    failed = records.TargetFailed(fingerprint=target.fingerprint, reason=reason, log=log[-MAX_LOG:])
    return [*facts, Fact(EventKind.TARGET_FAILED, target.job_id, failed)]


def retire_blueprint(catalog: Catalog, id_: str, reason: str) -> list[Fact]:
    """Takes a blueprint out of use; what is queued for it is not compiled any more.

    Raises:
        ConflictError: while it is being compiled.
    """
    blueprint = catalog.blueprint(id_)
    if blueprint.status is BlueprintStatus.RETIRED:
        return []
    check_blueprint_transition(blueprint.status, BlueprintStatus.RETIRED)
    return [Fact(EventKind.BLUEPRINT_RETIRED, id_, records.Reason(reason=reason))]


def mark_kernel(catalog: Catalog, kernel_id: str, status: KernelStatus, reason: str) -> list[Fact]:
    """Rejects or retires a kernel.

    Raises:
        ConflictError: if the status table forbids it.
    """
    kernel = catalog.kernel(kernel_id)
    if kernel.status is status:
        return []
    check_kernel_transition(kernel.status, status)
    return [Fact(EventKind.KERNEL_MARKED, kernel_id, records.KernelMarked(status=status, reason=reason))]


def register_sites(catalog: Catalog, signatures: Sequence[SiteSignature], run_id: str) -> list[Fact]:
    """Notes that a run has sites of these signatures; no facts where all of them are known."""
    known = set(catalog.signatures())
    new = tuple(dict.fromkeys(signature for signature in signatures if signature not in known))
    return [Fact(EventKind.SITES_REGISTERED, run_id, records.SitesRegistered(signatures=new))] if new else []


def report(catalog: Catalog, body: FieldReport) -> list[Fact]:
    """Counts what became of a kernel; raises `NotFoundError` for an unknown one."""
    catalog.kernel(body.kernel_id)
    return [] if catalog.has_counted(body.report_id) else [Fact(EventKind.KERNEL_REPORTED, body.report_id, body)]


def benchmark(catalog: Catalog, body: BenchmarkResult) -> list[Fact]:
    """Adds a measurement to a kernel; raises `NotFoundError` for an unknown one."""
    catalog.kernel(body.kernel_id)
    if catalog.has_counted(body.benchmark_id):
        return []
    return [Fact(EventKind.KERNEL_BENCHMARKED, body.benchmark_id, body)]


def use(counts: Mapping[str, int], time: float) -> list[Fact]:
    """Writes down how often kernels were fetched."""
    if not counts:
        return []
    return [Fact(EventKind.KERNELS_USED, f"{time:.0f}", records.KernelsUsed(counts=dict(counts)))]


def _holds(target: Target, job: CompileJob) -> bool:
    """Whether the lease is the job's; False if nobody's."""
    if target.state is TargetState.QUEUED:
        return False
    if target.state is TargetState.LEASED and (target.worker, target.lease) == (job.worker, job.lease):
        return True
    raise LeaseLostError(f"{target.job_id} is {target.state} and not leased to {job.worker} any more")


def _check_artifact(catalog: Catalog, target: Target, artifact: CompiledKernelArtifact) -> None:
    blueprint = catalog.blueprint(target.blueprint_id)
    expected = {
        "blueprint_id": blueprint.blueprint_id,
        "signature": target.signature,
        "pipeline": target.pipeline,
        "compile_key": compile_key(blueprint.ir_hash, target.signature, target.pipeline, artifact.fingerprint),
        "status": KernelStatus.VALIDATED,
    }
    for field, value in expected.items():
        if getattr(artifact, field) != value:
            raise ConflictError(f"the job asked for {value}, the artifact has {getattr(artifact, field)}", field=field)
    if not artifact.report.passed:
        raise KernelRejectedError(f"a check failed: {artifact.report.reason}", remedy="call fail with the reason")


def _check_not_retired(catalog: Catalog, target: Target) -> None:
    if catalog.blueprint(target.blueprint_id).status is BlueprintStatus.RETIRED:
        raise ConflictError(f"blueprint {target.blueprint_id} was retired meanwhile")


def _lease(target: Target, worker: str, fingerprint: str, deadline: float) -> Fact:
    body = records.TargetLeased(worker=worker, fingerprint=fingerprint, deadline=deadline)
    return Fact(EventKind.TARGET_LEASED, target.job_id, body)


def _settled(catalog: Catalog, target: Target, kernel: CompiledKernelArtifact) -> Fact:
    if verdict := catalog.verdict(kernel):
        failed = records.TargetFailed(fingerprint=kernel.fingerprint, reason=verdict)
        return Fact(EventKind.TARGET_FAILED, target.job_id, failed)
    body = records.TargetCompiled(kernel_id=kernel.kernel_id, fingerprint=kernel.fingerprint)
    return Fact(EventKind.TARGET_COMPILED, target.job_id, body)
