"""What a host costs that does not grow: the unit in which runs of growing hosts are given FLOPs to spend."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from esper import kasmina
from esper.tolaria.costs import HostCosts
from esper.tolaria.task import resolve_task
from esper.tolaria.workload import evaluation_batches, example_of, model_args, training_batches

if TYPE_CHECKING:
    from torch import nn

    from esper.config import RunConfig
    from esper.data import DataSets


def epoch_flops(config: RunConfig, data: DataSets, model: nn.Module) -> int:
    """FLOPs of an epoch of a model that does not grow and whose health nobody takes: training and validation."""
    growable = kasmina.wrap(copy.deepcopy(model), example=example_of(data.train), sites=config.kasmina.sites)
    costs = HostCosts(growable, resolve_task(config.task).loss_fn)
    size = config.tolaria.batch_size
    inputs, targets = next(training_batches(data.train, batch_size=size, seed=0).epoch(0, rank=0, world=1))
    steps = training_batches(data.train, batch_size=size, seed=0).num_batches(world=1)
    passes = evaluation_batches(data.val, batch_size=size).epoch(0, rank=0, world=1)
    return steps * costs.training_step(inputs, targets) + sum(costs.forward(model_args(part)) for part, _ in passes)
