"""A model that grows in a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from esper import kasmina
from esper.api.checking import require_schedule
from esper.api.hosting import exported
from esper.api.kernels import local_hub
from esper.api.runtime import new_run_id
from esper.api.settings import refuse, resolve
from esper.config import Budget, RunConfig
from esper.leyline.chains import Tail
from esper.leyline.errors import ConfigError
from esper.leyline.experience import ExperienceLog, NoExperience
from esper.leyline.growth import SeedView
from esper.leyline.kernels import SiteSignature
from esper.leyline.ports import AssetHub, Bus, Controller
from esper.storage import Storage
from esper.tamiyo.controller import LocalController
from esper.tamiyo.gnn import KIND, pin
from esper.tolaria.contents import require_portable
from esper.tolaria.course import Ports
from esper.tolaria.optim import Optimization
from esper.tolaria.session import Session
from esper.tolaria.task import Task, resolve_task
from esper.tolaria.workload import Data, evaluation_batches, to_device
from esper.urza import named
from esper.urza.policies import StoredPolicies

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from esper.api.growing import Run
    from esper.urza.named import Lookup


def wrap(
    model: nn.Module,
    *,
    example: tuple[Any, ...],
    sites: str | Sequence[str] | None = None,
    causal: bool = False,
    config: RunConfig | None = None,
    overrides: Iterable[str] = (),
    tails: Mapping[str, Tail] | None = None,
) -> Grown:
    """Makes a model able to grow in one's own loop. The model stays what it is; go on calling it.

    Args:
        model: any `nn.Module`; it gets one child, `_esper`.
        example: positional inputs of the model for a few samples.
        sites: `auto`, a module path or glob, or several; None is `kasmina.sites`, which is `auto` by default.
        causal: whether sequence sites may only look back, as in language models.
        config: limits and rates; None is the defaults.
        overrides: dotted settings, such as `kasmina.shadow_lr=1e-3`.
        tails: by site, what the model computes from there on, `tail(model, h, *inputs)`: kernels train behind the host
            without a replay of what comes before (see `esper.kasmina.tails`).

    Raises:
        ConfigError: if a setting is wrong, or the model holds extra state that a checkpoint cannot hold.
        SiteError: if a site does not exist or cannot carry a seed, or a tail does not put out what the model does.
    """
    settings = {"data": {"type": "given"}, "host": {"type": "given"}}
    resolved = resolve(config or RunConfig(), settings, _checked(overrides))
    require_portable(model)
    wanted = resolved.kasmina.sites if sites is None else sites
    host = kasmina.wrap(model, example=example, sites=wanted, causal=causal, config=resolved.kasmina, tails=tails)
    return Grown(host, example, resolved)


class Grown:
    """A model that can grow. Call it, or the model itself, as ever."""

    def __init__(self, host: kasmina.Host, example: tuple[Any, ...], config: RunConfig) -> None:
        self.host = host
        self._example = example
        self._config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.host.module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Grown({type(self.host.module).__name__}, sites={list(self.host.sites)})"

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.host.module

    @property
    def sites(self) -> Mapping[str, SiteSignature]:
        """Name and signature of each site, in forward order."""
        return self.host.sites

    def seeds(self) -> list[SeedView]:
        """Every seed as it stands."""
        return self.host.seeds()

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters on the live path: what an optimizer is made with."""
        return (parameter for _, parameter in self.host.live_parameters())

    def export(self, *, fold: bool = False) -> nn.Module:
        """The model as it is now, as a plain `nn.Module`; this one is not changed.

        Args:
            fold: puts fossils into the linear layers whose outputs they grow, where both are linear (to rounding).
        """
        return exported(self.host, fold=fold)

    @contextmanager
    def session(
        self,
        *,
        optimizer: Optimizer,
        val_data: Data,
        task: Task | str = "classification",
        scheduler: LRScheduler | None = None,
        scaler: GradScaler | None = None,
        epochs: int | None = None,
        steps_per_epoch: int = 0,
        batch_size: int | None = None,
        budget: Budget | None = None,
        overrides: Iterable[str] = (),
        hub: AssetHub | None = None,
        public_key: bytes | None = None,
        bus: Bus | None = None,
        controller: Controller | None = None,
        experience: Callable[[RunConfig, str], ExperienceLog] | None = None,
    ) -> Iterator[Session]:
        """Growth around one's own loop: `s.step(batch, loss)` after each step, `s.end_epoch(metrics)` after each epoch.

        One process: workers that train together must grow together, and for that there is `grow`.

        Without a `hub`, the library's kernels are built here, in this process, before the first step; nothing of the
        session outlives it but the model.

        Args:
            optimizer: of the model's parameters; kernels join it when they are grafted.
            val_data: what evidence is taken on.
            task: by name, or an `esper.Task`; its loss trains kernels in shadow.
            scheduler: yours to step; it follows the growth.
            scaler: of your losses in float16, yours to step; rollbacks and the session's state hold it.
            epochs: how many there will be; policies plan with it.
            steps_per_epoch: if known; else it is taken from the first epoch.
            batch_size: of validation.
            budget: of growth.
            overrides: dotted settings for this session, such as `tamiyo.policy=none`, over those of `wrap`; what your
                loop decides is refused, and so is what `wrap` has settled.
            hub: where kernels come from, with `public_key`, the signer's raw 32 bytes.
            public_key: see `hub`.
            bus: where telemetry goes; None is nowhere.
            controller: who decides; None is the configured policy in this process.
            experience: makes the log of its decisions from the configuration and the run's id, such as
                `esper.simic.experience.log_to(storage)`; None keeps none.

        Raises:
            ConfigError: if a setting is wrong, a scheduled graft cannot be made, the scheduler cannot grow, or a hub
                comes without its key.
        """
        _require_one_process()
        chosen = resolve_task(task)
        settings = {
            "task": chosen.name if isinstance(task, str) else "custom",
            "tolaria.epochs": epochs,
            "tolaria.batch_size": batch_size,
            "budget": None if budget is None else budget.model_dump(),
        }
        config = resolve(self._config, settings, _checked(overrides))
        if config.tamiyo.trials.enabled:
            raise ConfigError(
                "a fork cannot run a loop of your own", field="tamiyo.trials.enabled", remedy="train by esper.grow"
            )
        if config.tamiyo.ask_before_graft and controller is None:
            raise ConfigError(
                "nobody finds a loop of your own to answer it",
                field="tamiyo.ask_before_graft",
                remedy="hand a controller to session(), or train by esper.grow",
            )
        self._require_unwrapped(config)
        require_schedule(config, self.sites, _lookup(hub))
        if hub is None:
            hub, public_key = local_hub(self.host.sites.values(), config)
        elif public_key is None:
            raise ConfigError("a hub comes with its signer's key", field="public_key")
        self.host.configure(config.kasmina)
        self.host.attach(hub, public_key, wait=config.deterministic, native=not config.deterministic)
        run_id = new_run_id(config)
        log = NoExperience() if experience is None else experience(config, run_id)
        ports = Ports(hub=hub, bus=bus, controller=controller or local_controller(config), experience=log)
        first = next(self.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        try:
            with Session(
                self.host,
                Optimization(optimizer, scheduler, scaler),
                chosen,
                example=to_device(self._example, device),
                config=config,
                run_id=run_id,
                ports=ports,
                val=evaluation_batches(val_data, batch_size=config.tolaria.batch_size),
                steps_per_epoch=steps_per_epoch,
                device=device,
            ) as session:
                yield session
        finally:
            self.host.close()

    def _require_unwrapped(self, config: RunConfig) -> None:
        """Refuses settings of a session that were settled when the model was wrapped."""
        for name in _OF_THE_WRAPPING:
            if getattr(config.kasmina, name) != getattr(self._config.kasmina, name):
                raise ConfigError(
                    "it was settled when the model was wrapped", field=f"kasmina.{name}", remedy="hand it to wrap()"
                )


def export(grown: Grown | Run, *, fold: bool = False) -> nn.Module:
    """The grown model as a plain `nn.Module`: see `Grown.export` and `Run.export`."""
    return grown.export(fold=fold)


def local_controller(config: RunConfig) -> LocalController:
    """The configured policy in this process; a learned one is the storage's, as it is named or promoted now."""
    if config.tamiyo.policy != KIND:
        return LocalController(config.tamiyo, seed=config.seed)
    store = StoredPolicies(Storage.at(config.storage, config.storage_options))
    return LocalController(pin(config.tamiyo, store), seed=config.seed, policies=store.get)


_OF_THE_LOOP = {
    "tolaria.optimizer": "hand your optimizer to session()",
    "tolaria.scheduler": "hand your scheduler to session()",
    "tolaria.freeze_host": "hold the host's parameters yourself",
    "tolaria.clip_norm": "clip in your loop",
    "tolaria.accumulate": "sum gradients in your loop",
    "tolaria.patience": "end your loop",
    "tolaria.best_metric": "keep the state you like best: session().state_dict()",
    "tolaria.checkpoint_every": "write session().state_dict() when you like",
    "tolaria.keep_checkpoints": "keep what you write",
    "tolaria.num_workers": "train by esper.grow",
    "tolaria.find_unused_parameters": "train by esper.grow",
    "tolaria.cpus_per_worker": "start your loop with as many",
    "tolaria.use_gpu": "move the model",
    "tolaria.num_threads": "call torch.set_num_threads",
    "tolaria.max_failures": "start your loop again",
    "tamiyo.control": "hand your controller to session()",
    "kasmina.public_key": "hand it to session() with its hub",
    "data": "hand your data to session()",
    "host": "hand your model to wrap()",
    "oona": "hand your bus to session()",
    "urza": "hand your hub to session()",
    "nissa": "hand your bus to session()",
}
"""What only the trainer and the platform read, and what to do about it in a loop of one's own."""

_OF_THE_WRAPPING = ("sites", "chunks", "race")
"""Settings of `kasmina` that say what stands in the model."""


def _checked(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides; raises `ConfigError` for one that would change nothing in a loop of one's own."""
    kept = tuple(overrides)
    refuse(kept, _OF_THE_LOOP, words="it is not read in a loop of your own")
    return kept


def _require_one_process() -> None:
    """Refuses a loop of one's own among several: each would decide for itself, and no wrapper know the kernels."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ConfigError(
            f"this is one of {distributed.get_world_size()} processes, and each would grow in its own way",
            field="tolaria.num_workers",
            remedy="train by esper.grow(..., num_workers=N), where all of them grow at the same step",
        )


def _lookup(hub: AssetHub | None) -> Lookup:
    """The designs that a hub knows beside the library's; none without one."""
    return (lambda _: None) if hub is None else named.in_hub(hub)
