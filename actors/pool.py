"""The compile pool as an actor: looks at what is to be compiled and has as many workers as that is worth.

How many is decided in `esper.tezzeret.scaling`. A worker that Ray restarts keeps its name; one that the pool has
stopped is gone. The workers outlive this actor, and it finds them again by their names.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from actors import tezzeret, urza
from actors.cluster import NAMESPACE
from actors.logs import log_as
from esper.config import TezzeretConfig
from esper.leyline import AssetHub, Bus, EsperError
from esper.tezzeret.scaling import Bounds, Demand, resize

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

EVERY_S = 2.0
"""From one look at the queue to the next."""
ANSWER_S = 5.0
"""A worker that does not say within so long whether it is idle counts as busy."""
STOP_S = 20.0
"""A worker that has not ended by then is killed; the hub gives its job to another."""
LEAVES_S = 2 * STOP_S + 5.0
"""The longest that `CompilePool.stop` takes: for its thread, then for its workers."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that a worker is started with. Pickles.

    Attributes:
        prefix: of the workers' names.
        address, options: of the storage.
        config: of the pool.
        make_bus: connects to Oona.
        private_key: gives the signer's key.
    """

    prefix: str
    address: str
    options: Mapping[str, Any]
    config: TezzeretConfig
    make_bus: Callable[[], Bus]
    private_key: Callable[[], Ed25519PrivateKey]
    builder: Callable[..., Any] = field(default=tezzeret.make_builder)

    def hub(self) -> AssetHub:
        """Urza."""
        return urza.connect(self.address, dict(self.options))

    def bounds(self, device: str) -> Bounds:
        """Of the workers for a device; those with a GPU only come when there is work for one."""
        least = self.config.min_workers if device == "cpu" else 0
        return Bounds(least, self.config.max_workers, self.config.idle_s)

    def start(self, device: str, name: str) -> Any:
        """Starts a worker, or finds the one of this name; returns its handle."""
        config = self.config
        return (
            ray.remote(tezzeret.CompileWorker)
            .options(
                name=name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",  # else it would end with the pool, in the middle of its work
                num_cpus=config.cpus_per_worker,
                num_gpus=0 if device == "cpu" else config.gpus_per_worker,
                max_restarts=-1,
                max_concurrency=4,
            )
            .remote(
                name,
                hub=partial(urza.connect, self.address, dict(self.options)),
                bus=self.make_bus,
                private_key=self.private_key,
                builder=partial(self.builder, config, device),
                device=device,
                lease_s=config.lease_s,
            )
        )


class CompilePool:
    """Keeps the pool at its size in a thread of its own, from construction to `stop`.

    Args:
        plan: what workers are started with.
        every_s: see `EVERY_S`.
    """

    def __init__(self, plan: Plan, *, every_s: float = EVERY_S) -> None:
        log_as("compile-pool")
        self._plan = plan
        self._every_s = every_s
        self._sizes: dict[str, int] = {}
        self._problem = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compile-pool", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{number} {device}" for device, number in self._sizes.items())
        return f"CompilePool({sizes or 'starting'}{f', {self._problem}' if self._problem else ''})"

    def ready(self) -> int:
        """Returns the process id."""
        return os.getpid()

    def workers(self) -> list[str]:
        """The names of the workers that are there."""
        return self._names()

    def stop(self) -> bool:
        """Stops every worker and then itself; returns whether all ended in time. Nothing is compiled any more."""
        self._stopped.set()
        self._thread.join(STOP_S)
        _end({name: handle for name in self._names() if (handle := _find(name)) is not None})
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        hub: AssetHub | None = None
        while not self._stopped.is_set():
            try:
                hub = hub or self._plan.hub()
                self._fit(hub)
                self._problem = ""
            except (EsperError, RayError, ValueError) as error:  # the next round tries again
                hub = None
                self._problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                _LOG.warning("pool.unfitted", extra={"reason": self._problem})
            self._stopped.wait(self._every_s)

    def _fit(self, hub: AssetHub) -> None:
        """One look at the queue, and what follows from it."""
        backlog = hub.backlog()
        devices = ["cpu", *(["cuda"] if _num_gpus() >= self._plan.config.gpus_per_worker else [])]
        for device in devices:
            workers = {name: handle for name in self._names(device) if (handle := _find(name)) is not None}
            demand = Demand(backlog.open(device), backlog.work_s.get(device, 0.0))
            change = resize(demand, _idle_s(workers), self._plan.bounds(device))
            for _ in range(change.start):
                name = next(name for i in range(10_000) if (name := f"{self._of(device)}{i}") not in workers)
                workers[name] = self._plan.start(device, name)
                _LOG.info("worker.started", extra={"worker": name, "jobs": demand.num_jobs, "work_s": demand.work_s})
            if change.stop:
                _end({name: workers.pop(name) for name in change.stop})
                _LOG.info("worker.stopped", extra={"workers": change.stop})
            self._sizes[device] = len(workers)

    def _of(self, device: str) -> str:
        return f"{self._plan.prefix}-{device}-"

    def _names(self, device: str | None = None) -> list[str]:
        beginning = f"{self._plan.prefix}-" if device is None else self._of(device)
        entries = cast("list[dict[str, str]]", ray.util.list_named_actors(all_namespaces=True))
        names = [entry["name"] for entry in entries if entry["namespace"] == NAMESPACE]
        return sorted(name for name in names if name.startswith(beginning))


def _find(name: str) -> Any | None:
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:  # it has just ended
        return None


def _num_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0.0))


def _idle_s(workers: Mapping[str, Any]) -> dict[str, float]:
    asked = {name: worker.idle_s.remote() for name, worker in workers.items()}
    idle_s = {}
    for name, answer in asked.items():
        try:
            idle_s[name] = float(ray.get(answer, timeout=ANSWER_S))
        except (GetTimeoutError, RayActorError):
            idle_s[name] = 0.0  # it starts, or starts again
    return idle_s


def _end(workers: Mapping[str, Any]) -> None:
    """Lets workers give back what they have, then ends their processes."""
    asked = [worker.stop.remote() for worker in workers.values()]
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=STOP_S)
    for worker in workers.values():
        ray.kill(worker)


def spawn(name: str, plan: Plan, *, detached: bool, every_s: float = EVERY_S) -> Any:
    """Starts the pool, or joins the one that runs; returns its handle."""
    return (
        ray.remote(CompilePool)
        .options(
            name=name,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached" if detached else None,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=4,
        )
        .remote(plan, every_s=every_s)
    )
