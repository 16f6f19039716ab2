"""Which kernels a configuration asks for, and a hub in memory that has them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper.config import RunConfig
from esper.kasmina.sites import find_sites
from esper.leyline.errors import ConfigError
from esper.leyline.kernels import SiteSignature
from esper.leyline.ops import fits
from esper.leyline.ports import AssetHub

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from esper.urza.named import Lookup, NamedDesign


def local_hub(
    signatures: Iterable[SiteSignature], config: RunConfig, *, private_key: Ed25519PrivateKey | None = None
) -> tuple[AssetHub, bytes]:
    """An asset hub in memory with the library's kernels for these sites, built and checked here; and its public key.

    Args:
        signatures: of the sites.
        config: says which blueprints.
        private_key: the signer's; None makes one that is forgotten.

    Raises:
        ConfigError: if a configured blueprint is not in the library.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from esper.tezzeret.builder import InProcess
    from esper.tezzeret.worker import Idle, work_once
    from esper.urabrask.gauntlet import examine
    from esper.urza.memory import MemoryHub

    key = private_key or Ed25519PrivateKey.generate()
    hub = MemoryHub()
    request_kernels(hub, signatures, config, "local")
    builder = InProcess(examine, config.tezzeret.limits)
    with torch.random.fork_rng(devices=[]):
        turn = None
        while not isinstance(turn, Idle):
            turn = work_once(hub, builder, worker="local", private_key=key)
    hub.is_filled = True
    return hub, key.public_key().public_bytes_raw()


def local_hub_of(model: nn.Module, example: tuple[Any, ...], config: RunConfig) -> tuple[AssetHub, bytes]:
    """As `local_hub`, with kernels for the very sites that a run of this model looks for.

    Args:
        model: not yet wrapped.
        example: its positional inputs.
        config: of the run.

    Raises:
        SiteError: if it has no site.
        ConfigError: see `local_hub`.
    """
    causal = config.task == "language_model"
    sites = find_sites(model, example, sites=config.kasmina.sites, causal=causal)
    return local_hub(sites.values(), config)


def request_kernels(hub: AssetHub, signatures: Iterable[SiteSignature], config: RunConfig, submitted_by: str) -> None:
    """Submits the designs that the configuration allows, for those of the sites they fit; built ones are not built
    again. Submissions go out together, so that the hub can write them together.

    Raises:
        ConfigError: if a configured blueprint is neither in the library nor in the hub.
        UnavailableError: if the hub does not answer.
    """
    from esper.urza import named
    from esper.urza.library import load_library

    configured = config.tezzeret.blueprints
    names = dict.fromkeys(load_library() if configured == "library" else configured)
    if config.tamiyo.policy == "schedule":
        names |= dict.fromkeys(graft.blueprint for graft in config.tamiyo.schedule)
    submitted = named.in_hub(hub)
    designs = [named_design(name, submitted, field="tezzeret.blueprints") for name in names]
    sites = tuple(dict.fromkeys(signatures))
    hub.register_sites(sites, run_id=submitted_by)

    def submit(design: NamedDesign) -> None:
        targets = [signature for signature in sites if fits(design.ir, signature) is None]
        if targets:
            hub.submit_blueprint(
                design.ir, name=design.name, targets=targets, tags=design.tags, priority=9, submitted_by=submitted_by
            )

    with ThreadPoolExecutor(8, thread_name_prefix="submit") as pool:
        list(pool.map(submit, designs))


def require_built(hub: AssetHub, signatures: Iterable[SiteSignature], config: RunConfig, submitted_by: str) -> None:
    """Refuses a hub of this process that lacks what a run asks for, where nobody will build it any more.

    A deterministic run waits for all of it.

    Raises:
        ConfigError: if it lacks a design.
    """
    from esper.urza.memory import MemoryHub

    if not isinstance(hub, MemoryHub) or not hub.is_filled:
        return
    sites = tuple(signatures)
    request_kernels(hub, sites, config, submitted_by)
    lacking = hub.unbuilt(sites)
    if lacking:
        scheduled = (index for index, graft in enumerate(config.tamiyo.schedule) if graft.blueprint in lacking)
        index = next(scheduled, None) if config.tamiyo.policy == "schedule" else None
        raise ConfigError(
            f"the hub in this process has no {', '.join(sorted(lacking))} for this run's sites, and nobody builds it",
            field="tezzeret.blueprints" if index is None else f"tamiyo.schedule.{index}.blueprint",
            remedy="fill the hub for this configuration and these sites: local_hub_of(model, example, config)",
        )


def named_design(name: str, submitted: Lookup, *, field: str) -> NamedDesign:
    """The design that a name of the configuration stands for, in the library or among those submitted.

    Args:
        name: as the configuration has it.
        submitted: see `esper.urza.named`.
        field: of the configuration.

    Raises:
        ConfigError: if there is none.
    """
    from esper.urza import named
    from esper.urza.library import load_library

    design = named.find(name, submitted)
    if design is None:
        close = difflib.get_close_matches(name, load_library(), n=1)
        remedy = f"did you mean {close[0]}?" if close else "see esper blueprints ls, and ls --library"
        raise ConfigError(f"no blueprint {name!r}, shipped or submitted", field=field, remedy=remedy)
    return design
