"""What a run would only find out when systems are up and files are written, found out before."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from esper.api.hosting import device_of, wrap_workload
from esper.api.kernels import named_design
from esper.config import RunConfig
from esper.leyline.errors import ConfigError, SiteError
from esper.leyline.kernels import SiteSignature
from esper.leyline.ops import fits
from esper.storage import Storage
from esper.tolaria.workload import Workload

if TYPE_CHECKING:
    from esper.urza.named import Lookup


def check_workload(workload: Workload, config: RunConfig) -> None:
    """Refuses at once what a run would only find out when systems are up and files are written. Changes nothing.

    Raises:
        ConfigError: if a named blueprint is neither in the library nor in the storage's catalogue, or fits no site, a
            scheduled graft cannot be made, the weights to start from are not the host's, its extra state cannot be
            saved, or the trainer of this process has no GPU.
        SiteError: if a site does not exist or cannot carry a seed.
    """
    from esper.urza import named

    names = config.tezzeret.blueprints
    submitted = named.in_storage(Storage.at(config.storage, config.storage_options))
    if config.tolaria.num_workers == 0:
        device_of(config)
    trial = replace(workload, model=copy.deepcopy(workload.model))
    if workload.trained is not None:
        workload.trained.load_into(trial.model)
    try:
        sites = wrap_workload(trial, config, torch.device("cpu")).sites
    except SiteError as error:  # its field is an argument's name; people write the setting
        field = "kasmina.sites" if error.field == "sites" else error.field
        raise SiteError(error.message, field=field, remedy=error.remedy) from error
    for name in () if names == "library" else names:
        _fitting(name, submitted, sites.values(), field="tezzeret.blueprints")
    require_schedule(config, sites, submitted)


def require_schedule(config: RunConfig, sites: Mapping[str, SiteSignature], submitted: Lookup) -> None:
    """Refuses scheduled grafts that cannot be made.

    Args:
        config: of the run; without the policy `schedule` nothing is looked at.
        sites: of the host, by name.
        submitted: the designs beside the library's, see `esper.urza.named`.

    Raises:
        ConfigError: for the first of them.
    """
    names = config.tezzeret.blueprints
    for index, graft in enumerate(config.tamiyo.schedule if config.tamiyo.policy == "schedule" else ()):
        field = f"tamiyo.schedule.{index}"
        if graft.site not in sites:
            raise ConfigError(
                f"no site {graft.site!r}", field=f"{field}.site", remedy=f"sites here: {', '.join(sites)}"
            )
        _fitting(graft.blueprint, submitted, [sites[graft.site]], field=f"{field}.blueprint")
        if names != "library" and graft.blueprint not in names:
            raise ConfigError(
                f"{graft.blueprint} is not built", field=f"{field}.blueprint", remedy="add it to tezzeret.blueprints"
            )


def _fitting(name: str, submitted: Lookup, sites: Iterable[SiteSignature], *, field: str) -> None:
    """Refuses a name that stands for no design, or for one that fits none of the sites."""
    design = named_design(name, submitted, field=field)
    reasons = [fits(design.ir, signature) for signature in sites]
    if None not in reasons:
        why = reasons[0] or "there is no site"
        raise ConfigError(
            f"{name}: {why}", field=field, remedy="esper train CONFIG --dry-run lists what fits at which site"
        )
