"""From a configuration to a training problem: loads the data, builds the host. Pickles, so that each worker can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from esper.config import RunConfig, RunHost, parse_config
from esper.leyline import ConfigError, NotFoundError, TamperedError
from esper.leyline.summary import CONFIG_FILE

if TYPE_CHECKING:
    from torch import nn

    from esper.data import DataSets
    from esper.tolaria.workload import Workload


@dataclass(frozen=True)
class ConfiguredWorkload:
    """Makes the workload that a configuration describes.

    Attributes:
        config: of the run.
        data_root: folder below which relative data paths are looked up.

    Raises (when called):
        DataError: if the data cannot be found or read.
        ConfigError: if host and data do not go together.
    """

    config: RunConfig
    data_root: str | None = None

    def __call__(self) -> Workload:
        from esper.data import load_data
        from esper.tolaria.schedules import optimizer_factory, scheduler_factory
        from esper.tolaria.task import resolve_task
        from esper.tolaria.weights import Trained
        from esper.tolaria.workload import Workload, example_of

        config = self.config
        data = load_data(
            config.data,
            task=config.task,
            seed=config.seed,
            data_root=self.data_root,
        )
        return Workload(
            model=_model(config, data),
            example=example_of(data.train),
            train=data.train,
            val=data.val,
            test=data.test,
            task=resolve_task(config.task),
            optimizer=optimizer_factory(config.tolaria.optimizer),
            scheduler=scheduler_factory(config.tolaria.scheduler),
            trained=Trained.of(config.host),
        )


def _model(config: RunConfig, data: DataSets) -> nn.Module:
    """The host, plain: built with new weights, or as a run left it.

    Raises:
        ConfigError: if it does not go with the data, or the run cannot be built upon.
    """
    from esper.hosts import build_host

    if isinstance(config.host, RunHost):
        return _as_left(config.host, config, data)
    return build_host(config.host, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=config.seed)


def _as_left(host: RunHost, config: RunConfig, data: DataSets) -> nn.Module:
    from esper import kasmina
    from esper.api import checkpoint_host
    from esper.storage import Storage
    from esper.tolaria.schedules import optimizer_factory
    from esper.tolaria.task import resolve_task
    from esper.tolaria.workload import Workload, example_of

    folder = Storage.at(host.run, config.storage_options if "://" in host.run else None)
    try:
        origin = parse_config(yaml.safe_load(folder.read(CONFIG_FILE)))
    except NotFoundError as error:
        raise ConfigError(f"{host.run} is no folder of a run", field="host.run", remedy="see esper runs ls") from error
    if origin.host.type == "given":
        raise ConfigError(
            f"{host.run} trained a model that was handed over in Python",
            field="host.run",
            remedy="esper.grow(run.export(), ...) in your script",
        )
    origin = origin.model_copy(update={"storage_options": config.storage_options if "://" in host.run else {}})
    workload = Workload(
        model=_model(origin, data),
        example=example_of(data.train),
        train=data.train,
        val=data.val,
        task=resolve_task(origin.task),
        optimizer=optimizer_factory(origin.tolaria.optimizer),
    )
    try:
        left = checkpoint_host(workload, origin, directory=host.run, epoch=host.epoch)
    except (NotFoundError, TamperedError) as error:
        raise ConfigError(
            f"the checkpoint to start from cannot be used: {error.message}",
            field="host.epoch",
            remedy="null takes the last that is whole",
        ) from error
    return kasmina.export(left)
