"""The state of Urza as the fold of its events: pure, in memory, no clock, no storage.

A *target* is one blueprint for one signature by one pipeline. Blueprints, targets and kernels are frozen records;
`apply` replaces them. A blueprint's status is derived from its targets (`_Progress`):

- COMPILING while any target is leased;
- else VALIDATED once any target has a kernel: a design that failed elsewhere is still good here. The targets that
  failed keep their reasons, are not compiled again for that build, and are the `reason` of the blueprint;
- else UNVALIDATED while any target waits (or none was named that fits);
- else INVALID: every target that fits has failed. A target that was never tried gives it another trial.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

from esper.leyline import (
    Blueprint,
    BlueprintStatus,
    CompiledKernelArtifact,
    Fault,
    FieldReport,
    KernelStatus,
    NotFoundError,
    Outcome,
    Pipeline,
    SiteSignature,
    compile_key,
    device_for,
)
from esper.leyline.catalogue import (
    Backlog,
    BenchmarkResult,
    BlueprintOrder,
    BlueprintPage,
    BlueprintQuery,
    Census,
    Ids,
    KernelBrief,
    KernelEntry,
    KernelPage,
    KernelQuery,
    KernelStatistics,
    Outlook,
)
from esper.leyline.kernels import check_blueprint_transition
from esper.urza import records
from esper.urza.index import KernelIndex
from esper.urza.records import Event, EventKind


class TargetState(StrEnum):
    """How far a target is."""

    QUEUED = "queued"
    LEASED = "leased"
    COMPILED = "compiled"
    FAILED = "failed"
    UNFIT = "unfit"  # the blueprint cannot be built for the signature; never queued


OPEN = frozenset({TargetState.QUEUED, TargetState.LEASED})
"""States in which a target is still to be compiled."""


@dataclass(frozen=True, slots=True)
class Target:
    """One blueprint for one signature by one pipeline.

    Attributes:
        job_id: its name; also the id of the compile job.
        seq: place of the event that queued it last: first come, first served within a priority.
        worker, fingerprint, deadline: of the lease, or of the last one.
        lease: place of the event that leased it last: the lease's name.
        attempts, errors, deaths: leases since it was queued last, and how many of them ended by an error of the
            compiler, and by its death or silence.
        settled: builds for which it was compiled or failed.
        reason: why it does not fit, failed, or came back.
        log: the last lines that the compiler of the last attempt wrote.
    """

    job_id: str
    blueprint_id: str
    signature: SiteSignature
    pipeline: Pipeline
    priority: int
    seq: int
    state: TargetState
    worker: str = ""
    fingerprint: str = ""
    deadline: float = 0.0
    lease: int = 0
    attempts: int = 0
    errors: int = 0
    deaths: int = 0
    settled: frozenset[str] = frozenset()
    kernel_ids: tuple[str, ...] = ()
    reason: str = ""
    log: str = ""

    @property
    def device(self) -> str:
        """What a worker must have to compile it."""
        return device_for(self.signature, self.pipeline)

    def place(self) -> tuple[int, bool, int, int]:
        """Sorts what is to be compiled; the first place is the smallest."""
        return (-self.priority, self.pipeline is not Pipeline.FAST, self.errors + self.deaths, self.seq)


GUESSED_S = {Pipeline.FAST: 0.1, Pipeline.OPTIMIZED: 30.0}
"""Seconds of a compilation by each pipeline where none was seen yet."""


def target_id(blueprint_id: str, signature: SiteSignature, pipeline: Pipeline) -> str:
    """The name of a target."""
    return f"{blueprint_id}.{signature.key}.{pipeline.value}"


class Catalog:
    """All that is known, with the indexes that the queries need."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.seq = 0
        self.fingerprints: dict[str, str] = {}
        """By device (`leyline.device_for`): the build of the last worker that leased work."""
        self._blueprints: dict[str, Blueprint] = {}
        self._by_name: dict[str, list[str]] = {}
        self._targets: dict[str, Target] = {}
        self._targets_of: dict[str, list[str]] = {}
        self._progress: dict[str, _Progress] = {}
        self._open: dict[str, None] = {}
        self._signatures: dict[SiteSignature, None] = {}
        self._compile_s: dict[Pipeline, float] = {}  # running mean
        self._kernels = KernelIndex()
        self._fold: dict[EventKind, Callable[[Event, Any], None]] = {
            EventKind.EPOCH: self._epoch_taken,
            EventKind.BLUEPRINT_SUBMITTED: self._blueprint_submitted,
            EventKind.BLUEPRINT_RETIRED: self._blueprint_retired,
            EventKind.TARGET_QUEUED: self._target_queued,
            EventKind.TARGET_UNFIT: self._target_unfit,
            EventKind.TARGET_LEASED: self._target_leased,
            EventKind.TARGET_RENEWED: self._target_renewed,
            EventKind.TARGET_RELEASED: self._target_released,
            EventKind.TARGET_EXPIRED: self._target_expired,
            EventKind.TARGET_COMPILED: self._target_compiled,
            EventKind.TARGET_FAILED: self._target_failed,
            EventKind.KERNEL_STORED: self._kernel_stored,
            EventKind.KERNEL_MARKED: self._kernel_marked,
            EventKind.KERNEL_REPORTED: self._kernel_reported,
            EventKind.KERNEL_BENCHMARKED: self._kernel_benchmarked,
            EventKind.KERNELS_USED: self._kernels_used,
            EventKind.SITES_REGISTERED: self._sites_registered,
        }
        for event in events:
            self.apply(event)

    def copy(self) -> Catalog:
        """One that knows the same and goes its own way from here on; far quicker than to fold the events again."""
        other = Catalog()
        other.seq = self.seq
        for index in ("fingerprints", "_blueprints", "_targets", "_open", "_signatures", "_compile_s"):
            setattr(other, index, dict(getattr(self, index)))
        for index in ("_by_name", "_targets_of"):
            setattr(other, index, {key: list(ids) for key, ids in getattr(self, index).items()})
        other._kernels = self._kernels.copy()
        other._progress = {key: progress.copy() for key, progress in self._progress.items()}
        return other

    # ------------------------------------------------------------ queries

    def blueprint(self, blueprint_id: str) -> Blueprint:
        """Raises `NotFoundError` for an unknown id."""
        return _found(self._blueprints, blueprint_id, "blueprint")

    def blueprints(self, *, status: BlueprintStatus | None = None, name: str | None = None) -> list[Blueprint]:
        """Filtered, oldest first."""
        ids = self._blueprints if name is None else self._by_name.get(name, ())
        found = (self._blueprints[one] for one in ids)
        return [blueprint for blueprint in found if status is None or blueprint.status is status]

    def search_blueprints(self, query: BlueprintQuery) -> BlueprintPage:
        """One page of the blueprints that a query names."""
        wanted_any, wanted_all = set(query.tags_any), set(query.tags_all)
        found = [
            blueprint
            for blueprint in self.blueprints(status=query.status, name=query.name)
            if wanted_all.issubset(blueprint.tags)
            and (not wanted_any or not wanted_any.isdisjoint(blueprint.tags))
            and (query.parent_id is None or blueprint.parent_id == query.parent_id)
        ]
        if query.order is BlueprintOrder.NAME:
            found.sort(key=lambda one: (one.name, one.version), reverse=query.descending)
        elif query.order is BlueprintOrder.PRIORITY:
            found.sort(key=lambda one: one.priority, reverse=query.descending)
        elif query.descending:
            found.reverse()
        page = islice(found, query.offset, query.offset + query.limit)
        return BlueprintPage(total=len(found), blueprints=tuple(page))

    def ids(self, prefix: str, *, limit: int = 8) -> Ids:
        """Ids of blueprints and kernels that begin with `prefix`, oldest first, at most `limit` of each."""
        blueprints = (one for one in self._blueprints if one.startswith(prefix))
        kernels = (one for one in self._kernels.ids() if one.startswith(prefix))
        return Ids(blueprints=tuple(islice(blueprints, limit)), kernels=tuple(islice(kernels, limit)))

    def lineage(self, blueprint_id: str) -> list[Blueprint]:
        """A blueprint, the one it was derived from, and so on to the root; raises `NotFoundError` for an unknown id."""
        line = [self.blueprint(blueprint_id)]
        while (parent_id := line[-1].parent_id) is not None:  # a parent exists before its child: there are no circles
            line.append(self.blueprint(parent_id))
        return line

    def descendants(self, blueprint_id: str) -> list[Blueprint]:
        """All that were derived from a blueprint, and from those, oldest first; raises `NotFoundError`."""
        family = {self.blueprint(blueprint_id).blueprint_id}
        found = []
        for one in self._blueprints.values():  # a parent exists before its child
            if one.parent_id in family:
                family.add(one.blueprint_id)
                found.append(one)
        return found

    def signatures(self) -> list[SiteSignature]:
        """Every site signature that runs have registered, in the order in which that happened first."""
        return list(self._signatures)

    def target(self, job_id: str) -> Target:
        """Raises `NotFoundError` for an unknown id."""
        return _found(self._targets, job_id, "compile job")

    def targets(self, blueprint_id: str) -> list[Target]:
        """All targets of a blueprint, those that do not fit as well, in the order in which they were named."""
        return [self._targets[job_id] for job_id in self._targets_of.get(blueprint_id, ())]

    def open_targets(self) -> list[Target]:
        """What is queued or leased: most urgent first, FAST before OPTIMIZED, what failed before last, oldest first."""
        found = [self._targets[job_id] for job_id in self._open]
        usable = (target for target in found if not self._is_retired(target.blueprint_id))
        return sorted(usable, key=Target.place)

    def backlog(self) -> Backlog:
        """How much is to be compiled."""
        queued, leased = Counter[str](), Counter[str]()
        work_s: dict[str, float] = {}
        for target in self.open_targets():
            (queued if target.state is TargetState.QUEUED else leased)[target.device] += 1
            work_s[target.device] = work_s.get(target.device, 0.0) + self._seconds(target)
        return Backlog(queued=dict(queued), leased=dict(leased), work_s=work_s)

    def _seconds(self, target: Target) -> float:
        """What its compilation will take: the running mean of its pipeline, or a guess before the first."""
        return self._compile_s.get(target.pipeline, GUESSED_S[target.pipeline])

    def census(self) -> Census:
        """How much there is, and what waits."""
        line = Counter(target.state for target in self.open_targets())
        return Census(
            num_blueprints=len(self._blueprints),
            num_kernels=self._kernels.num_with(KernelStatus.VALIDATED),
            num_signatures=len(self._signatures),
            num_queued=line[TargetState.QUEUED],
            num_compiling=line[TargetState.LEASED],
        )

    def outlook(self, blueprint_id: str) -> Outlook:
        """What a blueprint still waits for; raises `NotFoundError` for an unknown id."""
        self.blueprint(blueprint_id)
        line = self.open_targets()
        own = [place for place, target in enumerate(line, 1) if target.blueprint_id == blueprint_id]
        ahead = line[: own[-1]] if own else []
        work_s = sum(map(self._seconds, ahead))
        num_workers = len({target.worker for target in line if target.state is TargetState.LEASED}) or 1
        return Outlook(num_open=len(own), queue_position=len(ahead), estimated_s=work_s / num_workers)

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact:
        """Raises `NotFoundError` for an unknown id."""
        return self._kernels.get(kernel_id)

    def entry(self, kernel_id: str) -> KernelEntry:
        """A kernel with all that is known of it; raises `NotFoundError` for an unknown id."""
        return self._kernels.entry(kernel_id)

    def kernel_by_compile_key(self, key: str) -> CompiledKernelArtifact | None:
        """The kernel that this work gave, if it was done."""
        return self._kernels.by_compile_key(key)

    def verdict(self, kernel: CompiledKernelArtifact) -> str:
        """Why work that gave this kernel has failed since; empty while the kernel is validated."""
        if kernel.status is KernelStatus.VALIDATED:
            return ""
        why = self._kernels.reason(kernel.kernel_id)
        return f"the same work gave kernel {kernel.kernel_id[:12]}, which is {kernel.status.value}: {why}"

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        blueprint_id: str | None = None,
        status: KernelStatus | None = KernelStatus.VALIDATED,
        pipeline: Pipeline | None = None,
    ) -> list[CompiledKernelArtifact]:
        """Filtered, oldest first. A kernel that blueprints of the same IR share is found under each of them."""
        if blueprint_id is not None:
            ids: Iterable[str] = self._kernels_of(blueprint_id)
        elif signature is not None:
            ids = self._kernels.by_signature(signature)
        else:
            ids = self._kernels.ids()
        found = (self._kernels.get(one) for one in ids)
        return [
            kernel
            for kernel in found
            if (status is None or kernel.status is status)
            and (signature is None or kernel.signature == signature)
            and (pipeline is None or kernel.pipeline is pipeline)
        ]

    def kernel_briefs(self, signature: SiteSignature, *, pipeline: Pipeline | None = None) -> list[KernelBrief]:
        """The validated kernels of a signature, oldest first."""
        return self._kernels.briefs(signature, pipeline)

    def search_kernels(self, query: KernelQuery) -> KernelPage:
        """One page of the kernels that a query names."""
        of_blueprint = None if query.blueprint_id is None else self._kernels_of(query.blueprint_id)
        return self._kernels.search(query, of_blueprint)

    def _kernels_of(self, blueprint_id: str) -> Sequence[str]:
        return list(dict.fromkeys(one for target in self.targets(blueprint_id) for one in target.kernel_ids))

    def has_kernel(self, kernel_id: str) -> bool:
        """Whether an event names this kernel, and so its bytes must stay."""
        return kernel_id in self._kernels

    def has_counted(self, id_: str) -> bool:
        """Whether this report or benchmark was counted."""
        return self._kernels.has_counted(id_)

    def statistics(self, kernel_id: str) -> KernelStatistics:
        """How a kernel was used; raises `NotFoundError` for an unknown id."""
        return self._kernels.statistics(kernel_id)

    def outcomes(self, kernel_id: str) -> Counter[Outcome]:
        """How the adaptations with this kernel ended."""
        return self._kernels.outcomes(kernel_id)

    def compile_key(self, target: Target, fingerprint: str) -> str:
        """The key of this target's work on a worker of this build."""
        ir_hash = self.blueprint(target.blueprint_id).ir_hash
        return compile_key(ir_hash, target.signature, target.pipeline, fingerprint)

    def _is_retired(self, blueprint_id: str) -> bool:
        return self._blueprints[blueprint_id].status is BlueprintStatus.RETIRED

    # ------------------------------------------------------------ the fold

    def apply(self, event: Event) -> None:
        """Takes one event in.

        Raises:
            ConflictError: if a status table forbids it.
            NotFoundError: if it is about something unknown.
        """
        self._fold[event.kind](event, event.body)
        self.seq = event.seq

    def _epoch_taken(self, _event: Event, _body: records.EpochTaken) -> None:
        """Says who writes; changes nothing."""

    def _blueprint_submitted(self, _event: Event, body: Blueprint) -> None:
        self._blueprints[body.blueprint_id] = body
        self._by_name.setdefault(body.name, []).append(body.blueprint_id)

    def _blueprint_retired(self, event: Event, body: records.Reason) -> None:
        self._set_status(self.blueprint(event.id), BlueprintStatus.RETIRED, body.reason)

    def _target_queued(self, event: Event, body: records.TargetNamed) -> None:
        old = self._targets.get(event.id)
        if old is None or old.state is TargetState.UNFIT:
            self._name_target(event, body, TargetState.QUEUED)
        else:
            again = Target(
                old.job_id,
                old.blueprint_id,
                old.signature,
                old.pipeline,
                body.priority,
                event.seq,
                TargetState.QUEUED,
                settled=old.settled,
                kernel_ids=old.kernel_ids,
            )
            self._replace(again)

    def _target_unfit(self, event: Event, body: records.TargetNamed) -> None:
        self._name_target(event, body, TargetState.UNFIT)

    def _name_target(self, event: Event, body: records.TargetNamed, state: TargetState) -> None:
        if event.id not in self._targets:
            self._targets_of.setdefault(body.blueprint_id, []).append(event.id)
        self._replace(
            Target(
                event.id,
                body.blueprint_id,
                body.signature,
                body.pipeline,
                body.priority,
                event.seq,
                state,
                reason=body.reason,
            )
        )

    def _target_leased(self, event: Event, body: records.TargetLeased) -> None:
        target = self.target(event.id)
        self.fingerprints[target.device] = body.fingerprint
        self._replace(
            replace(
                target,
                state=TargetState.LEASED,
                worker=body.worker,
                fingerprint=body.fingerprint,
                deadline=body.deadline,
                lease=event.seq,
                attempts=target.attempts + 1,
            )
        )

    def _target_renewed(self, event: Event, body: records.TargetRenewed) -> None:
        self._replace(replace(self.target(event.id), deadline=body.deadline))

    def _target_released(self, event: Event, body: records.TargetReleased) -> None:
        target = self.target(event.id)
        self._replace(
            replace(
                target,
                state=TargetState.QUEUED,
                errors=target.errors + (body.fault is Fault.ERROR),
                deaths=target.deaths + (body.fault is Fault.DEATH),
                reason=body.reason,
                log=body.log,
            )
        )

    def _target_expired(self, event: Event, _body: records.TargetExpired) -> None:
        target = self.target(event.id)
        self._replace(replace(target, state=TargetState.QUEUED, deaths=target.deaths + 1))

    def _target_compiled(self, event: Event, body: records.TargetCompiled) -> None:
        target = self.target(event.id)
        self._kernels.share(body.kernel_id, self.blueprint(target.blueprint_id))
        kernel_ids = dict.fromkeys((*target.kernel_ids, self.kernel(body.kernel_id).kernel_id))
        settled = target.settled | {body.fingerprint}
        self._replace(
            replace(
                target, state=TargetState.COMPILED, kernel_ids=tuple(kernel_ids), settled=settled, reason="", log=""
            )
        )

    def _target_failed(self, event: Event, body: records.TargetFailed) -> None:
        target = self.target(event.id)
        settled = target.settled | {body.fingerprint}
        self._replace(
            replace(target, state=TargetState.FAILED, settled=settled, reason=body.reason, log=body.log or target.log)
        )

    def _kernel_stored(self, _event: Event, body: CompiledKernelArtifact) -> None:
        if body.kernel_id not in self._kernels:
            old = self._compile_s.get(body.pipeline, body.compile_s)
            self._compile_s[body.pipeline] = old + (body.compile_s - old) * 0.2  # the last few count most
        self._kernels.put(body)

    def _kernel_marked(self, event: Event, body: records.KernelMarked) -> None:
        self._kernels.mark(event.id, body.status, body.reason)

    def _kernel_reported(self, _event: Event, body: FieldReport) -> None:
        self._kernels.count_report(body)

    def _kernel_benchmarked(self, _event: Event, body: BenchmarkResult) -> None:
        self._kernels.add_benchmark(body)

    def _kernels_used(self, _event: Event, body: records.KernelsUsed) -> None:
        self._kernels.count_uses(body.counts)

    def _sites_registered(self, _event: Event, body: records.SitesRegistered) -> None:
        self._signatures.update(dict.fromkeys(body.signatures))

    def _replace(self, target: Target) -> None:
        old = self._targets.get(target.job_id)
        self._targets[target.job_id] = target
        if target.state in OPEN:
            self._open[target.job_id] = None
        else:
            self._open.pop(target.job_id, None)
        progress = self._progress.get(target.blueprint_id)
        if progress is None:
            progress = self._progress[target.blueprint_id] = _Progress()
        fits_elsewhere = progress.take(old, target)
        blueprint = self.blueprint(target.blueprint_id)
        fitting = tuple(progress.fitting) if fits_elsewhere else None  # of thousands, at every step of each of them
        self._set_status(blueprint, progress.status, progress.reason, fitting)

    def _set_status(
        self,
        blueprint: Blueprint,
        status: BlueprintStatus,
        reason: str,
        targets: tuple[SiteSignature, ...] | None = None,
    ) -> None:
        if status is not blueprint.status:
            check_blueprint_transition(blueprint.status, status)
        elif targets is None and reason == blueprint.reason:
            return
        changes = {"status": status, "reason": reason} | ({} if targets is None else {"targets": targets})
        self._blueprints[blueprint.blueprint_id] = blueprint.model_copy(update=changes)


class _Progress:
    """What the targets of one blueprint add up to, kept as they change: a blueprint may have thousands."""

    def __init__(self) -> None:
        self.fitting: dict[SiteSignature, int] = {}  # -> in how many pipelines
        self._states: Counter[TargetState] = Counter()
        self._failed: dict[str, str] = {}  # job -> reason
        self._num_with_kernels = 0

    def take(self, old: Target | None, new: Target) -> bool:
        """Counts a target in its new state instead of in the old one; returns whether `fitting` has changed."""
        if old is not None:
            self._states[old.state] -= 1
            self._num_with_kernels -= bool(old.kernel_ids)
            self._failed.pop(old.job_id, None)
        self._states[new.state] += 1
        self._num_with_kernels += bool(new.kernel_ids)
        if new.state is TargetState.FAILED:
            self._failed[new.job_id] = f"{new.signature.key}: {new.reason}"
        was_fitting = old is not None and old.state is not TargetState.UNFIT
        if was_fitting is (new.state is not TargetState.UNFIT):
            return False
        number = self.fitting.get(new.signature, 0) + (-1 if was_fitting else 1)
        if number:
            self.fitting[new.signature] = number
        else:
            del self.fitting[new.signature]
        return True

    def copy(self) -> _Progress:
        """One that goes its own way from here on."""
        other = _Progress()
        other.fitting = dict(self.fitting)
        other._states = Counter(self._states)
        other._failed = dict(self._failed)
        other._num_with_kernels = self._num_with_kernels
        return other

    @property
    def reason(self) -> str:
        """Why what failed did, in the order in which it failed."""
        return "; ".join(self._failed.values())

    @property
    def status(self) -> BlueprintStatus:
        """See the module's docstring."""
        if self._states[TargetState.LEASED]:
            return BlueprintStatus.COMPILING
        if self._num_with_kernels:
            return BlueprintStatus.VALIDATED
        if self._states[TargetState.FAILED] and not self._states[TargetState.QUEUED]:
            return BlueprintStatus.INVALID
        return BlueprintStatus.UNVALIDATED


def _found(index: dict[str, Any], key: str, what: str) -> Any:
    if key not in index:
        raise NotFoundError(f"no {what} {key}")
    return index[key]
