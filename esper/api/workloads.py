"""The host and the workload that a configuration describes, once its data are loaded."""

from __future__ import annotations

from torch import nn

from esper.config import RunConfig
from esper.data import DataSets
from esper.hosts import build_host
from esper.tolaria.schedules import optimizer_factory, scheduler_factory
from esper.tolaria.task import resolve_task
from esper.tolaria.workload import Workload, example_of


def configured_host(config: RunConfig, data: DataSets) -> nn.Module:
    """Returns the network that the configuration names, with initial weights of its seed.

    Raises:
        ConfigError: if it does not go with the data, or cannot be built from a configuration.
    """
    return build_host(config.host, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=config.seed)


def configured_workload(
    config: RunConfig, data: DataSets, model: nn.Module | None = None, *, with_test: bool = True
) -> Workload:
    """Returns what the configuration trains on these data; weights to start from are not loaded.

    Args:
        config: of the run.
        data: its data.
        model: the host; None is `configured_host`.
        with_test: whether the run may see the test part, after its last epoch.

    Raises:
        ConfigError: if the task or the optimizer is wrong; see `configured_host`.
    """
    return Workload(
        model=configured_host(config, data) if model is None else model,
        example=example_of(data.train),
        train=data.train,
        val=data.val,
        test=data.test if with_test else None,
        task=resolve_task(config.task),
        optimizer=optimizer_factory(config.tolaria.optimizer),
        scheduler=scheduler_factory(config.tolaria.scheduler),
    )
