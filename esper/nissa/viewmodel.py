"""What a view draws: one run, small, frozen, picklable and bounded. It holds facts; words and colours are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.native import Rung
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import EpochRecord, Evidence, Outcome

NUM_POINTS = 240
NUM_STEP_LOSSES = 160
NUM_NOTES = 40
NUM_SEEDS = 256
NUM_CLOCK = 6
NUM_ALERTS = 32


class Tone(StrEnum):
    """How a note is meant. A view adds a colour and a mark to it, never a colour alone."""

    INFO = "info"
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


class Point(NamedTuple):
    """The curves at the end of one epoch."""

    epoch: int
    train_loss: float
    val_loss: float | None
    train_metric: float | None
    val_metric: float | None
    params: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """Something that happened and that people should hear of once.

    Attributes:
        number: counts a run's notes from 1, so that a view knows which ones are new to it.
        at: seconds since the epoch, at the sender.
        subject: the site, or the system where no site is meant.
        stage: that a seed entered; None where no seed moved.
    """

    number: int
    at: float
    epoch: int
    step: int
    subject: str
    text: str
    reason: str = ""
    tone: Tone = Tone.INFO
    stage: SeedStage | None = None


@dataclass(frozen=True, slots=True)
class KernelRuns:
    """What the kernels of one design did on the live path of one site.

    Attributes:
        num: their forwards so far.
        latency_ms: of a forward, in the last interval in which one was timed; of several kernels, of the one last told.
        step: of the last report.
    """

    site: str
    blueprint: str
    num: int = 0
    latency_ms: float | None = None
    step: int = -1


@dataclass(frozen=True, slots=True)
class SeedView:
    """One seed as last heard of.

    Attributes:
        seed_id: empty for a site of which no seed has reported yet.
        since_epoch: when it entered `stage`, as far as known.
        stage_step: the step of the signal that `stage` comes from; an older one does not overrule it.
        health_step: the step of the last health report.
        rung: what its kernel runs from; None while nobody said so, which means its IR.
        rung_step: the step of the signal that `rung` comes from.
    """

    site: str
    seed_id: str = ""
    stage: SeedStage = SeedStage.DORMANT
    alpha: float = 0.0
    blueprint: str | None = None
    evidence: Evidence | None = None
    since_epoch: int | None = None
    health_score: float | None = None
    grow_potential: float | None = None
    train_loss: float | None = None
    gate: str = ""
    stage_step: int = -1
    health_step: int = -1
    rung: Rung | None = None
    rung_step: int = -1


@dataclass(frozen=True, slots=True)
class LiveView:
    """One run at one moment.

    Attributes:
        epochs_done: epochs that have ended.
        step: optimizer steps done; `steps_seen` is the same by step telemetry alone.
        points: the last epochs' curves.
        step_losses: mean training loss of the last batches of step telemetry.
        best: the point with the best validation figure so far.
        clock: (timestamp, share of the run done) at the last epoch ends: the pace.
        last: the last epoch's full record.
        kernels_ready, kernels_pending: kernels for the run's sites.
        decision: the controller's last answer in words, waits too; `policy` gave it.
        outcomes: how many adaptations ended which way.
        entered: how many seeds entered which stage; GRAFTING is a graft.
        num_refused: transitions that were refused.
        kernel_runs: by site and design, in the order of their first run.
        num_notes: notes so far, also those no longer in `notes`.
        alerts: by id, in the order of their begin; those that last, and the last ones that ended.
        num_alerts: alerts so far by kind, also those no longer in `alerts`.
        page: address of the live page that shows it; empty where nobody serves one.
    """

    run_id: str
    task: str = ""
    directory: str = ""
    started_at: float = 0.0
    updated_at: float = 0.0
    resumed_from_epoch: int | None = None
    num_epochs: int = 0
    epochs_done: int = 0
    step: int = 0
    steps_seen: int = 0
    steps_per_epoch: int = 0
    step_ms: float | None = None
    step_losses: tuple[float, ...] = ()
    params_start: int = 0
    points: tuple[Point, ...] = ()
    best: Point | None = None
    clock: tuple[tuple[float, float], ...] = ()
    last: EpochRecord | None = None
    sites: Mapping[str, str] = field(default_factory=dict)
    seeds: Mapping[str, SeedView] = field(default_factory=dict)
    kernels_ready: int = 0
    kernels_pending: int = 0
    decision: str = ""
    policy: str = ""
    outcomes: Mapping[Outcome, int] = field(default_factory=dict)
    entered: Mapping[SeedStage, int] = field(default_factory=dict)
    num_refused: int = 0
    kernel_runs: tuple[KernelRuns, ...] = ()
    notes: tuple[Note, ...] = ()
    num_notes: int = 0
    alerts: Mapping[str, Alert] = field(default_factory=dict)
    num_alerts: Mapping[AlertKind, int] = field(default_factory=dict)
    page: str = ""

    @property
    def params(self) -> int:
        """Trainable parameters on the live path now."""
        return self.last.params if self.last and self.last.params else self.params_start

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        if not self.num_epochs:
            return 0.0
        share = self.epochs_done / self.num_epochs
        if self.steps_per_epoch:
            share = max(share, self.step / (self.steps_per_epoch * self.num_epochs))
        return min(share, 1.0)

    @property
    def is_done(self) -> bool:
        """Whether the last epoch has ended."""
        return 0 < self.num_epochs <= self.epochs_done

    @property
    def open_alerts(self) -> tuple[Alert, ...]:
        """The alerts that last, in the order of their begin."""
        return tuple(alert for alert in self.alerts.values() if alert.is_open)

    def seconds_left(self, now: float) -> float | None:
        """Estimates the seconds left at the pace of the last epochs; None until there is a pace."""
        if self.is_done:
            return 0.0
        if not self.clock:
            return None
        (start, share), progress = self.clock[0], self.progress
        if progress <= share or self.updated_at <= start:
            return None
        left = (1.0 - progress) * (self.updated_at - start) / (progress - share)
        return max(left - max(now - self.updated_at, 0.0), 0.0)
