"""The four networks that `growth` compares, each trained by the same trainer in this process.

    none       the small host, which does not grow
    grow       the same host under the heuristic policy
    static     the network that `grow` ended with, all its parts there from the start and newly initialised
    stopped    that network again, trained for the epochs that cost what all of `grow` cost

All arms of a seed start from the same host weights and see the same samples in the same order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from esper import kasmina
from esper.api import configured_host, configured_workload, local_hub, train_local
from esper.config import RunConfig
from esper.data import DataSets
from esper.kasmina.layer import Layer, Layers, all_layers
from esper.kasmina.seed import KernelFacts, Seed
from esper.kasmina.sites import find_sites
from esper.leyline import EpochRecord, RunSummary, SeedStage
from esper.leyline.errors import NotFoundError
from esper.leyline.growth import PREFIX
from esper.leyline.lower import initialise
from esper.storage import Storage
from esper.tamiyo.controller import LocalController
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.weights import Trained
from esper.tolaria.workload import Workload, example_of

ARMS = ("none", "grow", "static", "stopped")


class Cell(BaseModel):
    """What one arm came to for one seed; finished cells are kept as files.

    Attributes:
        settings: digest of the configuration it ran with; a cell of another one is not taken over.
        test_accuracy: looked at once, after the last epoch.
        flops: of everything: forward and backward, shadows, validation, telemetry.
        parts: `site:blueprint` of each kernel on the live path at the end.
        fossils: kernels that became permanent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    arm: str
    seed: int
    settings: str
    test_accuracy: float
    val_accuracy: float
    epochs: int
    params: int
    flops: int
    seconds: float
    parts: tuple[str, ...] = ()
    fossils: int = 0


@dataclass(frozen=True)
class Outcome:
    """A trained arm, and for `grow` the topology it ended with.

    Attributes:
        epochs: the row of each.
        weights: of the host, under its own keys.
    """

    summary: RunSummary
    growth: dict[str, Any]
    parts: tuple[str, ...]
    epochs: tuple[EpochRecord, ...] = ()
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def small(
    config: RunConfig, data: DataSets, *, policy: str, say: Callable[[str], None], trained: Trained | None = None
) -> Outcome:
    """Trains the host of the configuration under a policy, from new weights or from trained ones."""
    config = _with(config, policy=policy)
    workload = replace(configured_workload(config, data), trained=trained)
    return _train(workload, config, say, grows=policy != "none")


def static(
    config: RunConfig, data: DataSets, growth: dict[str, Any], *, epochs: int, say: Callable[[str], None]
) -> Outcome:
    """Trains the network of a topology from scratch, as a plain module that does not grow.

    Args:
        config: of the run that grew.
        data: the same.
        growth: the topology, from `small`.
        epochs: how long.
        say: takes progress.
    """
    model = with_parts(configured_host(config, data), growth, config, data)
    # what watches sites for growth is of no use here and must not be charged
    quiet = _with(config, policy="none", epochs=epochs, telemetry_every=1 << 30)
    return _train(configured_workload(quiet, data, model), quiet, say, grows=False)


def with_parts(host: nn.Module, growth: dict[str, Any], config: RunConfig, data: DataSets) -> nn.Module:
    """The host with the kernels of a topology at their sites, freshly initialised, as a plain module."""
    wrapped = kasmina.wrap(
        host, example=example_of(data.train), sites=config.kasmina.sites, causal=data.vocabulary is not None
    )
    wrapped.load_growth_state(growth)
    for number, (layer, seed, facts) in enumerate(_blended(wrapped.module)):
        initialise(layer.kernel(seed), facts.ir, seed=config.seed * 1009 + number)
    return kasmina.export(wrapped)


def stopped_epochs(static_cell: Cell, flops: int) -> int:
    """Whole epochs of the static network that come closest to `flops`, at least one."""
    return max(1, round(flops / (static_cell.flops / static_cell.epochs)))


def cell(outcome: Outcome, *, host: str, arm: str, seed: int, settings: str, parts: tuple[str, ...]) -> Cell:
    """The figures of a trained arm."""
    summary = outcome.summary
    assert summary.metrics.test_accuracy is not None  # digits keep a test part back
    assert summary.metrics.val_accuracy is not None
    return Cell(
        host=host,
        arm=arm,
        seed=seed,
        settings=settings,
        test_accuracy=summary.metrics.test_accuracy,
        val_accuracy=summary.metrics.val_accuracy,
        epochs=summary.num_epochs,
        params=summary.params.final,
        flops=summary.ledger.flops.total,
        seconds=summary.ledger.seconds.total,
        parts=parts,
        fossils=sum(event.to_stage is SeedStage.FOSSILIZED and not event.refused for event in summary.events),
    )


def _train(workload: Workload, config: RunConfig, say: Callable[[str], None], *, grows: bool) -> Outcome:
    hub, public_key = None, None
    epochs: list[EpochRecord] = []

    def told(record: EpochRecord) -> None:
        epochs.append(record)
        say(f"epoch {record.epoch + 1} of {record.num_epochs}")

    if grows:
        sites = find_sites(workload.model, workload.example, sites=config.kasmina.sites)
        hub, public_key = local_hub(sites.values(), config)
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as directory:
        summary = train_local(
            workload,
            config,
            directory=directory,
            run_id=config.name,
            hub=hub,
            bus=None,
            controller=LocalController(config.tamiyo, seed=config.seed),
            public_key=public_key,
            on_epoch=told,
        )
        restored = Checkpoints(Storage.at(directory)).latest()
    if restored is None:
        raise NotFoundError("the run left no checkpoint")
    parts = tuple(f"{layer.site}:{facts.blueprint}" for layer, _, facts in _blended(workload.model))
    state = workload.model.state_dict()
    weights = {name: tensor.clone() for name, tensor in state.items() if not name.startswith(f"{PREFIX}.")}
    return Outcome(summary, restored.state["session"]["growth"], parts, tuple(epochs), weights)


def _blended(model: nn.Module) -> list[tuple[Layer, Seed, KernelFacts]]:
    """The kernels on the live path of a wrapped model, site by site, oldest first."""
    layers = model.get_submodule(PREFIX)
    assert isinstance(layers, Layers)
    return [
        (layer, seed, seed.facts) for layer in all_layers(layers) for seed in layer.blended() if seed.facts is not None
    ]


def _with(
    config: RunConfig, *, policy: str, epochs: int | None = None, telemetry_every: int | None = None
) -> RunConfig:
    kasmina_config, tolaria = config.kasmina, config.tolaria
    if telemetry_every is not None:
        kasmina_config = kasmina_config.model_copy(update={"telemetry_every": telemetry_every})
    if epochs is not None:
        tolaria = tolaria.model_copy(update={"epochs": epochs})
    return config.model_copy(
        update={
            "tamiyo": config.tamiyo.model_copy(update={"policy": policy}),
            "kasmina": kasmina_config,
            "tolaria": tolaria,
        }
    )
