"""A small problem with real kernels: what the trainer's tests train."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from esper.api import local_hub, train_local
from esper.config import RunConfig, parse_config
from esper.kasmina.loader import KernelLoader
from esper.leyline import RunSummary, SiteKind, SiteSignature
from esper.tamiyo.controller import LocalController
from esper.tolaria.optim import SchedulerFactory
from esper.tolaria.schedules import optimizer_factory, scheduler_factory
from esper.tolaria.task import TASKS
from esper.tolaria.tree import clone
from esper.tolaria.workload import Workload

if TYPE_CHECKING:
    import pytest

torch.set_num_threads(1)  # several threads on tiny tensors only wait for each other

BLUEPRINT = "mlp_2x"
SITE = "3"
SIGNATURE = SiteSignature(kind=SiteKind.VECTOR, channels=12)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class Crash(Exception):  # noqa: N818 - stands for a death, not for an error of ours
    """What a scripted fault raises."""


class CrashAt:
    """Raises at one place and step, once, and says that it did."""

    def __init__(self, place: str, step: int) -> None:
        self.place, self.step, self.fired = place, step, False

    def at(self, place: str, step: int) -> None:
        if (place, step) == (self.place, self.step):
            self.fired = True
            raise Crash(f"{place} {step}")


def model(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Sequential(nn.Linear(12, 12), nn.ReLU()),
            nn.Linear(12, 3),
        )  # fmt: skip


@functools.cache
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x_bd = torch.randn(200, 8, generator=generator)
    return x_bd, (x_bd @ torch.randn(8, 3, generator=generator)).argmax(dim=1)


def config(**settings: object) -> RunConfig:
    """A run that grows one kernel at `SITE`, by schedule, at epoch 0."""
    tree = {
        "data": {"type": "given"},
        "host": {"type": "given"},
        "deterministic": True,
        "budget": {"params": 20.0, "flops": 20.0},
        "tolaria": {"epochs": 8, "batch_size": 40, "scheduler": {"type": "cosine"}, "optimizer": {"lr": 0.01}},
        "kasmina": {
            "sites": [SITE], "evidence_z": 0.0, "min_training_epochs": 1, "shadow_lr": 0.02, "telemetry_every": 3,
            "harm_tolerance": 5.0,
        },
        "tezzeret": {"blueprints": [BLUEPRINT]},
        "tamiyo": {"policy": "schedule", "schedule": [{"epoch": 0, "site": SITE, "blueprint": BLUEPRINT}]},
    }  # fmt: skip
    return parse_config(tree, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])


def workload(chosen: RunConfig, *, scheduler: SchedulerFactory | None = None) -> Workload:
    x, y = data()
    return Workload(
        model=model(),
        example=(x[:2],),
        train=(x[:120], y[:120]),
        val=(x[120:160], y[120:160]),
        test=(x[160:], y[160:]),
        task=TASKS["classification"],
        optimizer=optimizer_factory(chosen.tolaria.optimizer),
        scheduler=scheduler or scheduler_factory(chosen.tolaria.scheduler),
    )


@functools.cache
def kernel_hub():
    """A hub with the one kernel, and its key."""
    return local_hub([SIGNATURE], config(), private_key=KEY)


def train(
    directory: object,
    chosen: RunConfig | None = None,
    *,
    problem: Workload | None = None,
    run_id: str = "run",
    **given: object,
) -> tuple[RunSummary, dict[str, torch.Tensor]]:
    """Trains the problem; returns the summary and copies of the final weights."""
    chosen = chosen or config()
    problem = problem or workload(chosen)
    hub, key = kernel_hub()
    parts = {
        "hub": hub,
        "bus": None,
        "controller": LocalController(chosen.tamiyo, seed=chosen.seed),
        "public_key": key,
        **given,
    }
    summary = train_local(problem, chosen, directory=str(directory), run_id=run_id, **parts)  # type: ignore[arg-type]
    return summary, clone(dict(problem.model.state_dict()))


def load_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels come by the next step: their own thread still loads them, but is waited for. An epoch of the problem is
    over sooner than a load, and how many pass meanwhile is a matter of luck, while a run has few.
    """
    submit = KernelLoader._submit

    def submitted(self: KernelLoader, work: Callable[[], object]) -> Future[object]:
        future = submit(self, work)
        wait([future])
        return future

    monkeypatch.setattr(KernelLoader, "_submit", submitted)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit by bit, key by key."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
