"""Tolaria on Ray Train: the same trainer in this process (`num_workers: 0`) or in 1..N workers.

A worker that dies is replaced by Ray Train together with its group; the new group goes on from the last whole
checkpoint in the run's folder, as a resumed run does. What training is lies in `esper.api.train_local`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from actors.cluster import NAMESPACE
from actors.logs import log_as
from actors.platform import Platform
from actors.room import needs
from actors.tamiyo import ServeController
from actors.trials import Origin, RayTrials
from esper.config import RunConfig
from esper.leyline import (
    Bus,
    Controller,
    EpochRecord,
    FaultPlan,
    NoFaults,
    RunSummary,
    SafetyError,
    UnavailableError,
    UserError,
)
from esper.leyline.experience import ExperienceLog, NoExperience
from esper.tamiyo import initial_state
from esper.tolaria.listening import ListeningController

if TYPE_CHECKING:
    from esper.api import WorkloadFactory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that a trainer needs; pickles.

    Attributes:
        run_id: of the run.
        directory: address of the run's folder.
        workload: makes the problem, in each trainer.
        config: resolved, with the public key pinned.
        platform: handles of the systems.
        resume: whether to go on from a checkpoint that is there.
        faults: for tests.
    """

    run_id: str
    directory: str
    workload: WorkloadFactory
    config: RunConfig
    platform: Platform
    resume: bool = False
    faults: FaultPlan = field(default_factory=NoFaults)


Ending = RunSummary | UserError | SafetyError
"""How a trainer ended. An error that trying again would only repeat is returned, so that Ray Train does not retry."""


class StopFlag:
    """Carries the wish to stop from the driver to workers on other machines: they wait for it, nobody polls."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._told = asyncio.Event()

    def __repr__(self) -> str:
        return f"StopFlag({self._reason or 'not set'})"

    async def stop(self, reason: str) -> None:
        """Tells every trainer to end cleanly at its next step."""
        self._reason = reason
        self._told.set()

    async def wait(self) -> str | None:
        """Returns the reason once there is one."""
        await self._told.wait()
        return self._reason


def fit(job: Job, stop: Callable[[], str | None]) -> RunSummary:
    """Trains to the end and returns the summary.

    Args:
        job: what to train.
        stop: asked at every step; a reason ends the run cleanly. Other processes hear of it through `relay`.

    Raises:
        UserError: if a setting, the data or the storage cannot be used.
        SafetyError: if going on would harm.
        UnavailableError: if workers died more often than `tolaria.max_failures`.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    tolaria = job.config.tolaria
    with _relay(job, stop) if tolaria.num_workers else contextlib.nullcontext() as flag:
        trainer = TorchTrainer(
            partial(_train, job, flag) if tolaria.num_workers else partial(_train_here, job, stop),
            scaling_config=ScalingConfig(
                num_workers=tolaria.num_workers,
                use_gpu=tolaria.use_gpu,
                resources_per_worker=needs(tolaria) if tolaria.num_workers else None,
            ),
            run_config=RunConfig(
                name=job.run_id,
                storage_path=_train_folder(job),
                storage_filesystem=_train_filesystem(job),
                failure_config=FailureConfig(max_failures=tolaria.max_failures),
            ),
            torch_config=TorchConfig(backend="nccl" if tolaria.use_gpu else "gloo"),
        )
        try:
            ending = cast("Ending", trainer.fit().return_value)
        except TrainingFailedError as error:
            reason = " ".join(str(error).split())[-400:]
            raise UnavailableError(
                f"the workers of run {job.run_id} failed more often than {tolaria.max_failures} times: {reason}",
                remedy=f"what was trained is kept: esper train --resume {job.run_id}",
            ) from error
    if isinstance(ending, RunSummary):
        return ending
    raise ending


def _train_here(job: Job, stop: Callable[[], str | None]) -> Ending:
    """The train function of one trainer; Ray Train runs it here for `num_workers: 0`."""
    import ray.train
    import torch

    from esper.api import train_local
    from esper.tolaria.ranks import TorchRanks

    def report(record: EpochRecord) -> None:
        ray.train.report(record.model_dump(mode="json", exclude_none=True))

    device = None
    if job.config.tolaria.use_gpu and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    many = torch.distributed.is_available() and torch.distributed.is_initialized()
    bus = job.platform.bus.bus()
    controller = _controller(job, bus)
    public_key = bytes.fromhex(job.config.kasmina.public_key or job.platform.public_key)
    trials = None
    if job.config.tamiyo.trials.enabled and (not many or torch.distributed.get_rank() == 0):
        origin = Origin(job.workload, job.config, job.platform.hub, public_key)
        # in the driver's own process a trainer takes cores that Ray does not know of
        reserved = 0.0 if job.config.tolaria.num_workers else float(job.config.tolaria.num_threads)
        trials = RayTrials(origin, reserved=reserved)
    try:
        return train_local(
            job.workload(),
            job.config,
            directory=job.directory,
            run_id=job.run_id,
            hub=job.platform.hub,
            bus=bus,
            controller=controller,
            public_key=public_key,
            ranks=TorchRanks(device, find_unused=job.config.tolaria.find_unused_parameters) if many else None,
            stop=stop,
            faults=job.faults,
            resume=job.resume,
            on_epoch=report,
            device=device,
            experience=_experience(job),
            trials=trials,
        )
    except (UserError, SafetyError) as error:
        return error
    finally:
        if isinstance(controller, ListeningController):
            controller.close()
        if trials is not None:
            trials.cancel("the run has ended")  # one that failed did not say so
        bus.close()


def _controller(job: Job, bus: Bus) -> Controller:
    """How the run hears from Tamiyo."""
    config = job.config.tamiyo
    if config.control == "listen":
        return ListeningController(bus, config, initial_state=partial(initial_state, config, job.config.seed))
    return ServeController(config, seed=job.config.seed, storage=job.platform.storage)


def _experience(job: Job) -> ExperienceLog:
    """What the run's decisions are logged to; rank 0 alone uses it."""
    if not job.config.simic.experience:
        return NoExperience()
    from esper.simic.experience import ExperienceWriter, about_run

    return ExperienceWriter(job.platform.storage, about_run(job.config, job.run_id), job.config.simic)


def _train(job: Job, flag: Any) -> Ending:
    """The train function of one worker process. A group that replaces a dead one resumes; a first one finds nothing
    to resume from.
    """
    import ray.train

    told: list[str] = []
    log_as(f"tolaria-{ray.train.get_context().get_world_rank()}", run=job.run_id)

    def listen() -> None:
        from ray.exceptions import RayActorError

        try:
            told.append(ray.get(flag.wait.remote()))
        except RayActorError:
            told.append("the driver is gone")

    threading.Thread(target=listen, name="stop-listener", daemon=True).start()
    return _train_here(replace(job, resume=True), lambda: told[0] if told else None)


@contextlib.contextmanager
def _relay(job: Job, stop: Callable[[], str | None], *, every_s: float = 0.2) -> Iterator[Any]:
    """A `StopFlag` that is told when `stop` gives a reason."""
    import ray

    actor = ray.remote(StopFlag).options(
        name=f"stop-{job.run_id}", namespace=NAMESPACE, num_cpus=0, max_concurrency=1000
    )
    flag: Any = actor.remote()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_s):
            if (reason := stop()) is not None:
                flag.stop.remote(reason)
                return

    watcher = threading.Thread(target=watch, name="stop-relay", daemon=True)
    watcher.start()
    try:
        yield flag
    finally:
        over.set()
        watcher.join()
        ray.kill(flag)


def _train_folder(job: Job) -> str:
    """Where Ray Train keeps its own records: below the run's folder."""
    return job.platform.storage.path("runs", job.run_id, "ray_train")


def _train_filesystem(job: Job) -> Any:
    if job.platform.storage.is_local:
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(job.platform.storage.fs))
