"""A fork of a run: from a packed state through some steps, with or without growth, to its validation losses.

It knows no other fork and no policy. `Session` and `Stepper` are the run's own, so a fork that does not grow computes
the bits that the run computes next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch

from esper.config import RunConfig
from esper.leyline.errors import ConflictError, EsperError, SafetyError
from esper.leyline.evidence import BlendStrategy
from esper.leyline.growth import Growable
from esper.leyline.ports import FaultPlan, NoFaults
from esper.leyline.signals import Action, KasminaControlCommand
from esper.leyline.trials import Fork, ForkResult, TrialCandidate
from esper.tolaria import snapshot
from esper.tolaria.course import Ports
from esper.tolaria.evidence import Evaluation
from esper.tolaria.numerics import seed_everything, set_rng_state
from esper.tolaria.optim import Optimization
from esper.tolaria.packing import unpack
from esper.tolaria.session import Session
from esper.tolaria.stepper import Stepper
from esper.tolaria.workload import Batch, Workload, evaluation_batches, to_device, training_batches

BEHIND, BLENDING = 0.4, 0.2
"""Shares of a fork's steps in which its kernel trains behind the host, and in which it is blended in."""
SEED_STRIDE = 104_729
"""Between the seeds of forks that draw anew: a prime, so that runs with neighbouring seeds do not share orders."""


def fork_config(config: RunConfig, fork: Fork, *, steps_per_epoch: int) -> RunConfig:
    """The settings of a fork: the run's, but for what paces a kernel; a fork that diverges is over at once."""
    ramp_epochs = (fork.blending or max(1, round(BLENDING * fork.steps))) / steps_per_epoch
    kasmina = config.kasmina.model_copy(update={"ramp_epochs": ramp_epochs, "shadow_every": 1, "max_slowdown": None})
    governor = config.tolaria.governor.model_copy(update={"max_rollbacks": 0, "snapshots": 1})
    tolaria = config.tolaria.model_copy(update={"governor": governor, "num_workers": 0})
    return config.model_copy(update={"kasmina": kasmina, "tolaria": tolaria})


class OverBudgetError(SafetyError):
    """A fork would cost more than it may."""


@dataclass
class _Tally:
    """What a fork took with it out of its kernel."""

    weights: bytes | None = None


class Forked:
    """One fork in this process; the caller has set threads, and owns the process's random state.

    Args:
        growable: the workload's model, wrapped, with the hub attached so that a kernel loads within its command.
        workload: data, task, optimizer.
        config: of the run.
        packed: where it starts.
        fork: what it does.
        faults: a script of faults, for tests; the place is `fork`, before each step.

    Raises:
        TamperedError: if `packed` is not whole.
        ConflictError: if it is of a host with other sites.
    """

    def __init__(
        self,
        growable: Growable,
        workload: Workload,
        config: RunConfig,
        *,
        packed: bytes,
        fork: Fork,
        faults: FaultPlan | None = None,
    ) -> None:
        state = unpack(packed)
        self.fork = fork
        self._faults = faults or NoFaults()
        self._workload = workload
        seed = config.seed + SEED_STRIDE * fork.seed
        self._train = training_batches(workload.train, batch_size=config.tolaria.batch_size, seed=seed)
        self._steps_per_epoch = self._train.num_batches(world=1)
        config = fork_config(config, fork, steps_per_epoch=self._steps_per_epoch)
        first = next(growable.live_parameters())[1]
        optimizer = workload.optimizer([p for _, p in growable.live_parameters() if p.requires_grad])
        total_steps = self._steps_per_epoch * config.tolaria.epochs
        scheduler = None if workload.scheduler is None else workload.scheduler(optimizer, total_steps)
        self.session = Session(
            growable,
            Optimization(optimizer, scheduler),
            workload.task,
            example=to_device(workload.example, first.device),
            config=config,
            run_id=fork.fork_id,
            ports=Ports(),
            steps_per_epoch=self._steps_per_epoch,
            device=first.device,
        )
        snapshot.give_back(state["train"], growable, self.session.course.optimization)
        self.session.course.epoch, self.session.course.step = int(state["epoch"]), int(state["step"])
        self._rng: Mapping[str, Any] = state["train"]["rng"]
        self._tally = _Tally()

    def run(self) -> ForkResult:
        """Trains and validates. What goes wrong with the fork is told in its result; a bug is raised."""
        began = time.perf_counter()
        found, failure = None, ""
        try:
            found = self._run()
        except EsperError as error:
            failure = f"{type(error).__name__}: {error}"
        course = self.session.course
        return ForkResult(
            fork_id=self.fork.fork_id,
            losses=() if found is None else tuple(found.losses.tolist()),
            loss=0.0 if found is None else found.loss,
            flops=course.ledger.snapshot().flops.total,
            seconds=time.perf_counter() - began,
            weights=self._tally.weights,
            failure=failure,
        )

    def _run(self) -> Evaluation:
        session, course, fork = self.session, self.session.course, self.fork
        if fork.candidate is not None:
            self._germinate(fork.candidate)
        session.begin()
        if fork.seed:
            seed_everything(course.config.seed + SEED_STRIDE * fork.seed)
        else:
            set_rng_state(self._rng)
        stepper, graft_at = Stepper(session), fork.behind or max(1, round(BEHIND * fork.steps))
        for done, batch in enumerate(self._batches()):
            self._faults.at("fork", done)
            if done == graft_at and fork.candidate is not None and fork.candidate.strategy is not BlendStrategy.DIRECT:
                self._graft(fork.candidate)
            course.growable.module.train()
            before = course.ledger.snapshot().flops.total
            stepper.step(to_device(batch, course.device))
            after = course.ledger.snapshot().flops.total
            if after + (after - before) > fork.max_flops:
                raise OverBudgetError(f"after {done + 1} steps it has no more of its {fork.max_flops:,} FLOPs left")
        val = evaluation_batches(self._workload.val, batch_size=course.config.tolaria.batch_size)
        return session.evaluate(val, purpose="validation", mode="eval")

    def _batches(self) -> Iterator[Batch]:
        """The fork's batches, one a step; ends epochs as the run does.

        The run stands at the beginning of an epoch when it is forked.
        """
        session, done = self.session, 0
        while True:
            for batch in self._train.epoch(session.course.epoch, rank=0, world=1):
                yield batch
                done += 1
                if done == self.fork.steps:
                    return
            session.measure()
            session.control()

    def _germinate(self, candidate: TrialCandidate) -> None:
        direct = candidate.strategy is BlendStrategy.DIRECT
        self._command(Action.GERMINATE, candidate)
        self._command(Action.ADVANCE, candidate)
        seed = self.session.course.seed(candidate.seed_id)
        if seed is None or not (seed.stage.is_blended if direct else seed.kernel_id):
            raise ConflictError(f"{candidate.in_words} does not begin: {seed.reason if seed else 'no such seed'}")

    def _command(self, action: Action, candidate: TrialCandidate) -> None:
        course = self.session.course
        command = KasminaControlCommand(
            command_id=self.fork.fork_id,
            action=action,
            site=candidate.site,
            seed_id=candidate.seed_id,
            kernel_id=candidate.kernel_id,
            blueprint=candidate.blueprint,
            strategy=candidate.strategy,
            lr_factor=candidate.lr_factor,
            reason="a fork tries it",
        )
        refusal = course.growable.check(command)
        if refusal is not None:
            raise ConflictError(f"{candidate.in_words}: {refusal}")
        self.session.obey(command)

    def _graft(self, candidate: TrialCandidate) -> None:
        course = self.session.course
        seed = course.seed(candidate.seed_id)
        if seed is not None and seed.fault:
            raise SafetyError(f"its kernel fails: {seed.fault}")
        weights = course.growable.kernel_weights(candidate.seed_id)
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise SafetyError("its kernel's weights are not finite")
        self._tally.weights = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        )
        self.session.change(
            lambda growable: growable.graft_now(
                candidate.seed_id, run_id=course.run_id, epoch=course.epoch, step=course.step, reason="a fork tries it"
            )
        )
