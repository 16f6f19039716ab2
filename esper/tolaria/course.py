"""What the parts of a session share: who takes part in a run, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from esper.config import RunConfig
from esper.leyline.experience import ExperienceLog, NoExperience
from esper.leyline.growth import Growable, SeedView
from esper.leyline.ports import AssetHub, Bus, Controller, FaultPlan, NoFaults, Trials
from esper.leyline.summary import Circuit
from esper.tolaria.ledger import LedgerBook
from esper.tolaria.optim import Optimization
from esper.tolaria.ranks import Ranks, SoloRanks
from esper.tolaria.task import Task


def never() -> str | None:
    """The stop of a run that nobody stops."""
    return None


@dataclass
class Ports:
    """The systems around a trainer.

    Attributes:
        hub, bus, controller: None in a run without that system, which then does not grow, tells nobody, or decides
            nothing. Used on rank 0 alone.
        fallback: decides where `controller` does not answer; None: then nothing is decided.
        request_kernels: submits the designs that fit the run's sites; called once, on rank 0, beside the training.
        circuit, tamiyo_circuit: how the breakers around `hub` and `controller` stand.
        ranks: the other trainers of the run.
        stop: asked at every step; a reason ends the run cleanly.
        trials: where forks of the run may train; None nowhere. Used on rank 0 alone.
        faults: a script of faults, for tests.
        experience: what decisions are logged to, on rank 0.
    """

    hub: AssetHub | None = None
    bus: Bus | None = None
    controller: Controller | None = None
    fallback: Controller | None = None
    request_kernels: Callable[[], None] | None = None
    circuit: Callable[[], Circuit] = Circuit
    tamiyo_circuit: Callable[[], Circuit] = Circuit
    ranks: Ranks = field(default_factory=SoloRanks)
    stop: Callable[[], str | None] = never
    trials: Trials | None = None
    faults: FaultPlan = field(default_factory=NoFaults)
    experience: ExperienceLog = field(default_factory=NoExperience)


@dataclass
class Course:
    """One run under way.

    Attributes:
        epoch, step: of the next step to be taken.
        model: what to call for a forward whose gradients are averaged over ranks.
    """

    growable: Growable
    optimization: Optimization
    task: Task
    config: RunConfig
    run_id: str
    ports: Ports
    device: torch.device
    model: nn.Module
    ledger: LedgerBook = field(default_factory=LedgerBook)
    epoch: int = 0
    step: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone speaks with other systems."""
        return self.ports.ranks.rank == 0

    def seed(self, seed_id: str) -> SeedView | None:
        """The seed as it stands now."""
        return next((seed for seed in self.growable.seeds() if seed.seed_id == seed_id), None)
