"""Asking for native code of what was grafted, and for its place in the host once it is there.

At the end of every epoch rank 0 looks which kernels on the live path run from their IR, has native code compiled for
their designs, and finds what is ready; all ranks then ask Kasmina for the same. What is compiled once serves every run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from esper.config import RunConfig
from esper.leyline.errors import NotFoundError
from esper.leyline.growth import SeedView
from esper.leyline.kernels import CompiledKernelArtifact, Pipeline
from esper.leyline.native import Rung, RungChange
from esper.leyline.ports import AssetHub
from esper.tolaria.chronicle import Chronicle
from esper.tolaria.course import Course
from esper.tolaria.reach import Reach

PRIORITY = 3
"""Below the kernels that runs wait for."""

_Answer = tuple[str, str, str]
"""A seed's id, the id of the kernel that has its native code (empty if there will be none), and why."""


def optimizes(config: RunConfig, *, num_trainers: int, num_cores: int) -> bool:
    """Whether a run asks for native code.

    Args:
        config: of the run.
        num_trainers: its ranks.
        num_cores: that it and the compilers share; compilers on other machines are asked for by `grafted`.
    """
    wish = config.tezzeret.optimize
    if config.deterministic or wish == "never":
        return False
    spare = num_cores - num_trainers * config.tolaria.num_threads
    return wish == "grafted" or spare >= max(1, config.tezzeret.min_workers)


class Optimizing:
    """The native code of one run.

    Args:
        course: the run.
        chronicle: told why a kernel stays on its IR.
        reach: to Urza.
    """

    def __init__(self, course: Course, *, chronicle: Chronicle, reach: Reach) -> None:
        self._course = course
        self._chronicle = chronicle
        self._reach = reach
        num_trainers = course.ports.ranks.world
        wanted = optimizes(course.config, num_trainers=num_trainers, num_cores=num_usable_cores())
        self._is_wanted = course.ports.ranks.broadcast(wanted)  # machines differ in cores, ranks must not in calls
        self._submitted: set[tuple[str, str]] = set()
        self._settled: set[tuple[str, str]] = set()  # a seed may live again, with another kernel

    def look(self) -> None:
        """Asks for what is not there yet, and takes up what is. Collective."""
        if not self._is_wanted:
            return
        course = self._course
        seeds = [seed for seed in course.growable.seeds() if self._is_open(seed)]
        if not seeds:
            return
        hub, answers = course.ports.hub, None
        if course.is_first:
            answers = None if hub is None else self._reach.ask("Urza", lambda: self._ask(hub, seeds))
            answers = answers or ()
        for seed_id, kernel_id, reason in course.ports.ranks.broadcast(answers):
            asked = next(seed for seed in seeds if seed.seed_id == seed_id)
            self._settled.add(_life(asked))
            if kernel_id:
                course.growable.request_native(seed_id, kernel_id)
            else:
                self._tell(asked, reason)

    def _is_open(self, seed: SeedView) -> bool:
        is_ours = seed.blueprint_id is not None and _life(seed) not in self._settled
        return seed.stage.is_blended and seed.native is None and is_ours

    def _ask(self, hub: AssetHub, seeds: Sequence[SeedView]) -> tuple[_Answer, ...]:
        """What Urza says of each seed; those without native code so far are not among the answers."""
        answers: list[_Answer] = []
        for seed in seeds:
            assert seed.blueprint_id is not None
            found = hub.kernels(signature=seed.signature, blueprint_id=seed.blueprint_id, pipeline=Pipeline.OPTIMIZED)
            if found:
                answers.append(_answer(seed, found))
            elif (seed.blueprint_id, seed.signature.key) not in self._submitted:
                reason = self._submit(hub, seed)
                self._submitted.add((seed.blueprint_id, seed.signature.key))
                if reason:
                    answers.append((seed.seed_id, "", reason))
        return tuple(answers)

    def _submit(self, hub: AssetHub, seed: SeedView) -> str:
        """Has native code compiled; returns why that is not possible, or nothing."""
        try:
            blueprint = hub.blueprint(seed.blueprint_id or "")
        except NotFoundError as error:
            return str(error)
        hub.submit_blueprint(
            blueprint.ir,
            name=blueprint.name,
            targets=(seed.signature,),
            tags=blueprint.tags,
            priority=PRIORITY,
            submitted_by=self._course.run_id,
            pipelines=(Pipeline.OPTIMIZED,),
        )
        return ""

    def _tell(self, seed: SeedView, reason: str) -> None:
        course = self._course
        self._chronicle.tell_rung(
            RungChange(
                run_id=course.run_id,
                step=course.step,
                epoch=course.epoch,
                site=seed.site,
                seed=seed.seed_id,
                blueprint=seed.blueprint,
                kernel_id=seed.kernel_id,
                rung=Rung.IR,
                reason=reason,
                trace_id=seed.trace_id,
            )
        )


def _life(seed: SeedView) -> tuple[str, str]:
    """A seed in its present life."""
    return seed.seed_id, seed.trace_id


def num_usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _answer(seed: SeedView, found: Sequence[CompiledKernelArtifact]) -> _Answer:
    """The newest kernel with native code; without one, what the report says of why there is none."""
    native = [kernel for kernel in found if kernel.optimization_level > 0]
    if native:
        return seed.seed_id, max(native, key=lambda kernel: (kernel.created_at, kernel.kernel_id)).kernel_id, ""
    words = [check.detail for check in found[-1].report.checks if check.name == "native"]
    return seed.seed_id, "", words[0] if words else "it was compiled without native code"
