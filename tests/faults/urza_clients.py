"""Clients of Urza that do all that its clients do, and remember what was acknowledged to them."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from actors import urza
from actors.urza import UrzaHandle
from esper.leyline import (
    Blueprint,
    BlueprintIR,
    Check,
    CompiledKernelArtifact,
    CompileJob,
    ConflictError,
    Fault,
    FieldReport,
    KernelStatus,
    LeaseLostError,
    Node,
    Outcome,
    SiteKind,
    SiteSignature,
    UnavailableError,
    ValidationReport,
    new_id,
)
from esper.leyline.catalogue import BenchmarkResult, KernelQuery
from esper.tezzeret.compile import compile_kernel

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SIGNATURES = tuple(SiteSignature(kind=SiteKind.VECTOR, channels=channels) for channels in (8, 16))
BUILD = "soak"
PATIENCE_S = 120.0
PAUSE_S = 0.02
"""From one request of a client to its next: a laptop's cores are shared."""


@dataclass
class Ledger:
    """What one client was told, and what it was not told the end of."""

    blueprints: dict[str, tuple[str, int]] = field(default_factory=dict)  # id -> name, number of targets
    retired_blueprints: set[str] = field(default_factory=set)
    leased: set[str] = field(default_factory=set)  # jobs
    renewed: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # job -> reason
    kernels: dict[str, str] = field(default_factory=dict)  # id -> job
    retired_kernels: set[str] = field(default_factory=set)
    reports: dict[str, str] = field(default_factory=dict)  # report -> kernel
    benchmarks: dict[str, str] = field(default_factory=dict)  # benchmark -> kernel
    unanswered: Counter[str] = field(default_factory=Counter)  # requests by name
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def num_acknowledged(self) -> int:
        """Writes that must be there."""
        work = (self.leased, self.renewed, self.released, self.failed, self.kernels)
        rest = (self.blueprints, self.retired_blueprints, self.retired_kernels, self.reports, self.benchmarks)
        return sum(map(len, (*work, *rest)))

    def rows(self) -> set[tuple[str, str]]:
        """Kind and id of each event that the log must hold."""
        parts: dict[str, Any] = {
            "blueprint.submitted": self.blueprints,
            "blueprint.retired": self.retired_blueprints,
            "target.leased": self.leased,
            "target.renewed": self.renewed,
            "target.released": self.released,
            "target.failed": self.failed,
            "kernel.stored": self.kernels,
            "target.compiled": self.kernels.values(),
            "kernel.marked": self.retired_kernels,
            "kernel.reported": self.reports,
            "kernel.benchmarked": self.benchmarks,
        }
        return {(kind, id_) for kind, ids in parts.items() for id_ in ids}


class Handle(UrzaHandle):
    """Remembers the requests that it gave up: Urza may be at them still."""

    def __init__(self, actor: Any, *, deadline_s: float) -> None:
        super().__init__(actor, deadline_s=deadline_s)
        self._given_up: list[ray.ObjectRef] = []

    def settle(self, timeout_s: float) -> None:
        """Returns once Urza is at none of them any more."""
        refs, self._given_up = self._given_up, []
        if refs:
            _, left = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
            assert not left, f"Urza is still at {len(left)} requests"

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        ref = getattr(self._actor, method).remote(*args, **kwargs)
        try:
            return urza._get(ref, self._deadline_s)
        except UnavailableError:
            self._given_up.append(ref)
            raise


class Client:
    """One client, with a worker's name of its own. What it does next is drawn from its seed.

    Args:
        number: of the client.
        handle: Urza. A short deadline makes an impatient client: it gives up on a request and goes on.
        private_key: the signer's.
        segment: a name that no other soak on this storage has.
    """

    def __init__(self, number: int, handle: Handle, private_key: Ed25519PrivateKey, segment: str) -> None:
        self.ledger = Ledger()
        self.problem: BaseException | None = None
        self.acknowledged_at: list[float] = []
        """When it was told of a write that it is durable."""
        self._worker = f"{segment}-client-{number}"
        self._hub = handle
        self._key = private_key
        self._random = random.Random(f"{segment}-{number}")
        self._names = itertools.count()

    def run(self, stop: threading.Event) -> None:
        """Works until it is told to stop, or something is not as it was acknowledged (`problem`)."""
        try:
            while not stop.wait(PAUSE_S):
                self._turn()
        except BaseException as error:  # noqa: BLE001 - the thread's edge: the test raises it
            self.problem = error

    def settle(self, timeout_s: float) -> None:
        """Returns once none of its requests is under way any more."""
        self._hub.settle(timeout_s)

    def _turn(self) -> None:
        deeds: dict[Callable[[], None], int] = {
            self._submit: 4,
            self._work: 8,
            self._report: 3,
            self._benchmark: 2,
            self._fetch: 4,
            self._search: 2,
            self._retire_kernel: 1,
            self._retire_blueprint: 1,
        }
        [deed] = self._random.choices(list(deeds), weights=list(deeds.values()))
        before = self.ledger.num_acknowledged
        try:
            deed()
        except UnavailableError:
            self.ledger.unanswered[deed.__name__.strip("_")] += 1
        except (ConflictError, LeaseLostError) as error:
            self.ledger.refused[type(error).__name__] += 1
        if self.ledger.num_acknowledged > before:
            self.acknowledged_at.append(time.time())

    # ------------------------------------------------------------ designs

    def _submit(self) -> None:
        name = f"{self._worker}-{next(self._names)}"
        targets = SIGNATURES[: self._random.choice((1, 2))]
        parent_id = self._some(self.ledger.blueprints) if self._random.random() < 0.3 else None
        answer = self._hub.submit_blueprint(
            self._design(), name=name, targets=targets, parent_id=parent_id, submitted_by=self._worker,
            metadata={"num_targets": len(targets)},
        )  # fmt: skip
        assert isinstance(answer, Blueprint)
        self.ledger.blueprints[answer.blueprint_id] = (name, len(targets))

    def _design(self) -> BlueprintIR:
        """A deep adapter of random widths: often another IR, sometimes one that was compiled already."""
        first, second = self._random.randint(1, 40), self._random.randint(1, 40)
        return BlueprintIR(
            fit=(SiteKind.VECTOR,),
            nodes=(
                Node(id="one", op="linear", params={"out": first}),
                Node(id="act", op="relu", inputs=("one",)),
                Node(id="two", op="linear", inputs=("act",), params={"out": second}),
                Node(id="back", op="linear", inputs=("two",), params={"out": "C"}),
            ),
            output="back",
        )

    def _retire_blueprint(self) -> None:
        id_ = self._some(self.ledger.blueprints)
        if id_ is not None:
            self._hub.retire_blueprint(id_, "soak")
            self.ledger.retired_blueprints.add(id_)

    # ------------------------------------------------------------ work

    def _work(self) -> None:
        job = self._hub.claim(self._worker, fingerprint=BUILD)
        if job is None:
            return
        self.ledger.leased.add(job.job_id)
        end = self._random.random()
        if end < 0.1:
            self._hub.renew(job, lease_s=120.0)
            self.ledger.renewed.add(job.job_id)
            self._hub.release(job, Fault.NONE, "soak")
            self.ledger.released.add(job.job_id)
            return
        if end < 0.25:
            reason = f"no use: {self._worker}"
            self._hub.fail(job, reason)
            self.ledger.failed[job.job_id] = reason
            return
        artifact, container = compiled(job, self._key)
        stands = self._hub.complete(job, artifact, container)
        assert stands.compile_key == artifact.compile_key
        self.ledger.kernels[stands.kernel_id] = job.job_id

    # ------------------------------------------------------------ use

    def _report(self) -> None:
        kernel = self._some_kernel()
        if kernel is None:
            return
        report = FieldReport(
            run_id="soak", site="body", seed_id="body.0", signature=kernel.signature, blueprint_id=kernel.blueprint_id,
            blueprint=kernel.blueprint_name, kernel_id=kernel.kernel_id, outcome=Outcome.FOSSILIZED, report_id=new_id(),
        )  # fmt: skip
        self._hub.report(report)
        self.ledger.reports[report.report_id] = kernel.kernel_id

    def _benchmark(self) -> None:
        kernel = self._some_kernel()
        if kernel is None:
            return
        speed = self._random.uniform(0.5, 2.0)
        result = BenchmarkResult(benchmark_id=new_id(), kernel_id=kernel.kernel_id, name="step", speed=speed)
        self._hub.benchmark(result)
        self.ledger.benchmarks[result.benchmark_id] = kernel.kernel_id

    def _retire_kernel(self) -> None:
        id_ = self._some(self.ledger.kernels)
        if id_ is not None:
            self._hub.mark_kernel(id_, KernelStatus.RETIRED, "soak")
            self.ledger.retired_kernels.add(id_)

    def _fetch(self) -> None:
        """What was acknowledged can be fetched at any time, and is what its name says."""
        id_ = self._some(self.ledger.kernels)
        if id_ is not None:
            assert hashlib.sha256(self._hub.fetch(id_)).hexdigest() == id_

    def _search(self) -> None:
        """What was acknowledged is found at any time."""
        id_ = self._some(self.ledger.kernels)
        if id_ is not None:
            retired = id_ in self.ledger.retired_kernels
            assert (self._hub.kernel(id_).status is KernelStatus.RETIRED) >= retired
        page = self._hub.search_kernels(KernelQuery(signature=self._random.choice(SIGNATURES), limit=10))
        assert len(page.kernels) == min(page.total, 10)

    def _some_kernel(self) -> CompiledKernelArtifact | None:
        id_ = self._some(self.ledger.kernels)
        return None if id_ is None else self._hub.kernel(id_)

    def _some(self, known: dict[str, Any]) -> str | None:
        return self._random.choice(list(known)) if known else None


def compiled(job: CompileJob, private_key: Ed25519PrivateKey) -> tuple[CompiledKernelArtifact, bytes]:
    """A real container with real weights; the examination is left out, as this is about Urza."""
    passed = ValidationReport(checks=(Check(name="soak", passed=True),))
    return compile_kernel(job, fingerprint=BUILD, private_key=private_key, examine=lambda *_: passed)
