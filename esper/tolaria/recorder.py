"""What a run leaves behind: the rows and events behind `summary.json` and `history.json`. Writes no file itself."""

from __future__ import annotations

import functools
import hashlib
import platform
import statistics
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from esper.leyline.contract import new_id, now
from esper.leyline.growth import SeedView
from esper.leyline.native import RungChange
from esper.leyline.signals import Choice, EpochRecord, FieldReport, LifecycleEvent, Outcome, VetoRecord
from esper.leyline.summary import (
    BusCounts,
    Circuit,
    CompilerInTrainer,
    Ledger,
    Metrics,
    Params,
    Rollback,
    RunHistory,
    RunStatus,
    RunSummary,
    Start,
    StepTimes,
)
from esper.leyline.trials import TrialResult
from esper.tolaria.evidence import Evaluation
from esper.tolaria.task import Task

GRAFT_WINDOW = 10
"""Steps after a change of the live path that count as its graft."""


class Recorder:
    """Collects the history of one run.

    Args:
        run_id: of the run.
        task: its task's name.
        seed: its seed.
        deterministic: its mode.
        num_epochs: how many are planned.
    """

    def __init__(self, *, run_id: str, task: str, seed: int, deterministic: bool, num_epochs: int) -> None:
        self._head: dict[str, Any] = {
            "run_id": run_id,
            "task": task,
            "seed": seed,
            "deterministic": deterministic,
            "num_epochs": num_epochs,
        }
        self._started_at = now()
        self._compiler_before = _compiler_counts()
        self._start: Start | None = None
        self._epochs: list[EpochRecord] = []
        self._step_ms: list[float] = []
        self._graft_steps: list[int] = []
        self._decisions: list[tuple[int, str]] = []
        self._choices: list[Choice] = []
        self._events: list[LifecycleEvent] = []
        self._rungs: list[RungChange] = []
        self._rollbacks: list[Rollback] = []
        self._reports: list[FieldReport] = []
        self._vetoes: list[VetoRecord] = []
        self._trials: list[TrialResult] = []
        self._spent: dict[str, tuple[int, float]] = {}

    @property
    def epochs(self) -> tuple[EpochRecord, ...]:
        """The rows so far."""
        return tuple(self._epochs)

    @property
    def events(self) -> tuple[LifecycleEvent, ...]:
        """The events so far."""
        return tuple(self._events)

    @property
    def rollbacks(self) -> tuple[Rollback, ...]:
        """The returns to a last good state so far."""
        return tuple(self._rollbacks)

    @property
    def reports(self) -> tuple[FieldReport, ...]:
        """The adaptations that came to an end so far."""
        return tuple(self._reports)

    def trial(self, result: TrialResult) -> None:
        """Adds what a trial came to."""
        self._trials.append(result)

    def keep(self, report: FieldReport) -> None:
        """Adds the report of what was tried in a fork alone."""
        self._reports.append(report)

    def start(self, start: Start) -> None:
        """Notes what a trained model is worth before its first step."""
        self._start = start

    def step(self, milliseconds: float) -> None:
        """Adds a step's time."""
        self._step_ms.append(milliseconds)

    def graft(self, step: int) -> None:
        """Notes that the live path is another one from `step` on."""
        self._graft_steps.append(step)

    def epoch(self, record: EpochRecord) -> None:
        """Adds a row; one for an epoch that was run before (ahead of a crash) takes its place."""
        self._epochs = [row for row in self._epochs if row.epoch < record.epoch] + [record]

    def decision(self, epoch: int, words: str) -> None:
        """Adds what was decided and why."""
        self._decisions.append((epoch, words))

    def choice(self, choice: Choice) -> None:
        """Adds what an adaptation began with; of a decision that is carried out again, the first time counts."""
        if choice.trace_id not in {known.trace_id for known in self._choices}:
            self._choices.append(choice)

    def veto(self, record: VetoRecord) -> None:
        """Adds a veto; one that was given at the last decision already is counted there."""
        for place, known in enumerate(self._vetoes):
            same = (known.veto.subject, known.trace_id) == (record.veto.subject, record.trace_id)
            if same and known.last_epoch >= record.epoch - 1:
                if known.last_epoch < record.epoch:  # of a decision that is carried out again, the first time counts
                    again = {"last_epoch": record.epoch, "num": known.num + 1}
                    self._vetoes[place] = known.model_copy(update=again)
                return
        self._vetoes.append(record)

    def event(self, event: LifecycleEvent) -> None:
        """Adds a transition."""
        self._events.append(event)

    def rung(self, change: RungChange) -> None:
        """Adds what a kernel runs from."""
        self._rungs.append(change)

    def rollback(self, rollback: Rollback) -> None:
        """Adds a return to the last good state."""
        self._rollbacks.append(rollback)

    def spend(self, seed_id: str, *, flops: int, seconds: float) -> None:
        """Books what a seed cost behind the host."""
        old_flops, old_seconds = self._spent.get(seed_id, (0, 0.0))
        self._spent[seed_id] = (old_flops + flops, old_seconds + seconds)

    def report(self, view: SeedView, outcome: Outcome, *, reason: str) -> FieldReport:
        """Ends an adaptation: returns its report and keeps it.

        Args:
            view: the seed when it still had its kernel.
            outcome: how it ended.
            reason: why, for one that failed.
        """
        flops, seconds = self._spent.pop(view.seed_id, (0, 0.0))
        report = FieldReport(
            report_id=report_id(self._head["run_id"], view.trace_id, outcome),
            run_id=self._head["run_id"],
            trace_id=view.trace_id,
            site=view.site,
            seed_id=view.seed_id,
            signature=view.signature,
            blueprint_id=view.blueprint_id or "",
            blueprint=view.blueprint or view.blueprint_id or "",
            kernel_id=view.kernel_id or "",
            outcome=outcome,
            stages=view.spans,
            evidence=view.evidence,
            trial=view.trial,
            seen=next((choice.health for choice in self._choices if choice.trace_id == view.trace_id), None),
            num_parameters=view.num_parameters,
            flops=flops,
            seconds=seconds,
            failure_reason="" if outcome is Outcome.FOSSILIZED else reason,
        )
        self._reports.append(report)
        return report

    def history(self) -> RunHistory:
        """The series behind the pictures."""
        return RunHistory(
            run_id=self._head["run_id"],
            start=self._start,
            epochs=tuple(self._epochs),
            step_ms=tuple(self._step_ms),
            graft_steps=tuple(self._graft_steps),
            decisions=tuple(self._decisions),
            choices=tuple(self._choices),
        )

    def summary(
        self,
        status: RunStatus,
        *,
        params: Params,
        ledger: Ledger,
        metrics: Metrics,
        bus: BusCounts,
        went_without: tuple[str, ...],
        urza: Circuit,
        tamiyo: Circuit,
        last_checkpoint: str | None,
        error: str | None = None,
    ) -> RunSummary:
        """What the run came to so far."""
        return RunSummary(
            **self._head,
            status=status,
            started_at=self._started_at,
            finished_at=None if status is RunStatus.RUNNING else now(),
            metrics=metrics,
            params=params,
            start=self._start,
            events=tuple(self._events),
            rungs=tuple(self._rungs),
            field_reports=tuple(self._reports),
            rollbacks=tuple(self._rollbacks),
            vetoes=tuple(self._vetoes),
            trials=tuple(self._trials),
            ledger=ledger,
            steps=step_times(self._step_ms, self._graft_steps),
            compiler_in_trainer=_compiler_since(self._compiler_before),
            bus=bus,
            went_without=went_without,
            urza=urza,
            tamiyo=tamiyo,
            last_checkpoint=last_checkpoint,
            error=error,
            versions=dict(versions()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        return {
            "started_at": self._started_at,
            "history": self.history().model_dump(mode="json"),
            "events": [event.model_dump(mode="json") for event in self._events],
            "rungs": [change.model_dump(mode="json") for change in self._rungs],
            "reports": [report.model_dump(mode="json") for report in self._reports],
            "rollbacks": [rollback.model_dump(mode="json") for rollback in self._rollbacks],
            "vetoes": [veto.model_dump(mode="json") for veto in self._vetoes],
            "trials": [trial.model_dump(mode="json") for trial in self._trials],
            "spent": {seed: [flops, seconds] for seed, (flops, seconds) in self._spent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        history = RunHistory.model_validate(state["history"])
        self._started_at = state["started_at"]
        self._start = history.start
        self._epochs = list(history.epochs)
        self._step_ms = list(history.step_ms)
        self._graft_steps = list(history.graft_steps)
        self._decisions = list(history.decisions)
        self._choices = list(history.choices)
        self._events = [LifecycleEvent.model_validate(event) for event in state["events"]]
        self._rungs = [RungChange.model_validate(change) for change in state.get("rungs", ())]
        self._rollbacks = [Rollback.model_validate(rollback) for rollback in state.get("rollbacks", ())]
        self._vetoes = [VetoRecord.model_validate(veto) for veto in state.get("vetoes", ())]
        self._trials = [TrialResult.model_validate(trial) for trial in state.get("trials", ())]
        self._reports = [FieldReport.model_validate(report) for report in state["reports"]]
        self._spent = {seed: (int(flops), float(seconds)) for seed, (flops, seconds) in state["spent"].items()}


def step_times(step_ms: list[float], graft_steps: list[int]) -> StepTimes:
    """Median, 99th percentile, and the worst step within `GRAFT_WINDOW` steps of a change of the live path."""
    if not step_ms:
        return StepTimes()
    ordered = sorted(step_ms)
    grafted = [ms for start in graft_steps for ms in step_ms[start : start + GRAFT_WINDOW]]
    return StepTimes(
        count=len(step_ms),
        median_ms=statistics.median(ordered),
        p99_ms=ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        worst_in_graft_ms=max(grafted, default=None),
    )


def metrics_of(task: Task, last: EpochRecord | None, test: Evaluation | None) -> Metrics:
    """The summary's figures; a headline metric other than accuracy goes under `extra`.

    Args:
        task: says what the headline is.
        last: the last epoch's row.
        test: figures on test data.
    """
    headline = task.headline
    found = {"val": last.val_metric if last else None, "test": test.metrics.get(headline or "") if test else None}
    is_accuracy = headline == "accuracy"
    return Metrics(
        val_accuracy=found["val"] if is_accuracy else None,
        test_accuracy=found["test"] if is_accuracy else None,
        val_loss=last.val_loss if last else None,
        test_loss=test.loss if test else None,
        extra={}
        if is_accuracy
        else {f"{split}_{headline}": value for split, value in found.items() if value is not None},
    )


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what a run's figures depend on. Read once a process: it parses a file for each."""
    found = {"python": platform.python_version()}
    for name in ("esper-morphogen", "torch", "numpy", "ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report_id(run_id: str, trace_id: str, outcome: Outcome) -> str:
    """The same where an adaptation ends once more, in a run that was resumed from before its end: it counts once."""
    if not trace_id:
        return new_id()
    return hashlib.sha256(f"{run_id}\n{trace_id}\n{outcome}".encode()).hexdigest()[:32]


def _compiler_counts() -> tuple[int, int]:
    """Frames that dynamo and graphs that inductor compiled in this process; neither is imported for asking."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0, 0
    counters = dynamo.counters
    inductor = counters["inductor"]
    compiles = sum(inductor[f"fxgraph_cache_{result}"] for result in ("hit", "miss", "bypass"))
    return int(counters["frames"]["total"]), int(compiles)


def _compiler_since(before: tuple[int, int]) -> CompilerInTrainer:
    frames, compiles = _compiler_counts()
    return CompilerInTrainer(dynamo_frames=max(0, frames - before[0]), inductor_compiles=max(0, compiles - before[1]))
