"""Urza itself: every request is decided on the newest state, made durable, and only then acknowledged.

Two catalogs fold the same events. `_head` holds all that was decided, and decides; `_durable` holds what a commit has
carried, and answers queries: nobody ever sees what a crash could take back. Requests that meet while a commit is
under way share the next one. Knows nothing of actors, deadlines or torch.
"""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from esper.delta import Tidied
from esper.leyline import (
    Blueprint,
    BlueprintIR,
    BlueprintStatus,
    CompiledKernelArtifact,
    CompileJob,
    ConflictError,
    EsperError,
    Fault,
    FaultPlan,
    FieldReport,
    KernelStatus,
    NoFaults,
    Outcome,
    Pipeline,
    SiteSignature,
    TamperedError,
    UnavailableError,
    now,
)
from esper.leyline.catalogue import (
    Backlog,
    BenchmarkResult,
    BlueprintPage,
    BlueprintQuery,
    Census,
    Ids,
    KernelBrief,
    KernelEntry,
    KernelPage,
    KernelQuery,
    MaintenanceReport,
    Outlook,
)
from esper.storage import Storage
from esper.urza import projections, rules
from esper.urza.blobs import AsideBlob, Blobs, StoredBlobs, sha256
from esper.urza.catalog import Catalog, Target, TargetState
from esper.urza.events import DeltaLog, EventLog
from esper.urza.records import SCHEMA_VERSION, Event, Fact


class Swept(NamedTuple):
    """What became of the blobs."""

    kept: int
    set_aside: int
    removed: int
    bytes_removed: int


class Hub:
    """An `AssetHub` over a log of events and a store of blobs. Thread-safe.

    After a failed commit it is not known what is durable: the hub is `broken`, every request raises the reason, and a
    new hub has to take over (`open` with `after_epoch`), unless the reason is `FencedError`, which is final.

    The places of a `FaultPlan` are `stored` (a blob is there, the record is not), `committing`, `committed`, `sweeping`
    (a blob is to be removed), `projecting` (of the tables for others one is written); those of `DeltaLog` come before.
    The step is the number of an event in the log.
    """

    def __init__(
        self, log: EventLog, blobs: Blobs, *, clock: Callable[[], float] = now, faults: FaultPlan | None = None
    ) -> None:
        self._log = log
        self._blobs = blobs
        self._clock = clock
        self._faults = faults or NoFaults()
        self._head = Catalog(log.replay())
        self._durable = self._head.copy()
        self._fingerprints = dict(self._head.fingerprints)
        self._waiting: list[Event] = []
        self._broken: EsperError | None = None
        self._committing = False
        self._uses: Counter[str] = Counter()  # fetches that are not written down yet
        self._being_stored: Counter[str] = Counter()  # blobs that no event may name yet
        self._projected = 0
        self._projecting = threading.Lock()  # one at a time: an older state must not replace a newer one
        self._state = threading.Condition()  # guards all of the above; told of every commit

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        clock: Callable[[], float] = now,
        after_epoch: int | None = None,
        faults: FaultPlan | None = None,
    ) -> Hub:
        """Takes over what lies at a storage address; makes it where there is nothing.

        Raises:
            StorageError: if the address cannot be read or written, or is of a newer schema.
            FencedError: see `DeltaLog.take_over`.
        """
        storage.check_writable()
        with _without_collection():
            log = DeltaLog.take_over(storage, clock, after_epoch=after_epoch, faults=faults)
            return cls(log, StoredBlobs(storage), clock=clock, faults=faults)

    @property
    def epoch(self) -> int:
        """How many writers the log has had, this one included."""
        return self._log.epoch

    @property
    def broken(self) -> EsperError | None:
        """Why this hub answers no more, if it does not."""
        return self._broken

    # ------------------------------------------------------------ blueprints

    def submit_blueprint(
        self,
        ir: BlueprintIR,
        *,
        name: str,
        targets: Sequence[SiteSignature],
        tags: Sequence[str] = (),
        priority: int = 5,
        submitted_by: str = "unknown",
        parent_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        pipelines: Sequence[Pipeline] = (Pipeline.FAST,),
    ) -> Blueprint:
        """See `AssetHub`. A target that does not fit is recorded with its reason (`targets`) and not queued.

        `metadata` (plain JSON) is kept with the first submission, as the tags are.
        A target that was compiled, or failed, is queued again only if the workers are of another build by now: the
        build of the last worker for its device that asked for work.

        Raises:
            BlueprintError: if the IR or a field is malformed.
            NotFoundError: if there is no such parent.
            ConflictError: if the blueprint is retired.
        """
        with self._state:
            id_, facts = rules.submit(
                self._head,
                ir,
                name=name,
                targets=targets,
                pipelines=pipelines,
                tags=tags,
                priority=priority,
                submitted_by=submitted_by,
                parent_id=parent_id,
                metadata=metadata or {},
                fingerprints=self._fingerprints,
                time=self._clock(),
            )
            ticket = self._decide(facts)
        self._commit(ticket)
        return self.blueprint(id_)

    def blueprint(self, blueprint_id: str) -> Blueprint:
        with self._state:
            return self._known.blueprint(blueprint_id)

    def blueprints(self, *, status: BlueprintStatus | None = None, name: str | None = None) -> list[Blueprint]:
        with self._state:
            return self._known.blueprints(status=status, name=name)

    def search_blueprints(self, query: BlueprintQuery) -> BlueprintPage:
        """One page of the blueprints that a query names."""
        with self._state:
            return self._known.search_blueprints(query)

    def ids(self, prefix: str) -> Ids:
        """Ids of blueprints and kernels that begin with `prefix`: some of them, so that people may write less."""
        with self._state:
            return self._known.ids(prefix)

    def lineage(self, blueprint_id: str) -> list[Blueprint]:
        """A blueprint, the one it was derived from, and so on to the root; raises `NotFoundError`."""
        with self._state:
            return self._known.lineage(blueprint_id)

    def descendants(self, blueprint_id: str) -> list[Blueprint]:
        """All that were derived from a blueprint, and from those, oldest first; raises `NotFoundError`."""
        with self._state:
            return self._known.descendants(blueprint_id)

    def outlook(self, blueprint_id: str) -> Outlook:
        """What a blueprint still waits for; raises `NotFoundError`."""
        with self._state:
            return self._known.outlook(blueprint_id)

    def signatures(self) -> list[SiteSignature]:
        """Every site signature that runs have registered."""
        with self._state:
            return self._known.signatures()

    def register_sites(self, signatures: Sequence[SiteSignature], *, run_id: str) -> None:
        """See `AssetHub`."""
        with self._state:
            ticket = self._decide(rules.register_sites(self._head, signatures, run_id))
        self._commit(ticket)

    def census(self) -> Census:
        """How much there is, and what waits for a compiler."""
        with self._state:
            return self._known.census()

    def targets(self, blueprint_id: str) -> list[Target]:
        """Every signature that was asked for, with its state and the reason where it does not fit or failed."""
        with self._state:
            return self._known.targets(blueprint_id)

    def retire_blueprint(self, blueprint_id: str, reason: str) -> None:
        """Takes a blueprint out of use; raises `ConflictError` while it is being compiled."""
        with self._state:
            ticket = self._decide(rules.retire_blueprint(self._head, blueprint_id, reason))
        self._commit(ticket)

    # ------------------------------------------------------------ work

    def claim(self, worker: str, *, fingerprint: str, device: str = "cpu", lease_s: float = 60.0) -> CompileJob | None:
        """See `AssetHub`. A worker holds one lease at a time: asking again returns the one it holds."""
        with self._state:
            self._fingerprints[device] = fingerprint
            target, facts = rules.claim(
                self._head, worker, fingerprint=fingerprint, device=device, lease_s=lease_s, time=self._clock()
            )
            ticket = self._decide(facts)
            leased = None if target is None else self._head.target(target.job_id)
        self._commit(ticket)
        return None if leased is None else self._job(leased)

    def renew(self, job: CompileJob, *, lease_s: float = 60.0) -> CompileJob:
        """See `AssetHub`."""
        with self._state:
            ticket = self._decide(rules.renew(self._head, job, lease_s=lease_s, time=self._clock()))
            renewed = self._head.target(job.job_id)
        self._commit(ticket)
        return self._job(renewed)

    def release(self, job: CompileJob, fault: Fault, reason: str, *, log: str = "") -> bool:
        """See `AssetHub`."""
        with self._state:
            ticket = self._decide(rules.release(self._head, job, fault, reason, log))
            state = self._head.target(job.job_id).state
        self._commit(ticket)
        return state is not TargetState.FAILED

    def _job(self, target: Target) -> CompileJob:
        return CompileJob(
            job_id=target.job_id,
            blueprint=self.blueprint(target.blueprint_id),
            signature=target.signature,
            pipeline=target.pipeline,
            worker=target.worker,
            lease=target.lease,
            deadline=target.deadline,
        )

    def complete(self, job: CompileJob, artifact: CompiledKernelArtifact, container: bytes) -> CompiledKernelArtifact:
        """See `AssetHub`. The blob is stored first, so that no record ever names bytes that are not there.

        Returns:
            The record of the kernel that stands: another one, if the same work was done before.

        Raises:
            LeaseLostError: if another worker has the job.
            TamperedError: if the container's hash is not `artifact.kernel_id`.
            ConflictError: if the artifact is not what the job asked for.
            KernelRejectedError: if a check of its report failed.
        """
        if sha256(container) != artifact.kernel_id:
            raise TamperedError(f"the container's hash is not {artifact.kernel_id}", field="kernel_id")
        if len(container) != artifact.size_bytes:
            raise ConflictError(f"the container has {len(container)} bytes", field="size_bytes")
        with self._state:
            rules.complete(self._head, job, artifact, time=self._clock())  # refuse before anything is stored
        with self._storing(artifact.kernel_id):
            self._blobs.put(container)
            self._faults.at("stored", self._head.seq)
            with self._state:
                kernel_id, facts = rules.complete(self._head, job, artifact, time=self._clock())
                ticket = self._decide(facts)
            self._commit(ticket)
        return self.kernel(kernel_id)

    def fail(self, job: CompileJob, reason: str, *, log: str = "") -> None:
        """See `AssetHub`. The blueprint is INVALID once every target that fits has failed; see `catalog`.

        Raises:
            LeaseLostError: if another worker has the job.
        """
        with self._state:
            ticket = self._decide(rules.fail(self._head, job, reason, log, time=self._clock()))
        self._commit(ticket)

    def backlog(self) -> Backlog:
        with self._state:
            return self._known.backlog()

    def pending(self, signatures: Sequence[SiteSignature], *, pipeline: Pipeline | None = None) -> int:
        with self._state:
            wanted = set(signatures)
            return sum(
                target.signature in wanted and pipeline in {None, target.pipeline}
                for target in self._known.open_targets()
            )

    # ------------------------------------------------------------ kernels

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        blueprint_id: str | None = None,
        status: KernelStatus | None = KernelStatus.VALIDATED,
        pipeline: Pipeline | None = None,
    ) -> list[CompiledKernelArtifact]:
        with self._state:
            return self._known.kernels(signature=signature, blueprint_id=blueprint_id, status=status, pipeline=pipeline)

    def kernel_briefs(self, signature: SiteSignature, *, pipeline: Pipeline | None = None) -> list[KernelBrief]:
        """See `AssetHub`."""
        with self._state:
            return self._known.kernel_briefs(signature, pipeline=pipeline)

    def count_kernels(self, signatures: Sequence[SiteSignature], *, pipeline: Pipeline | None = None) -> int:
        """See `AssetHub`."""
        with self._state:
            known = self._known
            return sum(len(known.kernel_briefs(each, pipeline=pipeline)) for each in dict.fromkeys(signatures))

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact:
        with self._state:
            return self._known.kernel(kernel_id)

    def search_kernels(self, query: KernelQuery) -> KernelPage:
        """One page of the kernels that a query names, with all that was learned of them."""
        with self._state:
            return self._known.search_kernels(query)

    def kernel_entry(self, kernel_id: str) -> KernelEntry:
        """A kernel with all that was learned of it; raises `NotFoundError`."""
        with self._state:
            return self._known.entry(kernel_id)

    def fetch(self, kernel_id: str) -> memoryview:
        """See `AssetHub`.

        Raises:
            NotFoundError: if there is no such kernel.
            TamperedError: if the stored bytes have another hash.
        """
        data = memoryview(self._blobs.get(self.kernel(kernel_id).kernel_id))
        self.note_use(kernel_id)
        return data

    def note_use(self, kernel_id: str) -> None:
        """Counts a fetch; it is written down with the next round of maintenance, and when the hub is closed."""
        with self._state:
            self._uses[kernel_id] += 1

    def mark_kernel(self, kernel_id: str, status: KernelStatus, reason: str) -> None:
        """Rejects or retires a kernel; raises `ConflictError` if the status table forbids it."""
        with self._state:
            ticket = self._decide(rules.mark_kernel(self._head, kernel_id, status, reason))
        self._commit(ticket)

    def report(self, report: FieldReport) -> None:
        """See `AssetHub`.

        Raises:
            NotFoundError: if there is no such kernel.
        """
        with self._state:
            ticket = self._decide(rules.report(self._head, report))
        self._commit(ticket)

    def benchmark(self, result: BenchmarkResult) -> None:
        """Adds a measurement to a kernel; repeating it is harmless.

        Raises:
            NotFoundError: if there is no such kernel.
        """
        with self._state:
            ticket = self._decide(rules.benchmark(self._head, result))
        self._commit(ticket)

    def outcomes(self, kernel_id: str) -> Counter[Outcome]:
        """How the adaptations with this kernel ended."""
        with self._state:
            return self._known.outcomes(kernel_id)

    # ------------------------------------------------------------ upkeep

    def project(self, storage: Storage) -> None:
        """Writes the tables `blueprints` and `kernels`, one row an id, for readers other than Urza.

        Where nothing changed since this hub last did so, nothing is written.

        Raises:
            FencedError: if another Urza has taken over: the tables are its.
            StorageError: if a table cannot be written, or who writes cannot be read.
        """
        with self._projecting:
            with self._state:
                seq = self._known.seq
                if seq == self._projected:
                    return
                blueprints = self._known.blueprints()
                kernels = [self._known.entry(kernel.kernel_id) for kernel in self._known.kernels(status=None)]
            projections.write_blueprints(storage, blueprints, self._log.confirm)
            self._faults.at("projecting", seq)
            projections.write_kernels(storage, kernels, self._log.confirm)
            self._projected = seq

    def tidy_projections(self, storage: Storage, kept_hours: float) -> list[Tidied]:
        """Tidies the tables that `project` writes: see `projections.tidy`."""
        with self._projecting:
            return projections.tidy(storage, kept_hours)

    def write_uses(self) -> int:
        """Makes the fetches counted so far durable; returns how many."""
        with self._state:
            counts = dict(self._uses)
            ticket = self._decide(rules.use(counts, self._clock()))
            self._uses.clear()
        self._commit(ticket)
        return sum(counts.values())

    def maintain(self, *, kept_hours: float = 24.0, grace_hours: float = 24.0) -> MaintenanceReport:
        """Tidies log and blobs, and writes down the fetches. Requests wait while the log is compacted.

        A blob goes if no event names it, nobody is storing it, and it was last written more than `grace_hours` ago:
        this round sets it aside, and the next one removes it. What an event names stays for good, whatever became of
        its kernel: a run may come back for it.

        Args:
            kept_hours: files of the log's table that were replaced stay so long, for whoever reads it meanwhile.
            grace_hours: see above; more than any worker or clock may be late.

        Raises:
            FencedError: if another Urza has taken over; no blob was removed then.
            UnavailableError: if that is not known.
            StorageError: if the blobs cannot be listed or removed.
        """
        begin = time.monotonic()
        num_uses = self.write_uses()
        aside = self._blobs.aside()  # before the next line: what a later writer's blob leaves aside is not among these
        with self._exclusively():
            tidied = self._log.maintain(kept_hours=kept_hours)  # raises where another has taken over: blobs stay
        swept = self._sweep(grace_hours, aside)
        return MaintenanceReport(
            schema_version=SCHEMA_VERSION,
            num_events=self._durable.seq,
            files_before=tidied.files_before,
            files_after=tidied.files_after,
            files_removed=tidied.files_removed,
            blobs_kept=swept.kept,
            blobs_set_aside=swept.set_aside,
            blobs_removed=swept.removed,
            bytes_removed=swept.bytes_removed,
            uses_written=num_uses,
            seconds=time.monotonic() - begin,
            problems=(tidied.problem,) if tidied.problem else (),
        )

    def _sweep(self, grace_hours: float, aside: Sequence[AsideBlob]) -> Swept:
        """Looks at each blob by itself: none may be waited for by a request while the next one is listed.

        Args:
            grace_hours: see `maintain`.
            aside: copies that lay aside when this hub was known to be the writer.
        """
        removed = freed = set_aside = kept = 0
        for copy in aside:
            with self._state:
                self._check_whole()
                if self._wants(copy.digest):
                    self._blobs.restore(copy)
                    continue
            self._blobs.discard(copy)
            removed, freed = removed + 1, freed + copy.size_bytes
        before = self._clock() - grace_hours * 3600.0
        self._blobs.drop_drafts(before=before)
        for blob in self._blobs.stored():
            with self._state:
                self._check_whole()
                if not self._wants(blob.digest) and blob.written_at < before:
                    self._faults.at("sweeping", self._head.seq)
                    # in here, so that nobody begins to store it meanwhile
                    if self._blobs.set_aside(blob, before=before):
                        set_aside += 1
                        continue
            kept += 1
        return Swept(kept, set_aside, removed, freed)

    def _wants(self, digest: str) -> bool:
        return self._head.has_kernel(digest) or digest in self._being_stored

    @contextmanager
    def _storing(self, digest: str) -> Iterator[None]:
        """Keeps a blob from being swept from before it is written until an event names it."""
        with self._state:
            self._being_stored[digest] += 1
        try:
            yield
        finally:
            with self._state:
                self._being_stored[digest] -= 1
                if not self._being_stored[digest]:
                    del self._being_stored[digest]

    # ------------------------------------------------------------ durability

    @property
    def _known(self) -> Catalog:
        """What queries see."""
        self._check_whole()
        return self._durable

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)  # one instance for all: its traceback must not grow

    def _decide(self, facts: Sequence[Fact]) -> int:
        """Takes facts into the newest state; returns the place in the log that must be durable before the answer.

        Without facts too: what the answer rests on may still be under way.
        """
        self._check_whole()
        for fact in facts:
            event = Event(self._head.seq + 1, self.epoch, self._clock(), fact.kind, fact.id, fact.body)
            self._head.apply(event)
            self._waiting.append(event)
        return self._head.seq

    def _commit(self, ticket: int) -> None:
        """Returns once the log holds `ticket`. Of those who wait one commits for all; the others are told."""
        with self._state:
            self._state.wait_for(lambda: self._is_settled(ticket) or not self._committing)
            if self._is_settled(ticket):
                self._check_whole()
                return
            self._committing = True
            batch, self._waiting = self._waiting, []
        failure: EsperError | None = UnavailableError("a commit was interrupted; it is not known what is durable")
        try:
            self._faults.at("committing", ticket)
            self._log.append(batch)
            self._faults.at("committed", ticket)
            failure = None
        except EsperError as error:
            failure = error
            raise
        finally:
            with self._state:
                self._broken = failure
                self._committing = False
                if failure is None:
                    for event in batch:
                        self._durable.apply(event)
                self._state.notify_all()

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Holds every commit back; an `EsperError` inside breaks the hub, as a failed commit does."""
        with self._state:
            self._state.wait_for(lambda: self._broken is not None or not self._committing)
            self._check_whole()
            self._committing = True
        failure: EsperError | None = UnavailableError("maintenance was interrupted; it is not known what is durable")
        try:
            yield
            failure = None
        except EsperError as error:
            failure = error
            raise
        finally:
            with self._state:
                self._broken = failure
                self._committing = False
                self._state.notify_all()

    def _is_settled(self, ticket: int) -> bool:
        return self._broken is not None or self._durable.seq >= ticket


@contextmanager
def _without_collection() -> Iterator[None]:
    """Replays of long logs make millions of objects that all stay: collections meanwhile take four times the rest."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
