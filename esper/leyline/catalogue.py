"""What may be asked of Urza's catalogue, and the answers: queries, pages, statistics, benchmarks, maintenance."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, NamedTuple

from pydantic import Field

from esper.leyline.blueprints import Blueprint
from esper.leyline.contract import API_VERSION, Contract, Finite, Fraction, Name, Sha256, new_id, now
from esper.leyline.errors import BlueprintError
from esper.leyline.kernels import (
    BlueprintStatus,
    CompiledKernelArtifact,
    KernelStatus,
    Pipeline,
    SiteKind,
    SiteSignature,
)
from esper.leyline.signals import Outcome
from esper.leyline.track import TrackRecord

MAX_PAGE = 1000
"""Most records that one answer holds."""

Count = Annotated[int, Field(ge=0)]
PageSize = Annotated[int, Field(ge=1, le=MAX_PAGE)]


class BlueprintOrder(StrEnum):
    """What a page of blueprints is sorted by; equals stay oldest first."""

    CREATED = "created"
    NAME = "name"
    PRIORITY = "priority"


class BlueprintQuery(Contract):
    """Which blueprints; what is None or empty does not restrict.

    Attributes:
        tags_any, tags_all: at least one of, and each of these tags.
        parent_id: direct descendants of this blueprint.
        limit, offset: the page.
    """

    status: BlueprintStatus | None = None
    name: str | None = None
    tags_any: tuple[str, ...] = ()
    tags_all: tuple[str, ...] = ()
    parent_id: str | None = None
    order: BlueprintOrder = BlueprintOrder.CREATED
    descending: bool = False
    limit: PageSize = 100
    offset: Count = 0


class BlueprintPage(Contract):
    """One page, and how many blueprints there are on all pages together."""

    total: Count
    blueprints: tuple[Blueprint, ...]


class BenchmarkResult(Contract):
    """One measurement of a kernel against the eager module of the same IR, on the same machine and inputs.

    Attributes:
        benchmark_id: chosen by who measured, so that a repeated report counts once.
        name: what was run, such as `train_step`.
        speed: eager time / the kernel's time; 2 is twice as fast.
        spread: interquartile range of `speed` over the repetitions.
        batch: samples.
        figures: further results; names carry units (`forward_ms`, `peak_memory_mb`).
        machine: where.
        measured_at: seconds since the epoch.
    """

    api_version: int = API_VERSION
    benchmark_id: Name = Field(default_factory=new_id)
    kernel_id: Sha256
    name: Name
    speed: Annotated[Finite, Field(gt=0)]
    spread: Annotated[Finite, Field(ge=0)] = 0.0
    batch: Annotated[int, Field(ge=1)] = 1
    figures: dict[Name, Finite] = Field(default_factory=dict)
    machine: str = ""
    measured_at: Finite = Field(default_factory=now)


class KernelStatistics(Contract):
    """How a kernel was used, and what became of it.

    Attributes:
        num_fetches: how often its bytes were asked of Urza. Counted in batches: what a crash takes is not made up for.
        outcomes: how many adaptations ended how.
        mean_gain: mean paired gain in validation loss over the adaptations that measured one; None if none did.
        num_gains: how many did.
        seconds: training time that adaptations with it took, together.
    """

    num_fetches: Count = 0
    outcomes: dict[Outcome, Count] = Field(default_factory=dict)
    mean_gain: Finite | None = None
    num_gains: Count = 0
    seconds: Finite = 0.0

    @property
    def num_reports(self) -> int:
        """Adaptations that were reported."""
        return sum(self.outcomes.values())


class KernelEntry(Contract):
    """A kernel with all that was learned of it since it was made.

    Attributes:
        performance: `speed` of its last benchmark; without one 1.0 for a kernel that runs as the eager module
            (optimization level 0), and None, not known, for native code.
        aliases: names of other blueprints of the same IR that share it; it is found by their tags as well.
        reason: why it was rejected or retired.
        benchmarks: the last few, oldest first.
    """

    kernel: CompiledKernelArtifact
    performance: Finite | None
    statistics: KernelStatistics
    benchmarks: tuple[BenchmarkResult, ...] = ()
    aliases: tuple[Name, ...] = ()
    reason: str = ""


class KernelBrief(NamedTuple):
    """What one chooses a kernel by. A thousand of these travel in the time of a hundred whole records.

    There is one of each kernel, however many blueprints of the same IR share it: so a kernel is counted once, and
    chosen as often as any other. `blueprint` is the one it was made from, as its signed container says; that name is
    what a seed shows, and what failures and embargoes are kept by, so a design cannot escape them under another name.
    `aliases` are the other blueprints' names, by which it may be asked for; `tags` are of all of them. `record` is what
    kernels of its `blueprint` came to at sites of its kind, of any size; None where nothing was reported.
    """

    kernel_id: str
    blueprint_id: str
    blueprint: str
    pipeline: Pipeline
    num_parameters: int
    flops_per_sample: int
    zero_at_birth: bool
    needs_neighbour: bool
    tags: tuple[str, ...]
    risk: float | None
    aliases: tuple[str, ...] = ()
    record: TrackRecord | None = None

    @classmethod
    def of(cls, kernel: CompiledKernelArtifact) -> KernelBrief:
        """The brief of a record."""
        return cls(
            kernel.kernel_id,
            kernel.blueprint_id,
            kernel.blueprint_name,
            kernel.pipeline,
            kernel.num_parameters,
            kernel.flops_per_sample,
            kernel.zero_at_birth,
            kernel.needs_neighbour,
            kernel.tags,
            kernel.risk_score,
        )


class KernelOrder(StrEnum):
    """What a page of kernels is sorted by; equals stay oldest first, and what is not known comes last."""

    CREATED = "created"
    PERFORMANCE = "performance"
    GAIN = "gain"
    FETCHES = "fetches"
    PARAMETERS = "parameters"
    FLOPS = "flops"
    MEMORY = "memory"
    SIZE = "size"
    RISK = "risk"


class KernelQuery(Contract):
    """Which kernels; what is None or empty does not restrict.

    Attributes:
        status: VALIDATED by default.
        tags_any, tags_all: at least one of, and each of these tags.
        min_performance: at least so fast (`KernelEntry.performance`); what was not measured is left out.
        max_risk: at most so risky (`ValidationReport.risk_score`); what has no score is left out.
        limit, offset: the page.
    """

    signature: SiteSignature | None = None
    blueprint_id: str | None = None
    status: KernelStatus | None = KernelStatus.VALIDATED
    pipeline: Pipeline | None = None
    tags_any: tuple[str, ...] = ()
    tags_all: tuple[str, ...] = ()
    min_performance: Finite | None = None
    max_risk: Fraction | None = None
    order: KernelOrder = KernelOrder.CREATED
    descending: bool = False
    limit: PageSize = 100
    offset: Count = 0


class KernelPage(Contract):
    """One page, and how many kernels there are on all pages together."""

    total: Count
    kernels: tuple[KernelEntry, ...]


class Outlook(Contract):
    """What a blueprint still waits for.

    Attributes:
        num_open: its targets that are queued or being compiled.
        queue_position: how many targets of anyone are to be compiled before its last one is done, itself included;
            0 if it waits for nothing.
        estimated_s: seconds until then, from the compile times so far; before the first of a pipeline from a guess.
    """

    num_open: Count
    queue_position: Count
    estimated_s: Finite


class Backlog(Contract):
    """What is to be compiled, by the device that it needs (`leyline.device_for`); devices without work are left out.

    Attributes:
        queued: jobs that wait for a worker.
        leased: jobs that a worker has, those of workers that died lately among them.
        work_s: seconds that one worker would take for all of them, from the compile times so far.
    """

    queued: dict[str, Count] = Field(default_factory=dict)
    leased: dict[str, Count] = Field(default_factory=dict)
    work_s: dict[str, Finite] = Field(default_factory=dict)

    def open(self, device: str) -> int:
        """Both together."""
        return self.queued.get(device, 0) + self.leased.get(device, 0)


class Ids(Contract):
    """Ids that begin alike."""

    blueprints: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


class Census(Contract):
    """How much a catalogue holds and what waits in it.

    Attributes:
        num_kernels: VALIDATED ones.
        num_signatures: site signatures that runs have registered.
        num_queued, num_compiling: targets that wait for a compiler, and that one has leased.
        unmaintained: why the last round of maintenance failed; empty where it did not, and where none runs.
    """

    num_blueprints: Count
    num_kernels: Count
    num_signatures: Count
    num_queued: Count
    num_compiling: Count
    unmaintained: str = ""


class MaintenanceReport(Contract):
    """What one round of maintenance did.

    Attributes:
        schema_version: of the log's events.
        num_events: in the log.
        files_before, files_after: data files that the log's table reads.
        files_removed: replaced files older than the retention, of all tables.
        blobs_kept, blobs_set_aside, blobs_removed, bytes_removed: of the blob store; blobs that an event names are
            always kept, and one that was set aside is removed by a later round, unless it is wanted by then.
        uses_written: fetches that were counted since the last round.
        problems: what could not be done, in words; nothing is lost by it.
    """

    schema_version: int
    num_events: Count
    files_before: Count = 0
    files_after: Count = 0
    files_removed: Count = 0
    blobs_kept: Count = 0
    blobs_set_aside: Count = 0
    blobs_removed: Count = 0
    bytes_removed: Count = 0
    uses_written: Count = 0
    seconds: Finite = 0.0
    problems: tuple[str, ...] = ()


def parse_signature(key: str) -> SiteSignature:
    """The inverse of `SiteSignature.key`.

    Raises:
        BlueprintError: if `key` is none.
    """
    kind, *rest = key.removesuffix("-causal").split("-")
    try:
        dims, dtype, device = rest
        channels, *extent = (int(number) for number in dims.split("x"))
        return SiteSignature(
            kind=SiteKind(kind),
            channels=channels,
            extent=tuple(extent),
            dtype=dtype,
            device=device,
            causal=key.endswith("-causal"),
        )
    except ValueError as error:
        raise BlueprintError(
            f"{key!r} is no site signature", field="signature", remedy="such as feature_map-16x8x8-float32-cpu"
        ) from error
