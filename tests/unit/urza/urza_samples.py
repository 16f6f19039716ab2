"""Designs, sites and artifacts for the tests of Urza; the bytes stand for a container, which Urza does not open."""

from __future__ import annotations

import hashlib

from esper.leyline import (
    BlueprintIR,
    Check,
    CompiledKernelArtifact,
    CompileJob,
    FieldReport,
    Node,
    Outcome,
    SiteKind,
    SiteSignature,
    ValidationReport,
    compile_key,
)

VECTOR = SiteSignature(kind=SiteKind.VECTOR, channels=8)
WIDE = SiteSignature(kind=SiteKind.VECTOR, channels=16)
IMAGE = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=4, extent=(8, 8))
BUILD = "torch-a"
NEXT_BUILD = "torch-b"


def design(width: int = 4) -> BlueprintIR:
    """A small adapter for vectors: linear to `width`, ReLU, linear back."""
    return BlueprintIR(
        fit=(SiteKind.VECTOR,),
        nodes=(
            Node(id="down", op="linear", params={"out": width}),
            Node(id="act", op="relu", inputs=("down",)),
            Node(id="up", op="linear", inputs=("act",), params={"out": "C"}),
        ),
        output="up",
    )


def artifact_of(
    job: CompileJob, *, content: bytes = b"weights", fingerprint: str = BUILD, passed: bool = True, **fields
) -> tuple[CompiledKernelArtifact, bytes]:
    """The record and the bytes that a worker would hand over for this job."""
    key = compile_key(job.blueprint.ir_hash, job.signature, job.pipeline, fingerprint)
    container = key.encode() + content
    record = CompiledKernelArtifact(
        kernel_id=hashlib.sha256(container).hexdigest(),
        compile_key=key,
        blueprint_id=job.blueprint.blueprint_id,
        blueprint_name=job.blueprint.name,
        signature=job.signature,
        pipeline=job.pipeline,
        fingerprint=fingerprint,
        num_parameters=72,
        flops_per_sample=128,
        memory_bytes=300,
        size_bytes=len(container),
        zero_at_birth=False,
        report=ValidationReport(checks=(Check(name="shape", passed=passed),)),
    )
    return record.model_copy(update=fields), container


def compiled(hub, name: str, *, target=VECTOR, tags=(), **fields) -> CompiledKernelArtifact:
    """Takes a design of its own all the way; `fields` are of the kernel's record. Only its target may be open."""
    width = 1 + int(hashlib.sha256(name.encode()).hexdigest()[:4], 16)
    hub.submit_blueprint(design(width), name=name, targets=[target], tags=tags)
    job = hub.claim("w", fingerprint=BUILD)
    return hub.complete(job, *artifact_of(job, tags=tuple(tags), **fields))


def report_of(kernel: CompiledKernelArtifact, outcome: Outcome = Outcome.FOSSILIZED, **fields) -> FieldReport:
    """A report on this kernel."""
    return FieldReport(
        run_id="run",
        site="body",
        seed_id="body.0",
        signature=kernel.signature,
        blueprint_id=kernel.blueprint_id,
        blueprint=kernel.blueprint_name,
        kernel_id=kernel.kernel_id,
        outcome=outcome,
        **fields,
    )


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.time = 1_000.0

    def __call__(self) -> float:
        return self.time
