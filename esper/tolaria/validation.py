"""Validation of a run, booked: of the host, and of each seed in TRAINING behind it, which is the seed's evidence."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from esper.leyline.errors import KernelFaultError, NonFiniteError
from esper.leyline.growth import ELSEWHERE
from esper.tolaria.costs import HostCosts
from esper.tolaria.course import Course
from esper.tolaria.evidence import Evaluation, compare, evaluate
from esper.tolaria.precision import Precision
from esper.tolaria.recorder import Recorder
from esper.tolaria.shadows import Shadows
from esper.tolaria.slowness import Slowness
from esper.tolaria.trying import Trying
from esper.tolaria.workload import Batches


class Validation:
    """Of one run.

    Args:
        course: the run.
        val: validation batches; None gives no evidence.
        shadows: whose seeds evidence is taken for.
        costs: counts what forwards cost.
        precision: of forwards.
        recorder: told what each seed cost.
        slowness: says which kernels take too long.
        trying: told how many samples there are.
    """

    def __init__(
        self,
        course: Course,
        val: Batches | None,
        *,
        shadows: Shadows,
        costs: HostCosts,
        precision: Precision,
        recorder: Recorder,
        slowness: Slowness,
        trying: Trying,
    ) -> None:
        self._course = course
        self._val = val
        self._shadows = shadows
        self._costs = costs
        self._precision = precision
        self._recorder = recorder
        self._slowness = slowness
        self._trying = trying

    def evaluate(self, batches: Batches, *, purpose: str, mode: str) -> Evaluation:
        """One pass over a split, booked under `purpose`. Collective.

        Args:
            batches: the split.
            purpose: of the ledger.
            mode: tells apart forwards that cost differently.

        Raises:
            NonFiniteError: if the loss is not finite.
            KernelFaultError: if a kernel on the live path fails.
        """
        course = self._course

        def counted(run: Callable[[], Any], args: tuple[Any, ...]) -> Any:
            result, flops = self._costs.counting(args, run, mode=mode)
            course.ledger.add(purpose, flops=flops)
            return result

        ranks = course.ports.ranks
        share = batches.epoch(course.epoch, rank=ranks.rank, world=ranks.world)
        with course.ledger.timed(purpose):
            result = evaluate(
                course.growable.module,
                share,
                course.task,
                ranks=ranks,
                device=course.device,
                run=counted,
                precision=self._precision,
            )
        self.settle()
        return result

    def settle(self) -> None:
        """Moves the FLOPs of the other ranks into rank 0's account; seconds are those of its clock. Collective."""
        course = self._course
        if course.ports.ranks.world == 1:
            return
        others = course.ports.ranks.gather(None if course.is_first else course.ledger.take_flops())
        if course.is_first:
            for flops in filter(None, others):
                course.ledger.book(flops)

    def of_host(self) -> Evaluation | None:
        """Validates the live path; None without validation batches. Collective.

        Raises:
            NonFiniteError: if its loss is not finite.
            KernelFaultError: if a kernel on it fails.
        """
        if self._val is None:
            return None
        found = self.evaluate(self._val, purpose="validation", mode="eval")
        self._trying.validated(found.num_samples)
        return found

    def take_evidence(self, host: Evaluation | None) -> None:
        """Validates behind the host each seed in TRAINING, and records the paired difference; one that fails, or takes
        too long, is at fault. Collective.

        Args:
            host: of the live path, as it stands.
        """
        course = self._course
        if self._val is None or host is None:
            return
        for seed_id in self._shadows.seeds:
            fails = course.ports.ranks.agree(self._fault_of(seed_id) or self._slowness.verdict(seed_id))
            if fails is not None:
                course.growable.fault(seed_id, fails)
                continue
            began, before = time.perf_counter(), course.ledger.snapshot().flops.shadow
            try:
                with course.growable.shadowed(seed_id):
                    candidate = self.evaluate(self._val, purpose="shadow", mode=f"eval-{seed_id}")
            except (NonFiniteError, KernelFaultError) as error:  # of the kernel alone: the host's own loss was sound
                course.growable.fault(seed_id, error.message)
                continue
            evidence = compare(host, candidate, ranks=course.ports.ranks, device=course.device)
            course.growable.record_evidence(seed_id, evidence)
            flops = course.ledger.snapshot().flops.shadow - before
            self._recorder.spend(seed_id, flops=flops, seconds=time.perf_counter() - began)

    def _fault_of(self, seed_id: str) -> str | None:
        """How a seed's kernel failed on this rank."""
        seed = self._course.seed(seed_id)
        return None if seed is None or seed.fault == ELSEWHERE else seed.fault or None
