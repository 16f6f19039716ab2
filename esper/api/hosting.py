"""A workload's host: wrapped, or as a checkpoint left it."""

from __future__ import annotations

import torch
from torch import nn

from esper import kasmina
from esper.config import RunConfig
from esper.leyline.errors import ConfigError, NotFoundError
from esper.storage import Storage
from esper.tolaria.checkpoint import Checkpoints, Restored
from esper.tolaria.contents import refill, require_portable
from esper.tolaria.workload import Workload, to_device


def wrap_workload(workload: Workload, config: RunConfig, device: torch.device) -> kasmina.Host:
    """Moves the workload's model to the device and wraps it there, in place.

    Raises:
        ConfigError: if the model holds extra state that a checkpoint cannot hold.
        SiteError: if a site does not exist or cannot carry a seed.
    """
    require_portable(workload.model)
    return kasmina.wrap(
        workload.model.to(device),
        example=to_device(workload.example, device),
        sites=config.kasmina.sites,
        causal=workload.task.name == "language_model",
        config=config.kasmina,
        tails=workload.tails,
    )


def device_of(config: RunConfig) -> torch.device:
    """The device that a trainer of this process computes on.

    Raises:
        ConfigError: if it is to be a GPU and there is none.
    """
    if not config.tolaria.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", field="tolaria.use_gpu", remedy="set it to false")
    return torch.device("cuda", torch.cuda.current_device())


def checkpoint_host(
    workload: Workload, config: RunConfig, *, directory: str, best: bool = False, epoch: int | None = None
) -> kasmina.Host:
    """The wrapped model of a run's checkpoint, grown as it was, on the CPU.

    Args:
        workload: with a fresh host, of the same shape as the run's.
        config: of the run.
        directory: of the run.
        best: the best checkpoint instead of the last.
        epoch: the checkpoint of this epoch, as its folder is numbered.

    Raises:
        NotFoundError: if there is no such checkpoint.
        TamperedError: if it is not whole.
    """
    checkpoints = Checkpoints(Storage.at(directory, config.storage_options))
    find = checkpoints.best if best else checkpoints.latest
    found: Restored | None = find() if epoch is None else checkpoints.load(epoch)
    if found is None:
        raise NotFoundError(f"{directory} holds no {'best ' if best else ''}checkpoint")
    host = wrap_workload(workload, config, torch.device("cpu"))
    host.load_growth_state(found.state["session"]["growth"])
    refill(host.module, found.state["session"])
    return host


def exported(host: kasmina.Host, *, fold: bool) -> nn.Module:
    """A plain copy of the host's model; `fold` as `Grown.export` has it."""
    return kasmina.export_folded(host)[0] if fold else kasmina.export(host)
