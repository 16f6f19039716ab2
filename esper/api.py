"""The library's public face, and its composition root: here, and only here, the systems of `esper` are put together.

For people: `grow`, `wrap`, `export`, `Task`, `Run`, `Grown`. For the runtime (`actors/`) and for tests and benchmarks
without one: `train_local`, the one function that trains a workload in this process:

    train_local(
        workload: Workload,                      # esper.tolaria.workload
        config: RunConfig,
        *,
        directory: str,                          # address of <storage>/runs/<run_id>, any fsspec address
        run_id: str,
        hub: AssetHub | None,
        bus: Bus | None,
        controller: Controller | None,
        public_key: bytes | None,                # Ed25519, raw 32 bytes: whose kernels may be grafted
        ranks: Ranks | None = None,              # None is alone; else TorchRanks (esper.tolaria.ranks)
        stop: Callable[[], str | None] = never,  # asked at every step; a reason ends the run cleanly
        faults: FaultPlan | None = None,
        resume: bool = False,                    # go on from the last whole checkpoint in `directory`, if there is one
        on_epoch: Callable[[EpochRecord], None] | None = None,   # after each epoch, on every rank (ray.train.report)
        device: torch.device | None = None,      # None follows tolaria.use_gpu
        trials: Trials | None = None,            # where forks of the run may train; each runs `fork_local`
    ) -> RunSummary

It writes `summary.json`, `history.json`, `checkpoints/` and, in deterministic mode, `commands.jsonl` below
`directory` (rank 0 alone), and returns the summary. Errors are raised after the summary says FAILED.

The runtime is found through the entry point group `esper.runtime`, name `ray`; the object is a function

    run(workload_factory: Callable[[], Workload], config: RunConfig) -> RunResult

which brings up whatever it needs, calls `train_local` in its trainers and returns where the run lies.
"""

from __future__ import annotations

import copy
import difflib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from esper import kasmina
from esper.config import Budget, RunConfig, parse_config
from esper.kasmina.breaker import Breaker, guarded
from esper.kasmina.sites import find_sites
from esper.leyline.chains import Tail
from esper.leyline.errors import ConfigError, NotFoundError, SiteError
from esper.leyline.experience import ExperienceLog, NoExperience
from esper.leyline.growth import SeedView
from esper.leyline.kernels import SiteSignature
from esper.leyline.ops import fits
from esper.leyline.ports import AssetHub, Bus, Controller, FaultPlan, NoFaults, Trials
from esper.leyline.signals import EpochRecord
from esper.leyline.summary import HISTORY_FILE, REPORT_FILE, RunHistory, RunSummary
from esper.leyline.trials import Fork, ForkResult
from esper.storage import Storage
from esper.tamiyo.controller import LocalController, fallback_controller
from esper.tamiyo.gnn import KIND, pin
from esper.tolaria.checkpoint import Checkpoints, Restored
from esper.tolaria.contents import refill, require_portable
from esper.tolaria.course import Ports, never
from esper.tolaria.forks import Forked
from esper.tolaria.loop import Trainer
from esper.tolaria.numerics import numerics
from esper.tolaria.optim import Optimization, OptimizerFactory, SchedulerFactory
from esper.tolaria.ranks import Ranks, SoloRanks
from esper.tolaria.schedules import optimizer_factory, scheduler_factory
from esper.tolaria.session import Session
from esper.tolaria.task import Task, resolve_task
from esper.tolaria.weights import Trained
from esper.tolaria.workload import Data, Workload, evaluation_batches, example_of, to_device
from esper.urza.policies import StoredPolicies

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from torch.amp.grad_scaler import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from esper.urza.named import Lookup, NamedDesign

RUNTIME_GROUP, RUNTIME = "esper.runtime", "ray"


@dataclass(frozen=True)
class RunResult:
    """What a runtime returns: where the run lies, and what it came to."""

    run_id: str
    directory: str
    summary: RunSummary


WorkloadFactory = Callable[[], Workload]
Runtime = Callable[[WorkloadFactory, RunConfig], RunResult]

# ---------------------------------------------------------------- grow


def grow(
    model: nn.Module,
    train_data: Data,
    val_data: Data,
    *,
    task: Task | str = "classification",
    optimizer: OptimizerFactory | None = None,
    epochs: int | None = None,
    sites: str | Sequence[str] | None = None,
    budget: Budget | None = None,
    test_data: Data | None = None,
    scheduler: SchedulerFactory | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    example: tuple[Any, ...] | None = None,
    config: RunConfig | None = None,
    overrides: Iterable[str] = (),
    tails: Mapping[str, Tail] | None = None,
) -> Run:
    """Trains a model that may grow, on Ray, and returns the finished run. Your `model` itself is not changed.

    A model that is trained already is upgraded: it computes what it did until its first step, its validation before
    that stands in the summary (`start`), and it grows within `budget`.

    Args:
        model: any `nn.Module`.
        train_data: (inputs, targets) tensors, a `Dataset`, or a factory `(rank, world, epoch) -> DataLoader`. Several
            inputs are given as a tuple, in the order of `forward`.
        val_data: likewise; evidence is taken on it.
        test_data: likewise; looked at once, after the last epoch.
        task: `classification`, `regression`, `language_model`, or an `esper.Task`.
        optimizer: from a list of parameters; None is AdamW as the configuration has it.
        epochs: `tolaria.epochs`; like the next ones it wins over `config`.
        sites: `kasmina.sites`.
        budget: `budget`.
        batch_size: `tolaria.batch_size`.
        num_workers: `tolaria.num_workers`.
        scheduler: from (optimizer, total steps), stepped each step; None is what the configuration has.
        example: positional inputs of the model for a few samples; None takes them from `train_data`.
        config: everything else; None is the defaults.
        overrides: dotted settings that win over all, such as `tolaria.patience=5`.
        tails: by site, what the model computes from there on, `tail(model, h, *inputs)`: kernels train behind the host
            without a replay of what comes before (see `esper.kasmina.tails`).

    Raises:
        ConfigError: if a setting is wrong, or no runtime is installed.
        DataError: if the data are of no known kind.
        SiteError: if a site does not exist or cannot carry a seed.
    """
    chosen, start = resolve_task(task), config or RunConfig()
    resolved = _resolve(
        start,
        {
            "task": chosen.name if isinstance(task, str) else "custom",
            "data": {"type": "given"},
            "host": {**start.host.model_dump(include={"weights", "weights_options"}), "type": "given"},
            "budget": None if budget is None else budget.model_dump(),
            "tolaria.epochs": epochs,
            "tolaria.batch_size": batch_size,
            "tolaria.num_workers": num_workers,
            "kasmina.sites": sites
            if sites is None or sites == "auto"
            else [sites]
            if isinstance(sites, str)
            else sites,
        },
        overrides,
    )
    workload = Workload(
        model=model,
        example=example or example_of(train_data),
        train=train_data,
        val=val_data,
        test=test_data,
        task=chosen,
        optimizer=optimizer or optimizer_factory(resolved.tolaria.optimizer),
        scheduler=scheduler or scheduler_factory(resolved.tolaria.scheduler),
        trained=Trained.of(resolved.host) or Trained(),  # nobody can tell from a model whether it is: so it is measured
        tails=dict(tails or {}),
    )

    def fresh() -> Workload:
        return Workload(**{**vars(workload), "model": copy.deepcopy(workload.model)})

    check_workload(workload, resolved)
    return Run(find_runtime()(fresh, resolved), fresh, resolved)


def find_runtime() -> Runtime:
    """The function that brings up the systems and trains; see the module.

    Raises:
        ConfigError: if none is installed, or it does not load.
    """
    found = next(iter(entry_points(group=RUNTIME_GROUP, name=RUNTIME)), None)
    if found is None:
        raise ConfigError(
            "no runtime is installed", field=RUNTIME_GROUP, remedy="install the distribution: pip install -e ."
        )
    try:
        return found.load()
    except ImportError as error:
        raise ConfigError(f"the runtime {found.value} does not load: {error}", field=RUNTIME_GROUP) from error


@dataclass(frozen=True)
class Run:
    """A run that ended.

    Attributes:
        result: where it lies, and what it came to.
        workload_factory: makes the workload anew, with the host as it was at the start.
        config: as resolved.
    """

    result: RunResult
    workload_factory: WorkloadFactory
    config: RunConfig

    @property
    def summary(self) -> RunSummary:
        return self.result.summary

    @property
    def directory(self) -> str:
        return self.result.directory

    def table(self) -> str:
        """What happened to each seed, as text."""
        from esper import nissa

        return nissa.table(self.summary)

    def report(self) -> Path:
        """Writes `report.html` beside the summary (in the working folder, if that is not on this machine)."""
        from esper import nissa

        folder = Storage.at(self.directory, self.config.storage_options)
        history = RunHistory.model_validate_json(folder.read(HISTORY_FILE))
        target = (folder.local or Path.cwd() / self.summary.run_id) / REPORT_FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        return nissa.write_report(self.summary, history, target)

    def export(self, *, best: bool = False, fold: bool = False) -> nn.Module:
        """The grown model as a plain `nn.Module` on the CPU, without a trace of Esper.

        Args:
            best: as it was at the best epoch instead of the last.
            fold: puts fossils into the linear layers whose outputs they grow, where both are linear (to rounding).

        Raises:
            NotFoundError: if the run left no checkpoint.
        """
        host = checkpoint_host(self.workload_factory(), self.config, directory=self.directory, best=best)
        return _exported(host, fold=fold)


# ---------------------------------------------------------------- wrap


def wrap(
    model: nn.Module,
    *,
    example: tuple[Any, ...],
    sites: str | Sequence[str] = "auto",
    causal: bool = False,
    config: RunConfig | None = None,
    overrides: Iterable[str] = (),
    tails: Mapping[str, Tail] | None = None,
) -> Grown:
    """Makes a model able to grow in one's own loop. The model stays what it is; go on calling it.

    Args:
        model: any `nn.Module`; it gets one child, `_esper`.
        example: positional inputs of the model for a few samples.
        sites: `auto`, a module path or glob, or several.
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
    resolved = _resolve(config or RunConfig(), settings, _checked(overrides))
    require_portable(model)
    host = kasmina.wrap(model, example=example, sites=sites, causal=causal, config=resolved.kasmina, tails=tails)
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
        return _exported(self.host, fold=fold)

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
            overrides: dotted settings, such as `tamiyo.policy=none`; what your loop decides is refused.
            hub: where kernels come from, with `public_key`, the signer's raw 32 bytes.
            public_key: see `hub`.
            bus: where telemetry goes; None is nowhere.
            controller: who decides; None is the configured policy in this process.
            experience: makes the log of its decisions from the configuration and the run's id, such as
                `esper.simic.experience.log_to(storage)`; None keeps none.

        Raises:
            ConfigError: if a setting is wrong, the scheduler cannot grow, or a hub comes without its key.
        """
        chosen = resolve_task(task)
        settings = {
            "task": chosen.name if isinstance(task, str) else "custom",
            "tolaria.epochs": epochs,
            "tolaria.batch_size": batch_size,
            "budget": None if budget is None else budget.model_dump(),
        }
        config = _resolve(self._config, settings, _checked(overrides))
        if config.tamiyo.trials.enabled:
            raise ConfigError(
                "a fork cannot run a loop of your own", field="tamiyo.trials.enabled", remedy="train by esper.grow"
            )
        if hub is None:
            hub, public_key = local_hub(self.host.sites.values(), config)
        elif public_key is None:
            raise ConfigError("a hub comes with its signer's key", field="public_key")
        self.host.attach(hub, public_key, wait=config.deterministic, native=not config.deterministic)
        run_id = new_run_id(config)
        log = NoExperience() if experience is None else experience(config, run_id)
        ports = Ports(hub=hub, bus=bus, controller=controller or _controller(config), experience=log)
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


def export(grown: Grown | Run, *, fold: bool = False) -> nn.Module:
    """The grown model as a plain `nn.Module`: see `Grown.export` and `Run.export`."""
    return grown.export(fold=fold)


def _exported(host: kasmina.Host, *, fold: bool) -> nn.Module:
    return kasmina.export_folded(host)[0] if fold else kasmina.export(host)


# ---------------------------------------------------------------- in this process


def _controller(config: RunConfig) -> LocalController:
    """The configured policy in this process; a learned one is the storage's, as it is named or promoted now."""
    if config.tamiyo.policy != KIND:
        return LocalController(config.tamiyo, seed=config.seed)
    store = StoredPolicies(Storage.at(config.storage, config.storage_options))
    return LocalController(pin(config.tamiyo, store), seed=config.seed, policies=store.get)


def train_local(
    workload: Workload,
    config: RunConfig,
    *,
    directory: str,
    run_id: str,
    hub: AssetHub | None,
    bus: Bus | None,
    controller: Controller | None,
    public_key: bytes | None,
    ranks: Ranks | None = None,
    stop: Callable[[], str | None] = never,
    faults: FaultPlan | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    device: torch.device | None = None,
    experience: ExperienceLog | None = None,
    trials: Trials | None = None,
) -> RunSummary:
    """Trains a workload in this process; see the module. The workload's model is wrapped and trained in place.

    Raises:
        UserError: if a setting, the data or the storage cannot be used.
        NonFiniteError: if the host diverges again and again.
    """
    ranks = ranks or SoloRanks()
    device = device or _device(config)
    threads = config.tolaria.num_threads
    # ranks draw different dropout masks; what must be equal on all comes from rank 0
    with numerics(seed=config.seed + 7919 * ranks.rank, deterministic=config.deterministic, num_threads=threads):
        host = _wrap_workload(workload, config, device)
        breaker = Breaker("Urza", failures=config.kasmina.breaker_failures, rest_s=config.kasmina.breaker_s)
        hub = None if hub is None else guarded(hub, breaker)
        tamiyo_breaker = Breaker("Tamiyo", failures=config.tamiyo.breaker_failures, rest_s=config.tamiyo.breaker_s)
        may_do_without = controller is not None and not config.deterministic
        if hub is not None and public_key is not None:
            host.attach(hub, public_key, wait=config.deterministic, native=not config.deterministic)
        ports = Ports(
            hub=hub,
            bus=bus,
            controller=guarded(controller, tamiyo_breaker) if may_do_without else controller,
            fallback=fallback_controller(config.tamiyo, seed=config.seed) if may_do_without else None,
            request_kernels=None if hub is None else partial(request_kernels, hub, host.sites.values(), config, run_id),
            circuit=breaker.circuit,
            tamiyo_circuit=tamiyo_breaker.circuit,
            ranks=ranks,
            stop=stop,
            trials=trials,
            faults=faults or NoFaults(),
            experience=experience or NoExperience(),
        )
        try:
            trainer = Trainer(
                host,
                workload,
                config,
                directory=directory,
                run_id=run_id,
                ports=ports,
                resume=resume,
                on_epoch=on_epoch,
            )
            return trainer.run()
        finally:
            host.close()


def fork_local(
    workload_factory: WorkloadFactory,
    config: RunConfig,
    packed: bytes,
    fork: Fork,
    *,
    hub: AssetHub,
    public_key: bytes,
    faults: FaultPlan | None = None,
) -> ForkResult:
    """Runs one fork of a run in this process (docs/adr/0013). What goes wrong with the fork is told in its result.

    Args:
        workload_factory: makes the run's workload anew.
        config: of the run.
        packed: the run's state between two steps.
        fork: what to do.
        hub: where the candidate's kernel comes from.
        public_key: whose signature it must bear.
        faults: a script of faults, for tests.

    Raises:
        EsperError: if it cannot begin: the workload is not the run's, or `packed` is not whole.
    """
    with numerics(seed=config.seed, deterministic=False, num_threads=config.tolaria.num_threads):
        workload = workload_factory()
        host = _wrap_workload(workload, config, torch.device("cpu"))
        host.attach(hub, public_key, wait=True, native=False)
        try:
            return Forked(host, workload, config, packed=packed, fork=fork, faults=faults).run()
        finally:
            host.close()


def check_workload(workload: Workload, config: RunConfig) -> None:
    """Refuses at once what a run would only find out when systems are up and files are written. Changes nothing.

    Raises:
        ConfigError: if a named blueprint is neither in the library nor in the storage's catalogue, or fits no site, a
            scheduled graft cannot be made, the weights to start from are not the host's, its extra state cannot be
            saved, or the trainer of this process has no GPU.
        SiteError: if a site does not exist or cannot carry a seed.
    """
    from esper.urza import named

    names, schedule = config.tezzeret.blueprints, config.tamiyo.schedule
    submitted = named.in_storage(Storage.at(config.storage, config.storage_options))
    if config.tolaria.num_workers == 0:
        _device(config)
    trial = replace(workload, model=copy.deepcopy(workload.model))
    if workload.trained is not None:
        workload.trained.load_into(trial.model)
    try:
        sites = _wrap_workload(trial, config, torch.device("cpu")).sites
    except SiteError as error:  # its field is an argument's name; people write the setting
        field = "kasmina.sites" if error.field == "sites" else error.field
        raise SiteError(error.message, field=field, remedy=error.remedy) from error
    for name in () if names == "library" else names:
        _fitting(name, submitted, sites.values(), field="tezzeret.blueprints")
    for index, graft in enumerate(schedule if config.tamiyo.policy == "schedule" else ()):
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
    design = _named(name, submitted, field=field)
    reasons = [fits(design.ir, signature) for signature in sites]
    if None not in reasons:
        why = reasons[0] or "there is no site"
        raise ConfigError(
            f"{name}: {why}", field=field, remedy="esper train CONFIG --dry-run lists what fits at which site"
        )


def _named(name: str, submitted: Lookup, *, field: str) -> NamedDesign:
    from esper.urza import named
    from esper.urza.library import load_library

    design = named.find(name, submitted)
    if design is None:
        close = difflib.get_close_matches(name, load_library(), n=1)
        remedy = f"did you mean {close[0]}?" if close else "see esper blueprints ls, and ls --library"
        raise ConfigError(f"no blueprint {name!r}, shipped or submitted", field=field, remedy=remedy)
    return design


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
    host = _wrap_workload(workload, config, torch.device("cpu"))
    host.load_growth_state(found.state["session"]["growth"])
    refill(host.module, found.state["session"])
    return host


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
    designs = [_named(name, submitted, field="tezzeret.blueprints") for name in names]
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


def new_run_id(config: RunConfig) -> str:
    """A name for a run: sorts by time, and does not repeat."""
    return f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def _wrap_workload(workload: Workload, config: RunConfig, device: torch.device) -> kasmina.Host:
    require_portable(workload.model)
    return kasmina.wrap(
        workload.model.to(device),
        example=to_device(workload.example, device),
        sites=config.kasmina.sites,
        causal=workload.task.name == "language_model",
        config=config.kasmina,
        tails=workload.tails,
    )


def _device(config: RunConfig) -> torch.device:
    if not config.tolaria.use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here", field="tolaria.use_gpu", remedy="set it to false")
    return torch.device("cuda", torch.cuda.current_device())


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
    "tolaria.num_workers": "start your loop on as many ranks",
    "tolaria.cpus_per_worker": "start your loop with as many",
    "tolaria.use_gpu": "move the model",
    "tolaria.max_failures": "start your loop again",
}
"""What only the trainer reads, and what to do about it in a loop of one's own."""


def _checked(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides; raises `ConfigError` for one that would change nothing in a loop of one's own."""
    kept = tuple(overrides)
    for override in kept:
        name = override.partition("=")[0].strip()
        for setting, remedy in _OF_THE_LOOP.items():
            if name == setting or name.startswith(f"{setting}."):
                raise ConfigError("it is the trainer's, and this loop is your own", field=name, remedy=remedy)
    return kept


def _resolve(config: RunConfig, settings: Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    """The configuration with dotted settings over it; None leaves what is there."""
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        if value is None:
            continue
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return parse_config(tree, overrides)
