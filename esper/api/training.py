"""Training a workload, or a fork of its run, in this process: here the systems' parts become a trainer's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from esper.api.hosting import device_of, wrap_workload
from esper.api.kernels import request_kernels, require_built
from esper.api.runtime import WorkloadFactory
from esper.config import RunConfig
from esper.kasmina.breaker import Breaker, guarded
from esper.leyline.experience import ExperienceLog, NoExperience
from esper.leyline.ports import AssetHub, Bus, Controller, FaultPlan, NoFaults, Trials
from esper.leyline.signals import EpochRecord
from esper.leyline.summary import RunSummary
from esper.leyline.trials import Fork, ForkResult
from esper.tamiyo.controller import fallback_controller
from esper.tolaria.course import Ports, never
from esper.tolaria.forks import Forked
from esper.tolaria.loop import Trainer
from esper.tolaria.numerics import numerics
from esper.tolaria.ranks import Ranks, SoloRanks
from esper.tolaria.workload import Workload


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
    """Trains a workload in this process. Its model is wrapped and trained in place.

    Rank 0 writes `summary.json`, `history.json`, `checkpoints/` and, in deterministic mode, `commands.jsonl` below
    `directory`. Errors are raised after the summary says FAILED.

    Args:
        workload: the problem.
        config: of the run.
        directory: address of `<storage>/runs/<run_id>`, any fsspec address.
        run_id: of the run.
        hub: where kernels come from; None grows nothing.
        bus: where telemetry goes; None is nowhere.
        controller: who decides; None is nobody.
        public_key: Ed25519, raw 32 bytes: whose kernels may be grafted.
        ranks: None is alone; else `TorchRanks` (`esper.tolaria.ranks`).
        stop: asked at every step; a reason ends the run cleanly.
        faults: a script of faults, for tests.
        resume: go on from the last whole checkpoint in `directory`, if there is one.
        on_epoch: called after each epoch, on every rank.
        device: None follows `tolaria.use_gpu`.
        experience: the log of decisions; None keeps none.
        trials: where forks of the run may train; each runs `fork_local`.

    Raises:
        UserError: if a setting, the data or the storage cannot be used; also if a deterministic run would wait for ever
            for kernels that its hub in memory does not have.
        NonFiniteError: if the host diverges again and again.
    """
    ranks = ranks or SoloRanks()
    device = device or device_of(config)
    threads = config.tolaria.num_threads
    # ranks draw different dropout masks; what must be equal on all comes from rank 0
    with numerics(seed=config.seed + 7919 * ranks.rank, deterministic=config.deterministic, num_threads=threads):
        host = wrap_workload(workload, config, device)
        if config.deterministic and hub is not None:
            require_built(hub, host.sites.values(), config, run_id)
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
        host = wrap_workload(workload, config, torch.device("cpu"))
        host.attach(hub, public_key, wait=True, native=False)
        try:
            return Forked(host, workload, config, packed=packed, fork=fork, faults=faults).run()
        finally:
            host.close()
