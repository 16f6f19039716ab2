"""The training loop: epochs and batches around a `Session`, checkpoints between measuring and deciding.

Knows no kernel and no policy. What is written where, below the run's folder:

    summary.json, history.json     after every epoch, whole each time
    checkpoints/                   see `esper.tolaria.checkpoint`
    commands.jsonl                 deterministic mode: see `esper.tolaria.commands`
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from esper.config import RunConfig
from esper.leyline.errors import ConfigError, EsperError, KernelFaultError, UnavailableError, UserError
from esper.leyline.growth import Growable
from esper.leyline.messages import Topic
from esper.leyline.presence import Presence
from esper.leyline.signals import EpochRecord, RunStarted
from esper.leyline.summary import HISTORY_FILE, SUMMARY_FILE, RunStatus, RunSummary, Start
from esper.storage import Storage
from esper.tolaria.checkpoint import Checkpoints, Restored
from esper.tolaria.commands import CommandLog
from esper.tolaria.contents import contents, refill
from esper.tolaria.course import Ports
from esper.tolaria.evidence import Evaluation
from esper.tolaria.optim import Optimization
from esper.tolaria.patience import PatientStorage
from esper.tolaria.ranks import Ranks
from esper.tolaria.session import Session
from esper.tolaria.steering import Steering
from esper.tolaria.stepper import Stepper
from esper.tolaria.weights import FIELD, Trained
from esper.tolaria.workload import (
    Workload,
    evaluation_batches,
    to_device,
    training_batches,
)
from esper.tolaria.writing import BackgroundWriter

log = logging.getLogger(__name__)

OnEpoch = Callable[[EpochRecord], None]


@dataclass
class Best:
    """The best epoch so far, and for how long nothing was better."""

    value: float | None = None
    epochs_since: int = 0

    def see(self, value: float, *, higher_is_better: bool, counts: bool) -> bool:
        """Takes in an epoch's value; returns whether it is the best.

        Args:
            value: of the metric.
            higher_is_better: which way it points.
            counts: whether an epoch without progress counts against patience.
        """
        better = self.value is None or (value > self.value if higher_is_better else value < self.value)
        if better:
            self.value, self.epochs_since = value, 0
        elif counts:
            self.epochs_since += 1
        return better


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The run was told to stop; carries the reason."""


class Trainer:
    """Trains one workload to its end.

    Args:
        growable: the workload's model, wrapped, on its device.
        workload: data, task, optimizer.
        config: of the run.
        directory: the run's folder, any fsspec address.
        run_id: of the run.
        ports: the systems around.
        resume: go on from the last whole checkpoint, where there is one.
        on_epoch: called after each epoch, on every rank.

    Raises:
        UserError: if the configuration, data or storage cannot be used.
    """

    def __init__(
        self,
        growable: Growable,
        workload: Workload,
        config: RunConfig,
        *,
        directory: str,
        run_id: str,
        ports: Ports,
        resume: bool = False,
        on_epoch: OnEpoch | None = None,
    ) -> None:
        tolaria = config.tolaria
        if tolaria.best_metric == "val_metric" and workload.task.headline is None:
            raise ConfigError(f"task {workload.task.name} has no metric", field="tolaria.best_metric")
        self._config, self._workload, self._ports, self._on_epoch = config, workload, ports, on_epoch
        self._run_id, self._directory = run_id, directory
        self._is_first = ports.ranks.rank == 0
        self._folder = PatientStorage.at(directory, config.storage_options)
        self._checkpoints = Checkpoints(self._folder, keep=tolaria.keep_checkpoints, faults=ports.faults)
        self._writer = BackgroundWriter(self._checkpoints)
        self._train = training_batches(workload.train, batch_size=tolaria.batch_size, seed=config.seed)
        self._val = evaluation_batches(workload.val, batch_size=tolaria.batch_size)
        self._num_batches = self._train.num_batches(world=ports.ranks.world)
        self._device = _device_of(growable)
        found = self._checkpoints.latest() if resume else None
        if found is None and workload.trained is not None:
            _load_together(workload.trained, growable, ports.ranks)
        if ports.ranks.world > 1:  # the wrapper of the live path takes equal weights for granted
            refill(growable.module, ports.ranks.broadcast(contents(growable.module)))
        parameters = [parameter for _, parameter in growable.live_parameters() if parameter.requires_grad]
        optimizer = workload.optimizer(parameters)
        total_steps = self._num_batches * tolaria.epochs
        scheduler = None if workload.scheduler is None else workload.scheduler(optimizer, total_steps)
        commands = None
        if config.deterministic and self._is_first:
            commands = CommandLog(self._folder, fresh=not resume)
        self.session = Session(
            growable,
            Optimization(optimizer, scheduler),
            workload.task,
            example=to_device(workload.example, self._device),
            config=config,
            run_id=run_id,
            ports=ports,
            val=self._val,
            steps_per_epoch=self._num_batches,
            device=self._device,
            commands=commands,
            # not patient: a storage that fails must not hold the run up for what people may have said
            steering=Steering(Storage.at(directory, config.storage_options)) if self._is_first else None,
        )
        self._stepper = Stepper(self.session)
        self._presence = Presence()
        self._best = Best()
        self._resumed_from: int | None = None
        if found is not None:
            self._restore(found)

    # ---------------------------------------------------------------- the run

    def run(self) -> RunSummary:
        """Trains until the last epoch, patience, or a reason to stop.

        Raises:
            EsperError: what made the run fail; the summary says so too.
        """
        try:
            with self._presence.shown():
                self._announce()
                self._epochs()
        except Interrupted as stop:
            return self._interrupt(str(stop))
        except UnavailableError as error:
            reason = self._ports.stop()
            if reason is None:
                self._fail(error)
                raise
            return self._interrupt(reason)  # told to stop while it waited for another system
        except (Exception, KeyboardInterrupt) as error:
            self._fail(error)  # ends the thread, too, that still writes a checkpoint: the folder may go with its owner
            raise
        return self._end(RunStatus.FINISHED, reason="the run ended first")

    def _epochs(self) -> None:
        session = self.session
        if session.between:
            session.control()  # resumed: the decision of the saved epoch was taken after the checkpoint
        else:
            if self._resumed_from is None:
                self._measure_start()
            session.begin()
        last = self._config.tolaria.epochs
        while session.course.epoch < last and not self._out_of_patience():
            with self._presence.busy():
                metrics = self._train_epoch()
            record = session.measure(metrics)
            self._save(record, final=False)
            session.control()
            if session.course.epoch >= last or self._out_of_patience():
                self._save(record, final=True)
            self._write(RunStatus.RUNNING)
            if self._on_epoch is not None:
                self._on_epoch(record)

    def _measure_start(self) -> None:
        """Validates a trained model before its first step: wrapping it has changed nothing, and here it is shown."""
        trained, headline = self._workload.trained, self._workload.task.headline
        if trained is None:
            return
        found = self.session.evaluate(self._val, purpose="validation", mode="eval")
        metric = None if headline is None else found.metrics[headline]
        start = Start(weights=trained.shown, val_loss=found.loss, val_metric=metric, metric_name=headline)
        self.session.recorder.start(start)
        log.info("run.started_trained", extra=start.model_dump())

    def _train_epoch(self) -> dict[str, float]:
        session, ranks = self.session, self._ports.ranks
        session.course.growable.module.train()
        total, count = torch.zeros((), device=self._device), 0
        for batch in self._train.epoch(session.course.epoch, rank=ranks.rank, world=ranks.world):
            self._check_stop()
            try:
                metric = self._stepper.step(to_device(batch, self._device))
            except KernelFaultError as error:
                self.session.abandon(error)
                continue
            if metric is not None:
                total += metric
                count += 1
        return {"train_metric": float(total) / count} if count else {}

    def _check_stop(self) -> None:
        ranks = self._ports.ranks
        if ranks.world > 1 and self.session.course.step % 8:
            return
        reason = ranks.agree(self._ports.stop())
        if reason is not None:
            raise Interrupted(reason)

    def _out_of_patience(self) -> bool:
        patience = self._config.tolaria.patience
        active = any(seed.stage.is_active for seed in self.session.course.growable.seeds())
        return patience is not None and self._best.epochs_since >= patience and not active

    # ---------------------------------------------------------------- files

    def _save(self, record: EpochRecord, *, final: bool) -> None:
        tolaria = self._config.tolaria
        if not final:
            value = record.val_loss if tolaria.best_metric == "val_loss" else record.val_metric
            higher = tolaria.best_metric == "val_metric" and self._workload.task.higher_is_better
            active = any(seed.stage.is_active for seed in self.session.course.growable.seeds())
            best = value is not None and self._best.see(value, higher_is_better=higher, counts=not active)
        else:
            best = False
        if not (final or best or (record.epoch + 1) % tolaria.checkpoint_every == 0):
            return
        with self.session.course.ledger.timed("checkpoint"):
            state = {"session": self.session.state_dict(), "best": [self._best.value, self._best.epochs_since]}
            if self._is_first:
                self._writer.save(record.epoch, state, best=best)
        self._ports.faults.at("checkpoint", record.epoch)

    def _restore(self, found: Restored) -> None:
        self.session.load_state_dict(found.state["session"])
        self._best.value, self._best.epochs_since = found.state["best"]
        self._resumed_from = found.epoch
        for epoch, reason in found.refused.items():
            self.session.reach.miss(f"the checkpoint of epoch {epoch + 1}", reason)
        log.info("run.resumed", extra={"epoch": found.epoch})

    def _write(self, status: RunStatus, *, test: Evaluation | None = None, error: str | None = None) -> RunSummary:
        last = self._checkpoints.last_name()
        summary = self.session.summary(status, test=test, last_checkpoint=last, error=error)
        if self._is_first:
            self._folder.write(HISTORY_FILE, self.session.recorder.history().model_dump_json().encode())
            self._folder.write(SUMMARY_FILE, summary.model_dump_json(indent=1).encode())
        return summary

    # ---------------------------------------------------------------- begin and end

    def _announce(self) -> None:
        session = self.session
        started = RunStarted(
            run_id=self._run_id,
            task=self._workload.task.name,
            num_epochs=self._config.tolaria.epochs,
            sites=dict(session.course.growable.sites),
            params=session.host_size.params,
            directory=self._directory,
            resumed_from_epoch=self._resumed_from,
            num_events=len(session.recorder.events),
        )
        session.outbox.publish(Topic.RUN_STARTED, started)
        self._write(RunStatus.RUNNING)

    def _interrupt(self, reason: str) -> RunSummary:
        log.info("run.interrupted", extra={"reason": reason})
        self.session.reach.give_up()
        return self._end(RunStatus.INTERRUPTED, reason=reason)

    def _end(self, status: RunStatus, *, reason: str) -> RunSummary:
        self.session.finish(reason, is_over=status is RunStatus.FINISHED)
        test = None
        if status is RunStatus.FINISHED and self._workload.test is not None:
            batches = evaluation_batches(
                self._workload.test, batch_size=self._config.tolaria.batch_size, field="test_data"
            )
            test = self.session.evaluate(batches, purpose="validation", mode="eval")
        self._writer.close()
        return self._write(status, test=test)

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):  # somebody wanted it so, and whoever called is told
            log.info("run.interrupted")
        else:
            log.error("run.failed", extra={"error": str(error)})
        self.session.reach.give_up()
        self.session.fail()
        try:
            self._writer.close()
        except EsperError as second:  # the first error is what people must see
            log.error("checkpoint.unwritten", extra={"error": str(second)})  # noqa: TRY400 - the first one is raised
        try:
            self._write(RunStatus.FAILED, error=f"{type(error).__name__}: {error}")
        except EsperError as second:  # the first error is what people must see
            log.error("summary.unwritten", extra={"error": str(second)})  # noqa: TRY400 - the first one is raised


def _load_together(trained: Trained, growable: Growable, ranks: Ranks) -> None:
    """Loads a trained model's weights on every rank, or refuses on all: one alone would leave the rest waiting."""
    error = None
    try:
        trained.load_into(growable.module)
    except UserError as refused:
        error = refused
    refusal = ranks.agree(None if error is None else str(error))
    if error is not None:
        raise error
    if refusal is not None:
        raise ConfigError(f"another worker: {refusal}", field=FIELD)


def _device_of(growable: Growable) -> torch.device:
    first = next(growable.live_parameters(), None)
    return torch.device("cpu") if first is None else first[1].device
