"""The seams between systems. A port says what a system may ask of another; the library ships an in-memory double
of each, and `actors/` the remote one. Every call may raise `UnavailableError` when its deadline passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from esper.leyline.blueprints import Blueprint, BlueprintIR
from esper.leyline.bus import BusStats, DeadLetter
from esper.leyline.catalogue import Backlog, BenchmarkResult, KernelBrief
from esper.leyline.contract import Contract, Finite
from esper.leyline.kernels import (
    BlueprintStatus,
    CompiledKernelArtifact,
    KernelStatus,
    Pipeline,
    SiteSignature,
)
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.signals import AdaptationSignal, FieldReport, SystemStatePacket
from esper.leyline.summary import BusCounts
from esper.leyline.trials import Fork, ForkResult

# ---------------------------------------------------------------- Oona


class Delivery(NamedTuple):
    """A message as a consumer gets it. (shard, offset) is the same on redelivery.

    There are as many as messages, and they stay in one process: a model would cost as much as half the message.
    """

    shard: int
    offset: int
    message: OonaMessage
    attempt: int = 1


class ReadPage(Contract):
    """Messages as they lie with the broker.

    Attributes:
        deliveries: in the order of each shard; `attempt` says nothing here.
        undecodable: (shard, offset) of what is no message.
        positions: of each shard, where to go on.
        is_end: whether there was nothing beyond at that moment.
    """

    deliveries: tuple[Delivery, ...] = ()
    undecodable: tuple[tuple[int, int], ...] = ()
    positions: dict[int, int]
    is_end: bool


class Subscription(Protocol):
    """A member of a consumer group. Not acknowledged within the lease: delivered again, perhaps to another member."""

    def poll(self, *, max_messages: int = 256, timeout_s: float = 1.0) -> list[Delivery]:
        """Returns the next messages, at most `max_messages`; an empty list after `timeout_s`."""
        ...

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledges; acknowledging twice is harmless."""
        ...

    def reject(self, deliveries: Sequence[Delivery], *, reason: str) -> None:
        """Gives messages up for the whole group: they go to the dead letters, and the next ones come."""
        ...

    def close(self) -> None:
        """Leaves the group; what was not acknowledged is delivered to others at once."""
        ...


class Bus(Protocol):
    """Oona: at least once, in order within (topic, key)."""

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        """Queues messages; returns once they are accepted locally, and blocks while the backlog is full."""
        ...

    def flush(self, *, timeout_s: float = 10.0) -> None:
        """Returns once all that was published is acknowledged by the broker."""
        ...

    def subscribe(
        self,
        topics: Sequence[Topic],
        *,
        group: str,
        key: str | None = None,
        from_start: bool = False,
        from_offsets: Mapping[int, int] | None = None,
        from_time: float | None = None,
    ) -> Subscription:
        """Joins `group`. `key` filters at the broker.

        A new group starts at the end of the log, or at one of these: `from_start`, the oldest that is kept;
        `from_offsets`, an offset for each shard (a shard that is not named: its end); `from_time`, the first message
        that the broker took at or after this time, in seconds since the epoch.
        """
        ...

    def listen(
        self, topics: Sequence[Topic], *, key: str | None = None, from_start: bool = False, name: str = ""
    ) -> Subscription:
        """Gets all of it, whoever else does: a broadcast. The group is this listener's alone and ends with its `close`;
        one that dies without a word is forgotten after ten minutes. `name` says who listens, in the bus's figures.
        """
        ...

    def read(
        self,
        topics: Sequence[Topic] = (),
        *,
        key: str | None = None,
        positions: Mapping[int, int] | None = None,
        from_time: float | None = None,
        max_messages: int = 256,
    ) -> ReadPage:
        """Looks at kept messages without a group: nothing is leased, counted or held back by it.

        Args:
            topics: none means all.
            key: None means all.
            positions: where to begin in each shard; what a page returned goes on where it ended. None: at the start.
            from_time: instead of `positions`, see `subscribe`.
            max_messages: at most so many from each shard.
        """
        ...

    def requeue(self, letters: Sequence[DeadLetter]) -> int:
        """Gives messages that were given up to their groups again, to no other group, in their place in the order;
        returns how many. Those that came back already, or are no longer kept, are passed over.

        Raises:
            NotFoundError: if a group is gone.
        """
        ...

    def counts(self, key: str) -> BusCounts:
        """The counts of messages with this key."""
        ...

    def stats(self) -> BusStats:
        """The figures of every topic and group."""
        ...

    def close(self) -> None:
        """Flushes and lets go."""
        ...


# ---------------------------------------------------------------- Urza


class Fault(StrEnum):
    """What a job that comes back without a kernel says about its compiler; a blueprint at fault is for `fail`."""

    NONE = "none"  # the worker ends, and another goes on
    ERROR = "error"  # the compiler failed
    DEATH = "death"  # the compiler crashed, or was killed at a limit


class CompileJob(Contract):
    """Work that a compiler has leased: one blueprint for one signature by one pipeline.

    Attributes:
        lease: which of the leases of this work it is; 0 for work that no hub has leased.
        deadline: until then the lease holds, in seconds since the epoch; `renew` moves it.
    """

    job_id: str
    blueprint: Blueprint
    signature: SiteSignature
    pipeline: Pipeline
    worker: str
    lease: int = 0
    deadline: Finite


class AssetHub(Protocol):
    """Urza: what it acknowledged is durable."""

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
        pipelines: Sequence[Pipeline] = (Pipeline.FAST,),
    ) -> Blueprint:
        """Registers a design and queues it for `targets` by each of `pipelines`. The same IR under the same name is
        the same blueprint; what is compiled already is not compiled again. Urgent work (a high `priority`) goes first,
        and within a priority FAST before OPTIMIZED.

        Raises:
            BlueprintError: if the IR is malformed.
        """
        ...

    def register_sites(self, signatures: Sequence[SiteSignature], *, run_id: str) -> None:
        """Notes the signatures of a run's sites: designs that are submitted without targets are compiled for them."""
        ...

    def blueprint(self, blueprint_id: str) -> Blueprint: ...

    def blueprints(self, *, status: BlueprintStatus | None = None, name: str | None = None) -> list[Blueprint]: ...

    def claim(self, worker: str, *, fingerprint: str, device: str = "cpu", lease_s: float = 60.0) -> CompileJob | None:
        """Leases the most urgent job that needs `device` (`leyline.device_for`), or returns None.

        Args:
            worker: `name` or `name#life`. A worker holds one lease: asking again returns it. A lease that another life
                of the same name holds is lost: that process is dead.
            fingerprint: the worker's build.
            device: what the worker compiles for.
            lease_s: seconds until the lease runs out, unless it is renewed.
        """
        ...

    def renew(self, job: CompileJob, *, lease_s: float = 60.0) -> CompileJob:
        """Moves a lease's deadline to `lease_s` from now.

        Raises:
            LeaseLostError: if it ran out and was ended meanwhile.
        """
        ...

    def release(self, job: CompileJob, fault: Fault, reason: str, *, log: str = "") -> bool:
        """Gives a job back without a kernel. After 3 errors, or 2 deaths or lost leases, it has failed for good.

        Args:
            job: as it was leased or renewed.
            fault: see `Fault`.
            reason: what happened, in words.
            log: the last lines that the compiler wrote.

        Returns:
            Whether it will be tried again.

        Raises:
            LeaseLostError: if another worker has the job.
        """
        ...

    def complete(self, job: CompileJob, artifact: CompiledKernelArtifact, container: bytes) -> CompiledKernelArtifact:
        """Stores the container, then the record; returns once both are durable. Repeating it is harmless.

        Raises:
            LeaseLostError: if the lease ran out and another worker has the job.
            TamperedError: if the container's hash is not `artifact.kernel_id`.
        """
        ...

    def fail(self, job: CompileJob, reason: str, *, log: str = "") -> None:
        """Gives a job up, for the blueprint is at fault; it is INVALID where every target of it failed."""
        ...

    def kernels(
        self,
        *,
        signature: SiteSignature | None = None,
        blueprint_id: str | None = None,
        status: KernelStatus | None = KernelStatus.VALIDATED,
        pipeline: Pipeline | None = None,
    ) -> list[CompiledKernelArtifact]: ...

    def kernel(self, kernel_id: str) -> CompiledKernelArtifact: ...

    def kernel_briefs(self, signature: SiteSignature, *, pipeline: Pipeline | None = None) -> list[KernelBrief]:
        """The validated kernels for a signature, oldest first: what one chooses from."""
        ...

    def count_kernels(self, signatures: Sequence[SiteSignature], *, pipeline: Pipeline | None = None) -> int:
        """How many validated kernels there are for these signatures."""
        ...

    def backlog(self) -> Backlog:
        """How much is to be compiled."""
        ...

    def pending(self, signatures: Sequence[SiteSignature], *, pipeline: Pipeline | None = None) -> int:
        """How many jobs for these signatures, by this pipeline or by any, are queued or being compiled."""
        ...

    def fetch(self, kernel_id: str) -> memoryview:
        """The container's bytes, read-only; not yet verified: the reader does that.

        Raises:
            NotFoundError: if there is no such kernel.
        """
        ...

    def report(self, report: FieldReport) -> None:
        """Adds what became of a kernel to its statistics."""
        ...

    def benchmark(self, result: BenchmarkResult) -> None:
        """Adds a measurement to a kernel; repeating it is harmless."""
        ...


# ---------------------------------------------------------------- Tamiyo


class Controller(Protocol):
    """Tamiyo as a trainer sees it. The state is JSON, opaque to the trainer, which checkpoints it."""

    def decide(self, state: dict[str, Any], packet: SystemStatePacket) -> tuple[dict[str, Any], AdaptationSignal]: ...


# ---------------------------------------------------------------- trials


class Trials(Protocol):
    """Where forks of a run train, on what nobody else uses. One trial at a time; used on rank 0 alone."""

    def idle(self) -> int:
        """How many forks could begin at once now."""
        ...

    def start(self, checkpoint: bytes, forks: Sequence[Fork]) -> None:
        """Begins a trial; returns at once. Forks begin as room comes, in their order.

        Args:
            checkpoint: what all of them begin from; see `esper.tolaria.forks.pack`.
            forks: what each does.

        Raises:
            UnavailableError: if they cannot be begun here.
        """
        ...

    def results(self) -> Mapping[str, ForkResult]:
        """Those that have ended, by id: well, or with a failure. What was begun is among them at last."""
        ...

    def cancel(self, reason: str) -> Mapping[str, ForkResult]:
        """Ends what still runs, and returns all results: those that are ended by it have `reason` as their failure."""
        ...


# ---------------------------------------------------------------- faults


class FaultPlan(Protocol):
    """A script of faults for tests. `at` is called at named places and may kill, delay or raise there."""

    def at(self, place: str, step: int) -> None: ...


class NoFaults:
    """The plan of every real run."""

    def at(self, place: str, step: int) -> None:
        """Does nothing."""
