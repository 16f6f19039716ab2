"""Training kernels behind the host, beside its steps: when, on what, and what it costs."""

from __future__ import annotations

import time

from esper.leyline.seeds import SeedStage
from esper.tolaria.costs import HostCosts
from esper.tolaria.course import Course
from esper.tolaria.pace import replay_interval
from esper.tolaria.precision import Precision
from esper.tolaria.recorder import Recorder
from esper.tolaria.slowness import Slowness
from esper.tolaria.workload import Batch, model_args, parts_of


class Shadows:
    """The seeds in TRAINING of one run.

    Args:
        course: the run.
        costs: counts what a replay costs.
        precision: of forwards.
        recorder: told what each seed cost.
        slowness: told how long each update took.
    """

    def __init__(
        self, course: Course, *, costs: HostCosts, precision: Precision, recorder: Recorder, slowness: Slowness
    ) -> None:
        self._course = course
        self._costs = costs
        self._precision = precision
        self._recorder = recorder
        self._slowness = slowness
        self._known: tuple[int, tuple[str, ...]] = (-1, ())

    @property
    def seeds(self) -> tuple[str, ...]:
        """Ids of the seeds in TRAINING; looked up when the topology changes, not at every step."""
        version = self._course.growable.topology_version
        if self._known[0] != version:
            seeds = self._course.growable.seeds()
            self._known = (version, tuple(s.seed_id for s in seeds if s.stage is SeedStage.TRAINING))
        return self._known[1]

    def are_due(self, steps_per_epoch: int) -> bool:
        """Whether kernels are trained on the batch of the present step.

        Args:
            steps_per_epoch: 0 if unknown.
        """
        course = self._course
        every = replay_interval(course.config.kasmina.shadow_every, steps_per_epoch=steps_per_epoch)
        return bool(self.seeds) and course.step % every == 0

    def train(self, batch: Batch, *, steps_per_epoch: int) -> None:
        """Trains them on the batch of the present step, where they are due. Collective.

        Args:
            batch: (inputs, targets), on the model's device.
            steps_per_epoch: 0 if unknown.
        """
        course = self._course
        if not self.are_due(steps_per_epoch):
            return
        training = self.seeds
        ranks = course.ports.ranks
        began = time.perf_counter()
        with course.ledger.timed("shadow"):
            flops = sum(self._train_on(part) for part in parts_of(batch, course.config.tolaria.accumulate))
        course.ledger.add("shadow", flops=flops)
        seconds = (time.perf_counter() - began) / len(training)
        for seed_id in training:  # every rank has the same share of the batch
            self._recorder.spend(seed_id, flops=ranks.world * flops // len(training), seconds=seconds)

    def _train_on(self, part: Batch) -> int:
        """Returns its FLOPs."""
        course, precision, (inputs, targets) = self._course, self._precision, part
        args, ranks = model_args(inputs), self._course.ports.ranks

        def train() -> None:
            with precision.forward():
                done = course.growable.train_shadows(
                    args,
                    lambda outputs: course.task.loss_fn(precision.full(outputs), targets),
                    all_reduce=ranks.mean_ if ranks.world > 1 else None,
                )
            self._slowness.shadows(done.seconds)

        _, flops = self._costs.counting(args, train, mode="shadow")
        return flops
