"""What a run leaves behind: `summary.json` (RunSummary) and `history.json` (RunHistory), both read by the report."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from esper.leyline.alerts import Alert
from esper.leyline.contract import API_VERSION, Contract, Finite, now
from esper.leyline.native import RungChange
from esper.leyline.signals import Choice, CircuitState, EpochRecord, FieldReport, LifecycleEvent, VetoRecord
from esper.leyline.trials import TrialResult

SUMMARY_FILE = "summary.json"
HISTORY_FILE = "history.json"
REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
VIEW_FILE = "view.json"
"""The last picture that Nissa had of the run: what no other file says is the health of its sites."""


class RunStatus(StrEnum):
    """How far a run came. INTERRUPTED can be resumed; FAILED names its error."""

    RUNNING = "running"
    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


class Metrics(Contract):
    """Final figures; accuracies lie in [0, 1]. None where the task has no such figure or no such data."""

    val_accuracy: Finite | None = None
    test_accuracy: Finite | None = None
    val_loss: Finite | None = None
    test_loss: Finite | None = None
    extra: dict[str, Finite] = Field(default_factory=dict)


class Params(Contract):
    """Trainable parameters of the live path."""

    start: int
    final: int


class Start(Contract):
    """A trained model on the validation data, wrapped and before its first step: equal to what the plain one comes to.

    Attributes:
        weights: address of what it started from; empty for a model that was handed over in Python.
        val_metric: the task's headline metric; None without one.
    """

    weights: str = ""
    val_loss: Finite
    val_metric: Finite | None = None
    metric_name: str | None = None


class Rollback(Contract):
    """A return to the last good state; the kernels that were blamed are among the events."""

    epoch: int
    step: int
    reason: str


class Circuit(Contract):
    """The circuit breaker around a trainer's calls to another system.

    Attributes:
        opened: how often the system was given up for a while.
        refused: calls that were not made meanwhile.
    """

    state: CircuitState = CircuitState.CLOSED
    opened: int = 0
    refused: int = 0


class Flops(Contract):
    """FLOPs of the whole run by purpose; a multiply-add counts 2.

    `host` is forward and backward of the live path (fossils included), `shadow` the training and validation of
    kernels behind it (rejected ones too), `telemetry` what the sampled steps cost on top, `trials` that of forks
    (training and validation of all of them; one that died after it began is counted at its limit).
    """

    host: int = 0
    shadow: int = 0
    telemetry: int = 0
    validation: int = 0
    trials: int = 0
    total: int = 0


class Seconds(Contract):
    """Wall-clock seconds of the trainer by purpose; `trials` is what asking for them took: forks run elsewhere."""

    host: Finite = 0.0
    shadow: Finite = 0.0
    telemetry: Finite = 0.0
    validation: Finite = 0.0
    control: Finite = 0.0
    checkpoint: Finite = 0.0
    trials: Finite = 0.0
    total: Finite = 0.0


class Ledger(Contract):
    """The cost of everything."""

    flops: Flops = Flops()
    seconds: Seconds = Seconds()


class StepTimes(Contract):
    """Step times. `worst_in_graft_ms` is the worst step within 10 steps of a change of the live path."""

    count: int = 0
    median_ms: Finite = 0.0
    p99_ms: Finite = 0.0
    worst_in_graft_ms: Finite | None = None


class CompilerInTrainer(Contract):
    """Work of torch's compilers in the trainer that Esper caused. Both are always 0: it is a promise."""

    dynamo_frames: int = 0
    inductor_compiles: int = 0


class BusCounts(Contract):
    """Messages of this run on the bus.

    Attributes:
        dropped: that a group never got, because newer ones came in and the topic's backlog was full.
        dead: that a group gave up; they are among the dead letters.
    """

    published: int = 0
    delivered: int = 0
    redelivered: int = 0
    dropped: int = 0
    dead: int = 0


class RunSummary(Contract):
    """What the run came to: the documented form of `summary.json`."""

    api_version: int = API_VERSION
    run_id: str
    task: str
    seed: int
    status: RunStatus
    deterministic: bool = False
    num_epochs: Annotated[int, Field(ge=0)] = 0
    started_at: Finite = Field(default_factory=now)
    finished_at: Finite | None = None
    metrics: Metrics = Metrics()
    params: Params
    start: Start | None = None
    """What a run that upgrades a trained model began with."""
    events: tuple[LifecycleEvent, ...] = ()
    rungs: tuple[RungChange, ...] = ()
    """When a kernel began to run from native code, or had to run from its IR, and why."""
    field_reports: tuple[FieldReport, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()
    vetoes: tuple[VetoRecord, ...] = ()
    """What policies wanted and the safety gates did not let through, with the reason."""
    trials: tuple[TrialResult, ...] = ()
    """What forks came to before an adaptation began, or none did."""
    urza: Circuit = Circuit()
    tamiyo: Circuit = Circuit()
    ledger: Ledger = Ledger()
    steps: StepTimes = StepTimes()
    compiler_in_trainer: CompilerInTrainer = CompilerInTrainer()
    bus: BusCounts = BusCounts()
    went_without: tuple[str, ...] = ()
    """Systems that did not answer and that the run went on without, in words."""
    alerts: tuple[Alert, ...] = ()
    """What Nissa found out of the ordinary in the run and around it, each as it was told last; of many the latest."""
    last_checkpoint: str | None = None
    error: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class RunHistory(Contract):
    """The series behind the report's pictures.

    Attributes:
        epochs: one record an epoch.
        step_ms: milliseconds of every step, in order.
        graft_steps: steps at which the live path changed.
        decisions: (epoch, words) of every decision, waits too.
        start: what a run that upgrades a trained model began with.
        choices: what was seen of a site when an adaptation began, one for each.
    """

    run_id: str
    start: Start | None = None
    epochs: tuple[EpochRecord, ...] = ()
    step_ms: tuple[Finite, ...] = ()
    graft_steps: tuple[int, ...] = ()
    decisions: tuple[tuple[int, str], ...] = ()
    choices: tuple[Choice, ...] = ()
