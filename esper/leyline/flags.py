"""What Nissa finds out of the ordinary, in the short form in which Tamiyo hears of it; `alerts` has all of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from esper.leyline.contract import Contract


class Severity(StrEnum):
    """CRITICAL asks the trainer to roll back to its last good snapshot, where Tamiyo says it."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


class AlertKind(StrEnum):
    """What is out of the ordinary."""

    LOSS_SPIKE = "loss_spike"  # single steps far above the run's own course
    LOSS_RISE = "loss_rise"  # the level itself rises: divergence, or another plateau
    SLOW_STEPS = "slow_steps"
    DEAD_CHANNELS = "dead_channels"  # a layer dies
    CORRELATED_CHANNELS = "correlated_channels"  # a layer's channels become one
    ODD_HEALTH = "odd_health"  # figures of a layer that do not go together, by an isolation forest or far out in two
    ROLLBACKS = "rollbacks"  # kernels that were taken back
    CACHE_MISSES = "cache_misses"
    BUS_LAG = "bus_lag"
    TAMIYO_SILENT = "tamiyo_silent"  # a trainer does not ask her any more, and decides itself
    POLICY_REFUSED = "policy_refused"  # one that is damaged, or that this code cannot load


class AlertFlag(Contract):
    """An alert of a run that stands while a decision is taken.

    Attributes:
        site, seed_id: what it is about, where it is about one.
        epoch: after which the run heard of it last; Nissa tells an alert again when it has grown.
        evidence: the figures in a sentence.
    """

    alert_id: str
    kind: AlertKind
    severity: Severity
    site: str | None = None
    seed_id: str | None = None
    epoch: Annotated[int, Field(ge=0)]
    summary: str
    evidence: str

    @property
    def is_divergence(self) -> bool:
        """Whether it says that the loss runs away: its level rises, or it is far out or no number at all."""
        grave = self.kind is AlertKind.LOSS_SPIKE and self.severity is Severity.CRITICAL
        return grave or self.kind is AlertKind.LOSS_RISE
