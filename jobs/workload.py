"""From a configuration to a training problem: loads the data, builds the host. Pickles, so that each worker can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.config import RunConfig

if TYPE_CHECKING:
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
        from esper.hosts import build_host
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
            model=build_host(config.host, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=config.seed),
            example=example_of(data.train),
            train=data.train,
            val=data.val,
            test=data.test,
            task=resolve_task(config.task),
            optimizer=optimizer_factory(config.tolaria.optimizer),
            scheduler=scheduler_factory(config.tolaria.scheduler),
            trained=Trained.of(config.host),
        )
