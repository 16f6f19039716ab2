"""Urza as a Ray actor: the one writer of a storage address, and the owner of the hot kernels' object refs.

Decisions live in `esper.urza.hub`. Here: opening it and taking it over again after a failed commit, telling the
compilers of new work, and serving bytes through Ray's object store. This process imports no torch.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors.cluster import NAMESPACE
from actors.logs import log_as
from esper.config import UrzaConfig
from esper.leyline import (
    Blueprint,
    BlueprintIR,
    BlueprintStatus,
    Bus,
    CompiledKernelArtifact,
    CompileJob,
    EsperError,
    Fault,
    FaultPlan,
    FencedError,
    FieldReport,
    KernelStatus,
    OonaMessage,
    Outcome,
    Pipeline,
    SiteSignature,
    StorageError,
    Topic,
    UnavailableError,
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
from esper.oona.archive import Archive
from esper.oona.archivist import Archivist
from esper.storage import Storage
from esper.urza import upkeep
from esper.urza.catalog import Target, TargetState
from esper.urza.hub import Hub

HELD_REFS = 16
"""Refs that a handle keeps; what they name stays in the object store for so long."""

MAINTENANCE_S = 600.0
"""The longest that one round may take before its caller is told that there is no answer."""

_LOG = logging.getLogger(__name__)


def actor_name(storage: Storage) -> str:
    """The name of the one Urza of a storage address."""
    return f"urza-{storage.key}"


class UrzaActor:
    """Serves one storage address. Thread-safe: Ray runs several calls at once.

    Args:
        storage: the address. It is opened on the first call, so that what is wrong with it reaches the caller as it is.
        make_bus: gives the bus on which compilers are told of new work; None tells nobody.
        config: how much it keeps at hand, and how often it tidies what.
        archive: topics of the bus that are copied to the storage; none copies nothing.
        faults: a script of faults, for tests; the places are those of `Hub`.
    """

    def __init__(
        self,
        storage: Storage,
        make_bus: Callable[[], Bus] | None = None,
        *,
        config: UrzaConfig | None = None,
        archive: Sequence[Topic] = (),
        faults: FaultPlan | None = None,
    ) -> None:
        log_as(actor_name(storage))
        self._storage = storage
        self._make_bus = make_bus
        self._config = config or UrzaConfig()
        self._hub: Hub | None = None
        self._bus: Bus | None = None
        self._hot: OrderedDict[str, tuple[ray.ObjectRef, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._faults = faults
        self._maintaining = threading.Lock()
        self._keeper: threading.Thread | None = None
        self._archived = tuple(archive)
        self._archivist: Archivist | None = None
        self._unmaintained = ""
        self._closing = threading.Event()

    def __repr__(self) -> str:
        problem = self._unmaintained
        return f"Urza({self._storage.uri})" + (f": the last maintenance failed: {problem}" if problem else "")

    def ready(self) -> int:
        """Opens the storage; returns the process id."""
        self._open_hub()
        return os.getpid()

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls a method of the hub; see `_METHODS`."""
        assert method in _METHODS, method
        return getattr(self._open_hub(), method)(*args, **kwargs)

    def census(self) -> Census:
        """The hub's, and why the last round of maintenance failed, if it did."""
        return self._open_hub().census().model_copy(update={"unmaintained": self._unmaintained})

    def kernel_briefs(self, signature: SiteSignature, pipeline: Pipeline | None) -> list[tuple[Any, ...]]:
        """The hub's, as columns: plain tuples travel in a fifth of the time that as many records take."""
        return list(zip(*self._open_hub().kernel_briefs(signature, pipeline=pipeline), strict=True))

    def submit_blueprint(self, ir: BlueprintIR, **kwargs: Any) -> Blueprint:
        """Submits, then tells the compilers. The submission stands even if nobody could be told."""
        hub = self._open_hub()
        blueprint = hub.submit_blueprint(ir, **kwargs)
        if all(target.state is not TargetState.QUEUED for target in hub.targets(blueprint.blueprint_id)):
            return blueprint
        try:
            self._tell(blueprint)
        except EsperError as error:
            # compilers look by themselves as well, only later
            _LOG.warning("blueprint.untold", extra={"blueprint_id": blueprint.blueprint_id, "reason": str(error)})
        return blueprint

    def fetch(self, kernel_id: str) -> list[ray.ObjectRef]:
        """Returns the ref of a kernel's bytes, a read-only uint8 array that this process owns, in a list.

        Ray would resolve a bare ref; a nested one travels as it is.
        """
        with self._lock:
            hot = self._hot.get(kernel_id)
            if hot is not None:
                self._hot.move_to_end(kernel_id)
        if hot is not None:
            self._open_hub().note_use(kernel_id)
            return [hot[0]]
        data = self._open_hub().fetch(kernel_id)
        ref = ray.put(np.frombuffer(data, dtype=np.uint8))
        with self._lock:
            self._hot[kernel_id] = (ref, data.nbytes)
            # a ref that falls out is kept by whoever still reads it
            while len(self._hot) > 1 and sum(size for _, size in self._hot.values()) > self._config.hot_mb * 2**20:
                self._hot.popitem(last=False)
        return [ref]

    def close(self) -> None:
        """Archives what the bus has, writes the tables for other readers, the fetches among them, lets the bus go, and
        ends maintenance: a round under way is waited for, as a thread inside Delta would take the process down with it
        at the interpreter's end.
        """
        self._closing.set()
        hub = self._open_hub()
        with self._lock:
            archivist, self._archivist, self._archived = self._archivist, None, ()
        if archivist is not None and not archivist.stop():
            _LOG.warning("urza.archive.unfinished", extra={"reason": archivist.state})
        hub.write_uses()
        hub.project(self._storage)
        with self._lock:
            bus, self._bus = self._bus, None
        if bus is not None:
            bus.close()
        if self._keeper is not None:
            self._keeper.join()

    def maintain(self, *, kept_hours: float | None = None, grace_hours: float | None = None) -> MaintenanceReport:
        """Does a round of maintenance; see `upkeep.maintain`. What is not given is as configured."""
        with self._maintaining:  # one round at a time
            kept_hours = self._config.kept_hours if kept_hours is None else kept_hours
            grace_hours = self._config.grace_hours if grace_hours is None else grace_hours
            report = upkeep.maintain(self._open_hub(), self._storage, kept_hours=kept_hours, grace_hours=grace_hours)
            self._unmaintained = "; ".join(report.problems)
            return report

    def _keep_up(self, every_s: float) -> None:
        """The maintenance thread's loop. What went wrong is logged and told (`census`); the next round tries again.

        After anything but an `EsperError` too, a bug among them: where that came in the middle of a commit or of
        tidying, the hub is broken (`Hub.broken`), and what is asked next opens another, whose state is read from the
        log. So nothing goes on that may be wrong; an address whose maintenance ended for good would fill up unseen.

        It begins with the tables for other readers: they may lack what the one before made durable, and no request
        waits for them.
        """
        deed: Callable[[], object] = self._project
        while not self._closing.is_set():
            try:
                deed()
            except FencedError as error:
                _LOG.error("urza.fenced", extra={"reason": str(error)})
                self._unmaintained = str(error)
                return
            except EsperError as error:
                _LOG.warning("urza.unmaintained", extra={"reason": str(error)})
                self._unmaintained = str(error)
            except Exception as error:  # noqa: BLE001 -- the loop edge: logged, a state, and tried again
                _LOG.exception("urza.unmaintained", extra={"reason": repr(error)})
                self._unmaintained = repr(error)
            deed = self.maintain
            self._closing.wait(every_s)

    def _project(self) -> None:
        self._open_hub().project(self._storage)

    def _open_hub(self) -> Hub:
        """The hub; a new one takes over where a commit failed, unless another Urza has done so."""
        with self._lock:
            if self._hub is None:
                self._hub = Hub.open(self._storage, faults=self._faults)
                self._archive()
                gc.freeze()  # what was read stays: no later collection, and no query during one, waits for it
                if self._config.maintain_every_s is not None:
                    every_s = (self._config.maintain_every_s,)
                    self._keeper = threading.Thread(
                        target=self._keep_up, args=every_s, name="urza-maintenance", daemon=True
                    )
                    self._keeper.start()
            elif self._hub.broken is not None and not isinstance(self._hub.broken, FencedError):
                _LOG.warning("urza.reopened", extra={"reason": str(self._hub.broken)})
                self._hub = Hub.open(self._storage, after_epoch=self._hub.epoch, faults=self._faults)
            return self._hub

    def _archive(self) -> None:
        """Copies topics of the bus to the storage in a thread: here is Delta, and here is the one writer."""
        if self._archived and self._make_bus is not None:
            self._archivist = Archivist(self._archived, self._make_bus, lambda: Archive(self._storage))

    def _tell(self, blueprint: Blueprint) -> None:
        if self._make_bus is None:
            return
        with self._lock:
            if self._bus is None:
                self._bus = self._make_bus()
            bus = self._bus
        message = OonaMessage.of(
            Topic.BLUEPRINT_SUBMITTED, blueprint, sender_id=actor_name(self._storage), key=blueprint.blueprint_id
        )
        bus.publish([message])


_METHODS = frozenset(
    {
        "backlog",
        "benchmark",
        "blueprint",
        "blueprints",
        "claim",
        "count_kernels",
        "complete",
        "descendants",
        "fail",
        "ids",
        "kernel",
        "kernel_entry",
        "kernels",
        "lineage",
        "mark_kernel",
        "outcomes",
        "outlook",
        "pending",
        "register_sites",
        "release",
        "renew",
        "report",
        "retire_blueprint",
        "search_blueprints",
        "search_kernels",
        "signatures",
        "targets",
        "write_uses",
    }
)


class UrzaHandle:
    """An `AssetHub` for other processes: every call has a deadline, errors cross unchanged.

    Args:
        actor: the actor's handle.
        deadline_s: after so long a call raises `UnavailableError`; Ray repeats it meanwhile if Urza is restarted.

    A storage that fails behind an Urza that was `ready` once is an `UnavailableError` too: it may be back, and whoever
    asks has no other storage to name.
    """

    def __init__(self, actor: Any, *, deadline_s: float = 30.0) -> None:
        self._actor = actor
        self._deadline_s = deadline_s
        self._refs: OrderedDict[str, ray.ObjectRef] = OrderedDict()  # of the kernels fetched last
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_handle, (self._actor, self._deadline_s))

    def __repr__(self) -> str:
        return f"UrzaHandle({self._actor})"

    def within(self, deadline_s: float) -> UrzaHandle:
        """The same Urza, asked with another deadline."""
        return UrzaHandle(self._actor, deadline_s=deadline_s)

    def ready(self) -> int:
        """Waits until Urza answers; returns its process id.

        Raises:
            StorageError: if the address cannot be read or written.
        """
        return _get(self._actor.ready.remote(), self._deadline_s, names_storage=True)

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
        """See `Hub.submit_blueprint`."""
        return self._ask(
            "submit_blueprint",
            ir,
            name=name,
            targets=tuple(targets),
            tags=tuple(tags),
            priority=priority,
            submitted_by=submitted_by,
            parent_id=parent_id,
            metadata=metadata,
            pipelines=tuple(pipelines),
        )

    def blueprint(self, blueprint_id: str) -> Blueprint:
        return self._call("blueprint", blueprint_id)

    def blueprints(self, *, status: BlueprintStatus | None = None, name: str | None = None) -> list[Blueprint]:
        return self._call("blueprints", status=status, name=name)

    def search_blueprints(self, query: BlueprintQuery) -> BlueprintPage:
        """See `Hub.search_blueprints`."""
        return self._call("search_blueprints", query)

    def ids(self, prefix: str) -> Ids:
        """See `Hub.ids`."""
        return self._call("ids", prefix)

    def lineage(self, blueprint_id: str) -> list[Blueprint]:
        """See `Hub.lineage`."""
        return self._call("lineage", blueprint_id)

    def descendants(self, blueprint_id: str) -> list[Blueprint]:
        """See `Hub.descendants`."""
        return self._call("descendants", blueprint_id)

    def outlook(self, blueprint_id: str) -> Outlook:
        """See `Hub.outlook`."""
        return self._call("outlook", blueprint_id)

    def signatures(self) -> list[SiteSignature]:
        """See `Hub.signatures`."""
        return self._call("signatures")

    def register_sites(self, signatures: Sequence[SiteSignature], *, run_id: str) -> None:
        """See `AssetHub`."""
        self._call("register_sites", tuple(signatures), run_id=run_id)

    def census(self) -> Census:
        """See `Hub.census`."""
        return self._ask("census")

    def targets(self, blueprint_id: str) -> list[Target]:
        """See `Hub.targets`."""
        return self._call("targets", blueprint_id)

    def retire_blueprint(self, blueprint_id: str, reason: str) -> None:
        """See `Hub.retire_blueprint`."""
        self._call("retire_blueprint", blueprint_id, reason)

    def claim(self, worker: str, *, fingerprint: str, device: str = "cpu", lease_s: float = 60.0) -> CompileJob | None:
        """See `Hub.claim`."""
        return self._call("claim", worker, fingerprint=fingerprint, device=device, lease_s=lease_s)

    def complete(self, job: CompileJob, artifact: CompiledKernelArtifact, container: bytes) -> CompiledKernelArtifact:
        """See `Hub.complete`."""
        return self._call("complete", job, artifact, container)

    def renew(self, job: CompileJob, *, lease_s: float = 60.0) -> CompileJob:
        """See `Hub.renew`."""
        return self._call("renew", job, lease_s=lease_s)

    def release(self, job: CompileJob, fault: Fault, reason: str, *, log: str = "") -> bool:
        """See `Hub.release`."""
        return self._call("release", job, fault, reason, log=log)

    def fail(self, job: CompileJob, reason: str, *, log: str = "") -> None:
        """See `Hub.fail`."""
        self._call("fail", job, reason, log=log)

    def backlog(self) -> Backlog:
        """See `Hub.backlog`."""
        return self._call("backlog")

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        blueprint_id: str | None = None,
        status: KernelStatus | None = KernelStatus.VALIDATED,
        pipeline: Pipeline | None = None,
    ) -> list[CompiledKernelArtifact]:
        return self._call("kernels", signature=signature, blueprint_id=blueprint_id, status=status, pipeline=pipeline)

    def kernel_briefs(self, signature: SiteSignature, *, pipeline: Pipeline | None = None) -> list[KernelBrief]:
        """See `AssetHub`."""
        columns = self._ask("kernel_briefs", signature, pipeline)
        return list(map(KernelBrief._make, zip(*columns, strict=True)))

    def count_kernels(self, signatures: Sequence[SiteSignature], *, pipeline: Pipeline | None = None) -> int:
        """See `AssetHub`."""
        return self._call("count_kernels", tuple(signatures), pipeline=pipeline)

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact:
        return self._call("kernel", kernel_id)

    def search_kernels(self, query: KernelQuery) -> KernelPage:
        """See `Hub.search_kernels`."""
        return self._call("search_kernels", query)

    def kernel_entry(self, kernel_id: str) -> KernelEntry:
        """See `Hub.kernel_entry`."""
        return self._call("kernel_entry", kernel_id)

    def benchmark(self, result: BenchmarkResult) -> None:
        """See `Hub.benchmark`."""
        self._call("benchmark", result)

    def write_uses(self) -> int:
        """See `Hub.write_uses`."""
        return self._call("write_uses")

    def maintain(self, *, kept_hours: float | None = None, grace_hours: float | None = None) -> MaintenanceReport:
        """Does a round of maintenance now; see `upkeep.maintain`."""
        return _get(self._actor.maintain.remote(kept_hours=kept_hours, grace_hours=grace_hours), MAINTENANCE_S)

    def mark_kernel(self, kernel_id: str, status: KernelStatus, reason: str) -> None:
        """See `Hub.mark_kernel`."""
        self._call("mark_kernel", kernel_id, status, reason)

    def pending(self, signatures: Sequence[SiteSignature], *, pipeline: Pipeline | None = None) -> int:
        return self._call("pending", tuple(signatures), pipeline=pipeline)

    def report(self, report: FieldReport) -> None:
        """See `Hub.report`."""
        self._call("report", report)

    def outcomes(self, kernel_id: str) -> Counter[Outcome]:
        """See `Hub.outcomes`."""
        return self._call("outcomes", kernel_id)

    def fetch(self, kernel_id: str) -> memoryview:
        """See `AssetHub`. The view lies in shared memory, without a copy, for as long as it is held.

        The refs of the last few kernels are kept: an id names its bytes, so a ref never goes stale. When Urza dies its
        refs die with it; then its successor is asked again, until the deadline.
        """
        deadline = time.monotonic() + self._deadline_s
        while True:
            with self._lock:
                ref = self._refs.pop(kernel_id, None)
            try:
                if ref is None:
                    ref = self._locate(kernel_id, deadline - time.monotonic())
                array = _get(ref, deadline - time.monotonic())
            except ObjectLostError as error:
                _LOG.info("kernel.ref_lost", extra={"kernel_id": kernel_id, "reason": type(error).__name__})
                continue
            with self._lock:
                self._refs[kernel_id] = ref
                while len(self._refs) > HELD_REFS:
                    self._refs.popitem(last=False)
            return memoryview(array)

    def close(self) -> None:
        """For before Urza is ended: it writes the tables for other readers and does no more maintenance."""
        self._ask("close")

    def _locate(self, kernel_id: str, timeout_s: float) -> ray.ObjectRef:
        [ref] = _get(self._actor.fetch.remote(kernel_id), timeout_s)
        return ref

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", method, args, kwargs)

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _get(getattr(self._actor, method).remote(*args, **kwargs), self._deadline_s)


def _handle(actor: Any, deadline_s: float) -> UrzaHandle:
    """A handle in another process; refs and locks stay where they are."""
    return UrzaHandle(actor, deadline_s=deadline_s)


def _get(ref: ray.ObjectRef, timeout_s: float, *, names_storage: bool = False) -> Any:
    """`ray.get` with the library's errors; an `ObjectLostError` passes, and with `names_storage` a `StorageError`."""
    try:
        return ray.get(ref, timeout=max(timeout_s, 0.0))
    except GetTimeoutError as error:
        raise UnavailableError("Urza did not answer within its deadline") from error
    except RayTaskError as error:
        if isinstance(error.cause, StorageError) and not names_storage:
            raise UnavailableError(f"Urza's storage fails: {error.cause}") from error
        if isinstance(error.cause, EsperError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise UnavailableError(f"Urza is gone: {error}") from error


def spawn(
    address: str,
    options: Mapping[str, Any] | None = None,
    *,
    make_bus: Callable[[], Bus] | None = None,
    detached: bool = False,
    num_cpus: float = 0.1,
    deadline_s: float = 30.0,
    config: UrzaConfig | None = None,
    archive: Sequence[Topic] = (),
    faults: FaultPlan | None = None,
) -> UrzaHandle:
    """Starts the Urza of a storage address, or joins the one that runs.

    Args:
        address: see `Storage.at`.
        options: `storage_options` of the configuration.
        make_bus: see `UrzaActor`; must pickle.
        detached: whether it outlives this driver.
        num_cpus: CPUs that Ray counts for it.
        deadline_s: deadline of the handle's calls.
        config: see `UrzaActor`; where one runs already, its own holds.
        archive: see `UrzaActor`; where one runs already, its own holds.
        faults: see `UrzaActor`; must pickle.

    Raises:
        StorageError: if the address cannot be written.
        UnavailableError: if it does not come up within the deadline.
    """
    storage = Storage.at(address, options)
    storage.check_writable()
    actor = (
        ray.remote(UrzaActor)
        .options(
            name=actor_name(storage),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached" if detached else None,
            num_cpus=num_cpus,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=8,
        )
        .remote(storage, make_bus, config=config, archive=tuple(archive), faults=faults)
    )
    handle = UrzaHandle(actor, deadline_s=deadline_s)
    handle.ready()
    return handle


def connect(address: str, options: Mapping[str, Any] | None = None, *, deadline_s: float = 30.0) -> UrzaHandle:
    """Finds the Urza of a storage address on this cluster.

    Raises:
        UnavailableError: if none runs.
    """
    storage = Storage.at(address, options)
    try:
        actor = ray.get_actor(actor_name(storage), namespace=NAMESPACE)
    except ValueError as error:
        raise UnavailableError(f"no Urza runs for {storage.uri}", remedy="esper platform up") from error
    return UrzaHandle(actor, deadline_s=deadline_s)
