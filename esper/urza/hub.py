"""Urza itself: every request is decided on the newest state, made durable, and only then acknowledged.

Two catalogs fold the same events. `_head` holds all that was decided, and decides; `_durable` holds what a commit has
carried, and answers queries: nobody ever sees what a crash could take back. Requests that meet while a commit is
under way share the next one. Knows nothing of actors, deadlines or torch.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from esper.leyline import (
    Blueprint,
    BlueprintIR,
    BlueprintStatus,
    CompiledKernelArtifact,
    CompileJob,
    ConflictError,
    EsperError,
    FieldReport,
    KernelStatus,
    Outcome,
    Pipeline,
    SiteSignature,
    TamperedError,
    UnavailableError,
    now,
)
from esper.storage import Storage
from esper.urza import projections, rules
from esper.urza.blobs import Blobs, StoredBlobs, sha256
from esper.urza.catalog import Catalog, Target
from esper.urza.events import DeltaLog, EventLog
from esper.urza.records import Event, Fact


class Hub:
    """An `AssetHub` over a log of events and a store of blobs. Thread-safe.

    After a failed commit it is not known what is durable: the hub is `broken`, every request raises the reason, and a
    new hub has to take over (`open` with `after_epoch`), unless the reason is `FencedError`, which is final.
    """

    def __init__(self, log: EventLog, blobs: Blobs, *, clock: Callable[[], float] = now) -> None:
        self._log = log
        self._blobs = blobs
        self._clock = clock
        self._head = Catalog(log.replay())
        self._durable = self._head.copy()
        self._fingerprint = self._head.fingerprint
        self._waiting: list[Event] = []
        self._broken: EsperError | None = None
        self._committing = False
        self._state = threading.Condition()  # guards all of the above; told of every commit

    @classmethod
    def open(cls, storage: Storage, *, clock: Callable[[], float] = now, after_epoch: int | None = None) -> Hub:
        """Takes over what lies at a storage address; makes it where there is nothing.

        Raises:
            StorageError: if the address cannot be read or written, or is of a newer schema.
            FencedError: see `DeltaLog.take_over`.
        """
        storage.check_writable()
        with _without_collection():
            return cls(DeltaLog.take_over(storage, clock, after_epoch=after_epoch), StoredBlobs(storage), clock=clock)

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
        pipeline: Pipeline = Pipeline.FAST,
    ) -> Blueprint:
        """See `AssetHub`. A target that does not fit is recorded with its reason (`targets`) and not queued.

        A target that was compiled, or failed, is queued again only if the workers are of another build by now: the
        build of the last worker that asked for work.

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
                pipeline=pipeline,
                tags=tags,
                priority=priority,
                submitted_by=submitted_by,
                parent_id=parent_id,
                fingerprint=self._fingerprint,
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

    def claim(self, worker: str, *, fingerprint: str, lease_s: float = 60.0) -> CompileJob | None:
        """See `AssetHub`. A worker holds one lease at a time: asking again returns the one it holds."""
        with self._state:
            self._fingerprint = fingerprint
            target, facts = rules.claim(
                self._head, worker, fingerprint=fingerprint, lease_s=lease_s, time=self._clock()
            )
            ticket = self._decide(facts)
            leased = None if target is None else self._head.target(target.job_id)
        self._commit(ticket)
        if leased is None:
            return None
        return CompileJob(
            job_id=leased.job_id,
            blueprint=self.blueprint(leased.blueprint_id),
            signature=leased.signature,
            pipeline=leased.pipeline,
            worker=leased.worker,
            deadline=leased.deadline,
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
        self._blobs.put(container)
        with self._state:
            kernel_id, facts = rules.complete(self._head, job, artifact, time=self._clock())
            ticket = self._decide(facts)
        self._commit(ticket)
        return self.kernel(kernel_id)

    def fail(self, job: CompileJob, reason: str) -> None:
        """See `AssetHub`. The blueprint is INVALID once every target that fits has failed; see `catalog`.

        Raises:
            LeaseLostError: if another worker has the job.
        """
        with self._state:
            ticket = self._decide(rules.fail(self._head, job, reason, time=self._clock()))
        self._commit(ticket)

    def pending(self, signatures: Sequence[SiteSignature]) -> int:
        with self._state:
            wanted = set(signatures)
            return sum(target.signature in wanted for target in self._known.open_targets())

    # ------------------------------------------------------------ kernels

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        blueprint_id: str | None = None,
        status: KernelStatus | None = KernelStatus.VALIDATED,
    ) -> list[CompiledKernelArtifact]:
        with self._state:
            return self._known.kernels(signature=signature, blueprint_id=blueprint_id, status=status)

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact:
        with self._state:
            return self._known.kernel(kernel_id)

    def fetch(self, kernel_id: str) -> memoryview:
        """See `AssetHub`.

        Raises:
            NotFoundError: if there is no such kernel.
            TamperedError: if the stored bytes have another hash.
        """
        return memoryview(self._blobs.get(self.kernel(kernel_id).kernel_id))

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

    def outcomes(self, kernel_id: str) -> Counter[Outcome]:
        """How the adaptations with this kernel ended."""
        with self._state:
            return self._known.outcomes(kernel_id)

    def project(self, storage: Storage) -> None:
        """Writes the tables `blueprints` and `kernels`, one row an id, for readers other than Urza."""
        with self._state:
            blueprints = self._known.blueprints()
            kernels = [(kernel, self._known.outcomes(kernel.kernel_id)) for kernel in self._known.kernels(status=None)]
        projections.write(storage, blueprints, kernels)

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
            self._log.append(batch)
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
