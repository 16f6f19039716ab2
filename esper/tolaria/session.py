"""Growth around a training step: for the trainer's loop, and for one's own.

    with grown.session(optimizer=optimizer, task="classification", val_data=val) as s:
        for epoch in range(epochs):
            for inputs, targets in loader:
                ...forward, backward, optimizer.step() as ever...
                s.step((inputs, targets), loss)
            s.end_epoch({"train_loss": mean_loss})

A step trains what is in shadow and watches the vitals. The end of an epoch is in two parts: `measure` validates, takes
evidence and a snapshot; `control` asks Tamiyo and applies its answer on every rank at once. A checkpoint belongs
between them: whoever resumes from it decides again, or replays the decision that was logged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from esper.config import RunConfig
from esper.leyline.errors import KernelFaultError, NonFiniteError
from esper.leyline.growth import PREFIX, Change, Growable
from esper.leyline.messages import Topic
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import AdaptationSignal, EpochRecord, KasminaControlCommand, Severity
from esper.leyline.summary import Params, RunStatus, RunSummary
from esper.tolaria import snapshot
from esper.tolaria.adaptation import Adaptation
from esper.tolaria.alarms import Alarms
from esper.tolaria.boundary import Boundary
from esper.tolaria.chronicle import Chronicle
from esper.tolaria.commands import CommandLog
from esper.tolaria.contents import contents
from esper.tolaria.costs import HostCosts, health_flops
from esper.tolaria.course import Course, Ports
from esper.tolaria.deciding import Deciding
from esper.tolaria.evidence import Evaluation
from esper.tolaria.guard import Guard
from esper.tolaria.native import Optimizing
from esper.tolaria.numerics import rng_state, set_rng_state
from esper.tolaria.optim import Optimization
from esper.tolaria.outbox import Outbox
from esper.tolaria.pace import Pace
from esper.tolaria.packet import HostSize, live_flops, live_params
from esper.tolaria.precision import Precision
from esper.tolaria.reach import Reach
from esper.tolaria.recorder import Recorder, metrics_of
from esper.tolaria.shadows import Shadows
from esper.tolaria.slowness import Slowness
from esper.tolaria.steering import Steering
from esper.tolaria.task import Task
from esper.tolaria.trying import Trying
from esper.tolaria.validation import Validation
from esper.tolaria.workload import Batch, Batches, batch_len, parts_of, samples_of


class Session:
    """See the module.

    Args:
        growable: the host with its sites.
        optimization: its optimizer and scheduler.
        task: the loss and metrics.
        example: the model's positional arguments, to size the host with.
        config: of the run.
        run_id: of the run.
        ports: the systems around.
        val: validation batches; without them there is no evidence and no seed can pass its gate.
        steps_per_epoch: 0 if unknown until the first epoch has ended.
        device: where the model lies.
        commands: the durable log of decisions, in deterministic mode.
        steering: what people say of the run's adaptations.

    Attributes:
        course: where the run stands.
        recorder: what it will leave behind.
        host_size: parameters and FLOPs before it grew.
        precision: of forwards.
    """

    def __init__(
        self,
        growable: Growable,
        optimization: Optimization,
        task: Task,
        *,
        example: tuple[Any, ...],
        config: RunConfig,
        run_id: str,
        ports: Ports,
        val: Batches | None = None,
        steps_per_epoch: int = 0,
        device: torch.device | None = None,
        commands: CommandLog | None = None,
        steering: Steering | None = None,
    ) -> None:
        where, limits = device or torch.device("cpu"), config.tolaria.governor
        self.course = Course(growable, optimization, task, config, run_id, ports, where, growable.module)
        self.recorder = Recorder(
            run_id=run_id,
            task=task.name,
            seed=config.seed,
            deterministic=config.deterministic,
            num_epochs=config.tolaria.epochs,
        )
        self.reach = Reach(patient=config.deterministic, stop=ports.stop)
        optimization.adopt(_on_trial(growable), live=growable.live_parameters())
        self.outbox = Outbox(ports.bus if self.course.is_first else None, run_id=run_id, reach=self.reach)
        self._chronicle = Chronicle(self.course, recorder=self.recorder, outbox=self.outbox, reach=self.reach)
        self._adaptation = Adaptation(self.course, chronicle=self._chronicle, reach=self.reach, limits=limits)
        self._guard = Guard(self.course, adaptation=self._adaptation, chronicle=self._chronicle, limits=limits)
        self._optimizing = Optimizing(self.course, chronicle=self._chronicle, reach=self.reach)
        self._trying = Trying(self.course, chronicle=self._chronicle, reach=self.reach)
        hears = self.course.is_first and not config.deterministic
        self._deciding = Deciding(
            self.course,
            reach=self.reach,
            commands=commands,
            steering=steering,
            trials=self._trying.state,
            alarms=Alarms(ports.bus, run_id=run_id) if hears and ports.bus is not None else None,
        )
        self.precision = Precision(config.tolaria.precision, where.type)
        self._costs = HostCosts(growable, task.loss_fn, precision=self.precision)
        self.host_size = HostSize(live_params(growable), self._costs.forward(example) // samples_of(example))
        if ports.ranks.world > 1:
            growable.share(ports.ranks.mean_, world=ports.ranks.world, patience_s=config.tolaria.agree_s)
        self._steps_per_epoch = steps_per_epoch
        self._boundary: Boundary | None = None
        self._losses: list[float] = []
        self._milliseconds: list[float] = []
        self._last_batch: Batch | None = None
        self._observing = False
        share = None if config.deterministic else config.kasmina.telemetry_share
        self._pace = Pace(config.kasmina.telemetry_every, share)
        self._paced_version = growable.topology_version
        self._slowness = Slowness(None if config.deterministic else config.kasmina.max_slowdown)
        self._shadows = Shadows(
            self.course,
            costs=self._costs,
            precision=self.precision,
            recorder=self.recorder,
            slowness=self._slowness,
        )
        self._validation = Validation(
            self.course,
            val,
            shadows=self._shadows,
            costs=self._costs,
            precision=self.precision,
            recorder=self.recorder,
            slowness=self._slowness,
            trying=self._trying,
        )
        self._prepared_for = -1
        self._mark = time.perf_counter()

    @property
    def between(self) -> bool:
        """Whether an epoch was measured and not decided about yet: `control` is next."""
        return self._boundary is not None

    # ---------------------------------------------------------------- begin and end

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish("the session ended first")
        else:
            self.fail()

    def fail(self) -> None:
        """Ends forks that still train, books them, and writes what waits of the experience, of a run that has failed.
        Raises nothing: the first error is what people must see.
        """
        self._trying.give_up("the run has failed")
        self.keep_experience(is_over=False)

    def begin(self) -> None:
        """Takes the first snapshot and readies the first step."""
        self._deciding.begin()
        self._adaptation.rebuild_parallel()
        self._guard.remember()
        self._agree_on_pace()
        self._ready()

    def finish(self, reason: str, *, is_over: bool = True) -> None:
        """Ends adaptations that are under way as UNFINISHED, and sends what waits.

        Args:
            reason: why the run ends.
            is_over: whether it has come to its end; else it may be resumed.
        """
        self._trying.close(reason)  # first: what was tried belongs to the experience
        self._chronicle.close(reason)
        self.keep_experience(is_over=is_over)
        self._validation.settle()
        self.outbox.send_steps(steps_per_epoch=self._steps_per_epoch)
        self.outbox.flush()

    def keep_experience(self, *, is_over: bool) -> None:
        """Writes what waits of the run's experience, and hears no more alerts; where that fails, the run says that it
        went without.
        """
        self._deciding.close()
        if not self.course.is_first:
            return
        rows = self.recorder.epochs
        last = rows[-1] if rows else None
        problem = self.course.ports.experience.close(last, self.recorder.reports, is_over=is_over)
        if problem is not None:
            self.reach.miss("Simic", problem)

    # ---------------------------------------------------------------- a step

    def step(self, batch: Batch, loss: torch.Tensor | float) -> None:
        """To be called after each optimizer step.

        Args:
            batch: (inputs, targets) of the step, on the model's device.
            loss: its loss.

        Raises:
            NonFiniteError: if the host diverges again and again, though each time it was set back.
        """
        course = self.course
        course.ports.faults.at("step", course.step)
        seconds = time.perf_counter() - self._mark
        course.ledger.add("host", seconds=seconds)
        self._pace.took(seconds, sampled=self._observing)
        self._slowness.host(seconds)
        value = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
        self._last_batch = batch
        self._book(batch)
        self._shadows.train(batch, steps_per_epoch=self._steps_per_epoch)
        self._guard.watch(value, sampled=self._observing)
        milliseconds = (time.perf_counter() - self._mark) * 1e3
        self.recorder.step(milliseconds)
        self._milliseconds.append(milliseconds)
        if math.isfinite(value):
            self._losses.append(value)
            self.outbox.step(course.step, value, milliseconds, steps_per_epoch=self._steps_per_epoch)
        else:
            self.outbox.send_steps(steps_per_epoch=self._steps_per_epoch)  # a batch holds consecutive steps
        course.step += 1
        if self._guard.act():
            self._prepared_for = -1  # what was readied went with the state that was given up
        if len(self._milliseconds) != self._steps_per_epoch:  # else `control` readies the next, after the decision
            self._ready()

    def abandon(self, error: KernelFaultError) -> None:
        """To be called in place of `step`, where a kernel on the live path failed in the forward: goes back to the
        last good state and removes the kernels that came since. The batch is lost. Of several ranks none calls it:
        there a failing kernel raises nothing in training, and all go back together.

        Raises:
            NonFiniteError: if this happens again and again, though each time it was set back.
        """
        course = self.course
        milliseconds = (time.perf_counter() - self._mark) * 1e3
        course.ledger.add("host", seconds=milliseconds / 1e3)
        self.recorder.step(milliseconds)
        self._milliseconds.append(milliseconds)
        self.outbox.send_steps(steps_per_epoch=self._steps_per_epoch)  # a batch holds consecutive steps
        course.step += 1
        self._guard.roll_back(f"a kernel fails: {error}")
        self._prepared_for = -1
        if len(self._milliseconds) != self._steps_per_epoch:
            self._ready()

    def end_epoch(self, metrics: Mapping[str, float] | None = None) -> EpochRecord:
        """Ends an epoch: `measure`, then `control`.

        Args:
            metrics: `train_loss` and `train_metric`, where the caller has better figures than the mean of `step`'s.
        """
        record = self.measure(metrics)
        self.control()
        return record

    def _book(self, batch: Batch) -> None:
        ledger = self.course.ledger
        if self._observing:
            num = batch_len(batch)
            ledger.add("telemetry", flops=sum(health_flops(s, num) for s in self.course.growable.sites.values()))
        for inputs, targets in parts_of(batch, self.course.config.tolaria.accumulate):
            known = self._costs.known_training_step(inputs)
            if known is None:
                with ledger.timed("telemetry"):
                    known = self._costs.training_step(inputs, targets)
            ledger.add("host", flops=known)

    def adapting(self) -> tuple[str, ...]:
        """Ids of the seeds that are blended in and have not come to an end."""
        seeds = self.course.growable.seeds()
        return tuple(s.seed_id for s in seeds if s.stage.is_blended and s.stage is not SeedStage.FOSSILIZED)

    def _ready(self) -> None:
        """Readies the next step, once; its clock starts here."""
        self._mark = time.perf_counter()
        course = self.course
        if self._prepared_for == course.step:
            return
        self._prepared_for = course.step
        if self._paced_version != course.growable.topology_version:
            self._paced_version = course.growable.topology_version
            self._pace.forget()
        self._observing = self._pace.samples(course.step, longest=self._longest)
        change = course.growable.prepare(
            course.step,
            epoch=course.epoch,
            steps_per_epoch=max(1, self._steps_per_epoch or len(self._milliseconds)),
            observe=self._observing,
            replays=course.config.tolaria.accumulate if self._shadows.are_due(self._steps_per_epoch) else 0,
        )
        self._adaptation.absorb(change)

    # ---------------------------------------------------------------- the end of an epoch

    def measure(self, metrics: Mapping[str, float] | None = None) -> EpochRecord:
        """Validates, takes evidence for every seed in TRAINING, and a snapshot if the run is in health.

        Args:
            metrics: see `end_epoch`.
        """
        course = self.course
        self._steps_per_epoch = self._steps_per_epoch or len(self._milliseconds)
        self.outbox.send_steps(steps_per_epoch=self._steps_per_epoch)
        self._share_buffers()
        ailment = self._guard.examine()
        if ailment is not None:
            self._prepared_for = -1
        host, ailment = self._validate_or_go_back(ailment)
        self._validation.take_evidence(host)
        val_loss = None if host is None else host.loss
        reports = course.growable.close_epoch(
            run_id=course.run_id, epoch=course.epoch, step=course.step, val_loss=val_loss
        )
        self._guard.remember()
        if ailment is None:
            self._guard.passed()
        record = self._record(host, dict(metrics or {}))
        skip = None if ailment is None else f"no decision after a rollback: {ailment}"
        self._boundary = Boundary(record, tuple(reports), skip)
        self.recorder.epoch(record)
        self.outbox.publish(Topic.SEED_HEALTH, *reports)
        self.outbox.publish(Topic.EPOCH, record)
        return record

    def control(self) -> None:
        """Asks Tamiyo about the epoch that was measured, applies the answer on all ranks, and readies the next step.

        Raises:
            RuntimeError: if `measure` was not called before.
        """
        if self._boundary is None:
            raise RuntimeError("control follows measure")
        course, boundary, guard = self.course, self._boundary, self._guard
        if boundary.skip is not None:
            self.recorder.decision(course.epoch, boundary.skip)
        else:
            with course.ledger.timed("control"):
                embargoed = sorted(key for key, until in guard.embargo.items() if until > course.epoch)
                signal = self._deciding.decide(
                    boundary.record,
                    boundary.reports,
                    host=self.host_size,
                    embargoed=embargoed,
                    governor=guard.words,
                    ended=self.recorder.reports,
                )
                self._obey(signal)
                self._optimizing.look()
        course.ports.faults.at("control", course.epoch)
        self._boundary = None
        course.epoch += 1
        self._losses, self._milliseconds = [], []
        guard.embargo = {key: until for key, until in guard.embargo.items() if until > course.epoch}
        if self._last_batch is not None:
            with course.ledger.timed("telemetry"):  # here, so that no step after a graft pays for the counting
                for inputs, targets in parts_of(self._last_batch, course.config.tolaria.accumulate):
                    self._costs.training_step(inputs, targets)
        with course.ledger.timed("trials"):
            self._trying.begin()  # here the state is that of the next step
        self._agree_on_pace()
        self._ready()

    def obey(self, command: KasminaControlCommand) -> None:
        """Carries out a command of whoever drives this session, or tells why not. Collective."""
        self._adaptation.apply(command)

    def change(self, act: Callable[[Growable], Change]) -> None:
        """Between two steps: carries out what a fork does to its seeds, and readies the next step again.

        Args:
            act: is given the host, and returns what it changed there.
        """
        self._adaptation.absorb(act(self.course.growable))
        self._prepared_for = -1
        self._ready()

    @property
    def _longest(self) -> int:
        """Steps between samples of health at most."""
        return max(1, self._steps_per_epoch // 2)

    def _agree_on_pace(self) -> None:
        """All ranks sample the same steps until the next epoch: each sees its own share of what is then one batch."""
        ranks = self.course.ports.ranks
        if ranks.world > 1:
            self._pace.hold(ranks.broadcast(self._pace.interval(longest=self._longest)))

    def _share_buffers(self) -> None:
        """Gives every rank rank 0's running statistics: each saw another share of the last step."""
        course = self.course
        if course.ports.ranks.world == 1:
            return
        own = {name: buffer for name, buffer in course.growable.module.named_buffers() if not name.startswith(PREFIX)}
        for name, value in course.ports.ranks.broadcast({name: buffer.cpu() for name, buffer in own.items()}).items():
            own[name].copy_(value)

    def evaluate(self, batches: Batches, *, purpose: str, mode: str) -> Evaluation:
        """One pass over a split, booked under `purpose`. Collective.

        Args:
            batches: the split.
            purpose: of the ledger.
            mode: tells apart forwards that cost differently.
        """
        return self._validation.evaluate(batches, purpose=purpose, mode=mode)

    def summary(
        self,
        status: RunStatus = RunStatus.RUNNING,
        *,
        test: Evaluation | None = None,
        last_checkpoint: str | None = None,
        error: str | None = None,
    ) -> RunSummary:
        """What the run came to so far.

        Args:
            status: how far it came.
            test: figures on test data, once they are known.
            last_checkpoint: name of the newest one.
            error: what made it fail.
        """
        course, rows = self.course, self.recorder.epochs
        return self.recorder.summary(
            status,
            params=Params(start=self.host_size.params, final=live_params(course.growable)),
            ledger=course.ledger.snapshot(),
            metrics=metrics_of(course.task, rows[-1] if rows else None, test),
            bus=self.outbox.counts(),
            went_without=self.reach.went_without,
            urza=course.ports.circuit(),
            tamiyo=course.ports.tamiyo_circuit(),
            last_checkpoint=last_checkpoint,
            error=error,
        )

    def _validate_or_go_back(self, ailment: str | None) -> tuple[Evaluation | None, str | None]:
        """Validates; where that shows the live path broken, goes back to the last good state and validates that.

        Returns:
            The evaluation, and the reason for going back, be it the given one.
        """
        try:
            return self._validation.of_host(), ailment
        except (NonFiniteError, KernelFaultError) as error:  # the same on every rank
            if ailment is not None:
                raise  # the state that was sound then is not now: going back cannot help
            self._guard.roll_back(str(error))
            self._prepared_for = -1
            return self._validation.of_host(), str(error)

    def _record(self, host: Evaluation | None, metrics: dict[str, float]) -> EpochRecord:
        course, headline = self.course, self.course.task.headline
        ready, pending = self._deciding.kernels()
        account, (cache_hits, cache_misses) = course.ledger.snapshot(), course.growable.cache_counts()
        return EpochRecord(
            run_id=course.run_id,
            epoch=course.epoch,
            num_epochs=max(course.config.tolaria.epochs, course.epoch + 1),
            step=course.step,
            train_loss=metrics.get("train_loss", _mean(self._losses)),
            train_metric=metrics.get("train_metric"),
            val_loss=None if host is None else host.loss,
            val_metric=None if host is None or headline is None else host.metrics[headline],
            metric_name=headline,
            learning_rate=course.optimization.learning_rate,
            params=live_params(course.growable),
            flops_per_sample=live_flops(self.host_size, course.growable.seeds()),
            total_flops=account.flops.total,
            flops_by_purpose=account.flops.model_dump(exclude={"total"}),
            seconds_by_purpose=account.seconds.model_dump(exclude={"total"}),
            rollbacks=len(self.recorder.rollbacks),
            seconds=account.seconds.total,
            step_ms=_mean(self._milliseconds),
            kernels_ready=ready,
            pending=pending,
            urza=course.ports.circuit().state,
            tamiyo=course.ports.tamiyo_circuit().state,
            cache_hits=cache_hits,
            cache_misses=cache_misses,
        )

    def _obey(self, signal: AdaptationSignal | None) -> None:
        course = self.course
        if signal is None:
            words = "; ".join(self.reach.missing) or "there is no controller"
            self.recorder.decision(course.epoch, f"no decision: {words}")
            return
        self.recorder.decision(course.epoch, signal.reason)
        self._chronicle.refused(signal, self._boundary.reports if self._boundary else ())
        self.outbox.publish(Topic.KASMINA_COMMANDS, signal)
        self._guard.words = "ok"
        if signal.severity is Severity.CRITICAL:
            self._trying.heard(signal)
            self._guard.roll_back(f"Tamiyo: {signal.reason}")
            self._prepared_for = -1
            return
        refused: dict[str, str] = {}
        for command in signal.commands:
            self._chronicle.chose(command, signal.policy, self._boundary.reports if self._boundary else ())
            self._trying.offer(command)
            if (refusal := self._adaptation.apply(command)) is not None:
                refused[command.command_id] = refusal
            self._trying.withdraw(command)
        self._trying.heard(signal, refused)

    # ---------------------------------------------------------------- for checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state between `measure` and `control`, or after `control`. Collective; tensors are not copies."""
        course, boundary = self.course, self._boundary
        return {
            **contents(course.growable.module),
            "growth": course.growable.growth_state(),
            "optimization": course.optimization.state_dict(),
            "rng": course.ports.ranks.gather(rng_state()),
            "epoch": course.epoch,
            "step": course.step,
            "steps_per_epoch": self._steps_per_epoch,
            "host": {"params": self.host_size.params, "flops": self.host_size.flops},
            "tamiyo": self._deciding.memory,
            "ledger": course.ledger.state_dict(),
            "costs": self._costs.state_dict(),
            "host_shares": self._costs.shares(),
            "recorder": self.recorder.state_dict(),
            "governor": self._guard.state_dict(),
            "went_without": list(self.reach.went_without),
            "trials": self._trying.state_dict(),
            "boundary": None if boundary is None else boundary.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`; next comes `control` where it lies `between`, else `begin`.

        The number of ranks may differ from that of the saved run; a rank that is new keeps its own generators.
        """
        course, rank = self.course, self.course.ports.ranks.rank
        own = dict(state["rng"][rank]) if rank < len(state["rng"]) else rng_state()
        whole = {key: state[key] for key in ("module", "buffers", "growth", "optimization") if key in state}
        snapshot.give_back({**whole, "rng": own}, course.growable, course.optimization)
        course.epoch, course.step = int(state["epoch"]), int(state["step"])
        self._steps_per_epoch = int(state["steps_per_epoch"])
        self.host_size = HostSize(int(state["host"]["params"]), int(state["host"]["flops"]))
        self._deciding.memory = dict(state["tamiyo"])
        if course.is_first:  # it holds the FLOPs of all
            course.ledger.load_state_dict(state["ledger"])
        self._costs.load_state_dict(state["costs"])
        self._costs.load_shares(state.get("host_shares", ()))
        self.recorder.load_state_dict(state["recorder"])
        self.reach.restore(tuple(state["went_without"]))
        self._trying.load_state_dict(state.get("trials", {}))
        self._boundary = None if state["boundary"] is None else Boundary.of(state["boundary"])
        self._adaptation.rebuild_parallel()
        self._guard.remember()
        self._guard.load_state_dict(state["governor"])
        self._chronicle.look()
        set_rng_state(own)
        self._prepared_for = -1
        self._mark = time.perf_counter()


def _on_trial(growable: Growable) -> dict[str, tuple[tuple[nn.Parameter, ...], float]]:
    """Id to parameters and learning-rate factor, of seeds that are blended in and have not proven themselves."""
    live = list(growable.live_parameters())
    return {
        seed.seed_id: (tuple(p for name, p in live if _seed_of(name) == seed.seed_id), seed.lr_factor)
        for seed in growable.seeds()
        if seed.stage.is_blended and seed.stage is not SeedStage.FOSSILIZED
    }


def _seed_of(name: str) -> str | None:
    """Whose parameter it is, by its name on the live path: `_esper.<site>.<seed>.<name>`."""
    return name.split(".")[2] if name.startswith(f"{PREFIX}.") else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
