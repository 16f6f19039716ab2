"""From a configuration to a training problem: loads the data, builds the host. Pickles, so that each worker can."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        from esper.api import configured_workload
        from esper.data import load_data
        from esper.tolaria.weights import Trained

        config = self.config
        data = load_data(
            config.data,
            task=config.task,
            seed=config.seed,
            data_root=self.data_root,
        )
        return replace(configured_workload(config, data, _model(config, data)), trained=Trained.of(config.host))


def _model(config: RunConfig, data: DataSets) -> nn.Module:
    """The host, plain: built with new weights, or as a run left it.

    Raises:
        ConfigError: if it does not go with the data, or the run cannot be built upon.
    """
    from esper.api import configured_host

    if isinstance(config.host, RunHost):
        return _as_left(config.host, config, data)
    return configured_host(config, data)


def _as_left(host: RunHost, config: RunConfig, data: DataSets) -> nn.Module:
    from esper import kasmina
    from esper.api import checkpoint_host, configured_workload
    from esper.storage import Storage

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
    workload = configured_workload(origin, data, _model(origin, data), with_test=False)
    try:
        left = checkpoint_host(workload, origin, directory=host.run, epoch=host.epoch)
    except (NotFoundError, TamperedError) as error:
        raise ConfigError(
            f"the checkpoint to start from cannot be used: {error.message}",
            field="host.epoch",
            remedy="null takes the last that is whole",
        ) from error
    return kasmina.export(left)
