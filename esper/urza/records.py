"""What Urza writes down: the events, each a small fact with a typed body. The state is their fold (`catalog`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from esper.leyline import (
    Blueprint,
    CompiledKernelArtifact,
    Contract,
    Fault,
    FieldReport,
    KernelStatus,
    Pipeline,
    SiteSignature,
)
from esper.leyline.catalogue import BenchmarkResult
from esper.leyline.contract import Finite, Name, Sha256

SCHEMA_VERSION = 4
"""Grows when an older Urza would misread the events; then `schema.MIGRATIONS` gets an entry."""


class EventKind(StrEnum):
    """Every kind of event. `BODIES` says what it carries; the event's id names what it is about."""

    EPOCH = "epoch"
    BLUEPRINT_SUBMITTED = "blueprint.submitted"
    BLUEPRINT_RETIRED = "blueprint.retired"
    TARGET_QUEUED = "target.queued"
    TARGET_UNFIT = "target.unfit"
    TARGET_LEASED = "target.leased"
    TARGET_RENEWED = "target.renewed"
    TARGET_RELEASED = "target.released"
    TARGET_EXPIRED = "target.expired"
    TARGET_COMPILED = "target.compiled"
    TARGET_FAILED = "target.failed"
    KERNEL_STORED = "kernel.stored"
    KERNEL_MARKED = "kernel.marked"
    KERNEL_REPORTED = "kernel.reported"
    KERNEL_BENCHMARKED = "kernel.benchmarked"
    KERNELS_USED = "kernels.used"
    SITES_REGISTERED = "sites.registered"


class EpochTaken(Contract):
    """A writer took over. Events of an older epoch that come later cannot exist: their writer's commit is refused."""

    schema_version: int
    writer: str


class Reason(Contract):
    """Why, in words."""

    reason: str


class TargetNamed(Contract):
    """A blueprint is wanted for a signature. `reason` says why it does not fit, where it does not."""

    blueprint_id: Name
    signature: SiteSignature
    pipeline: Pipeline
    priority: int
    reason: str = ""


class TargetLeased(Contract):
    """A worker of a certain build has the work until `deadline` (seconds since the epoch)."""

    worker: Annotated[str, Field(min_length=1)]
    fingerprint: str
    deadline: Finite


class TargetRenewed(Contract):
    """The worker is still at it: the lease holds until `deadline`."""

    deadline: Finite


class TargetReleased(Contract):
    """The worker gave the work back without a result; it will be tried again."""

    fault: Fault
    reason: str
    log: str = ""


class TargetExpired(Contract):
    """The lease ran out, or its worker was found dead."""

    worker: str


class TargetCompiled(Contract):
    """The work is done for this build; several blueprints may share one kernel."""

    kernel_id: Sha256
    fingerprint: str


class TargetFailed(Contract):
    """The work cannot be done for this build. `log` is what the compiler wrote last."""

    fingerprint: str
    reason: str
    log: str = ""


class KernelMarked(Contract):
    """A kernel changed its status."""

    status: KernelStatus
    reason: str


class KernelsUsed(Contract):
    """How often the bytes of kernels were asked for since this was last written."""

    counts: dict[Sha256, Annotated[int, Field(ge=1)]]


class SitesRegistered(Contract):
    """A run has sites of these signatures, which no run before it had; the event's id is the run's."""

    signatures: Annotated[tuple[SiteSignature, ...], Field(min_length=1)]


BODIES: dict[EventKind, type[Contract]] = {
    EventKind.EPOCH: EpochTaken,
    EventKind.BLUEPRINT_SUBMITTED: Blueprint,
    EventKind.BLUEPRINT_RETIRED: Reason,
    EventKind.TARGET_QUEUED: TargetNamed,
    EventKind.TARGET_UNFIT: TargetNamed,
    EventKind.TARGET_LEASED: TargetLeased,
    EventKind.TARGET_RENEWED: TargetRenewed,
    EventKind.TARGET_RELEASED: TargetReleased,
    EventKind.TARGET_EXPIRED: TargetExpired,
    EventKind.TARGET_COMPILED: TargetCompiled,
    EventKind.TARGET_FAILED: TargetFailed,
    EventKind.KERNEL_STORED: CompiledKernelArtifact,
    EventKind.KERNEL_MARKED: KernelMarked,
    EventKind.KERNEL_REPORTED: FieldReport,
    EventKind.KERNEL_BENCHMARKED: BenchmarkResult,
    EventKind.KERNELS_USED: KernelsUsed,
    EventKind.SITES_REGISTERED: SitesRegistered,
}


@dataclass(frozen=True, slots=True)
class Fact:
    """An event that is not written yet: what a request would change."""

    kind: EventKind
    id: str
    body: Contract


@dataclass(frozen=True, slots=True)
class Event:
    """One record of the log.

    Attributes:
        seq: place in the log, from 1, without gaps.
        epoch: the writer's.
        time: seconds since the epoch, by the writer's clock.
        id: what the event is about.
    """

    seq: int
    epoch: int
    time: float
    kind: EventKind
    id: str
    body: Contract
