"""Forks of a run as Ray tasks, on CPUs that nobody else uses (docs/adr/0013); what one does is `esper.api.fork_local`.

No task of these ever waits in Ray's queue: one is handed over only while the cluster has its CPUs free and nothing else
waits for any. When something does wait, the forks that run are ended: they are in the way.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.config import RunConfig
from esper.leyline import AssetHub, FaultPlan, Fork, ForkResult, UnavailableError

if TYPE_CHECKING:
    from esper.api import WorkloadFactory

EVERY_S = 0.5
"""From one look at forks and CPUs to the next."""
NICENESS = 10
"""Of forks, added to that of Ray's workers: CPUs are admission, and a trainer may share their cores."""
NEEDED = "others wait for the CPUs"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What all forks of a run are made from. Pickles.

    Attributes:
        workload: makes the run's workload anew.
        config: of the run.
        hub: where kernels come from.
        public_key: whose signature they bear, raw.
        faults: a script of faults, for tests.
    """

    workload: WorkloadFactory
    config: RunConfig
    hub: AssetHub
    public_key: bytes
    faults: FaultPlan | None = None


@dataclass(frozen=True)
class Free:
    """What nobody has of a cluster's CPUs.

    Attributes:
        nodes: of each node, that of this process first.
        is_waited_for: whether anything waits for CPUs.
    """

    nodes: tuple[float, ...]
    is_waited_for: bool = False


class RayTrials:
    """A `Trials` on the Ray that this process is connected to.

    Args:
        origin: what forks are made from.
        reserved: CPUs of this node that stay free: those of a trainer that Ray does not know of.
        look: says what is free; None asks Ray.
    """

    def __init__(self, origin: Origin, *, reserved: float = 0.0, look: Callable[[], Free] | None = None) -> None:
        self._origin = origin
        self._settings = origin.config.tamiyo.trials
        self._reserved = reserved
        self._look = look or free_cpus
        self._lock = threading.Lock()
        self._results: dict[str, ForkResult] = {}
        self._running: dict[Any, Fork] = {}
        self._waiting: list[Fork] = []
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def idle(self) -> int:
        """See `Trials`."""
        free = self._look()
        if free.is_waited_for or not free.nodes:
            return 0
        nodes = (free.nodes[0] - self._reserved, *free.nodes[1:])
        # node by node: what is left over here and there makes no room for one
        room = sum(max(0, math.floor(cpus / self._settings.cpus + 1e-9)) for cpus in nodes)
        return min(self._settings.at_once, room)

    def start(self, checkpoint: bytes, forks: Sequence[Fork]) -> None:
        """See `Trials`."""
        import numpy as np
        import ray
        from ray.exceptions import RayError

        if self._thread is not None:
            self._thread.join()
        try:
            # bytes lie in shared memory once; a numpy array is read from there without a copy
            given = ray.put(np.frombuffer(checkpoint, dtype=np.uint8))
            origin = ray.put(self._origin)
        except RayError as error:
            raise UnavailableError(f"Ray does not take the state of the run: {error}") from error
        self._results, self._running, self._waiting = {}, {}, list(forks)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(origin, given), name="trials", daemon=True)
        self._thread.start()

    def results(self) -> Mapping[str, ForkResult]:
        """See `Trials`."""
        with self._lock:
            return dict(self._results)

    def cancel(self, reason: str) -> Mapping[str, ForkResult]:
        """See `Trials`."""
        self._end(reason)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.results()

    # ---- the thread

    def _run(self, origin: Any, checkpoint: Any) -> None:
        try:
            self._tend(origin, checkpoint)
        except Exception as error:  # noqa: BLE001 - whatever it is, the trial must not hang on it
            _LOG.exception("trials.failed")
            self._end(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _tend(self, origin: Any, checkpoint: Any) -> None:
        """Hands forks over and takes in what they came to, until all have ended."""
        was_needed = False
        while not self._over.wait(EVERY_S):
            self._collect()
            needed = self._look().is_waited_for
            if needed and was_needed:  # twice: a task that is being handed over waits for a moment too
                self._end(NEEDED)
                return
            was_needed = needed
            if not needed:
                self._launch(origin, checkpoint)
            with self._lock:
                if not self._waiting and not self._running:
                    return

    def _launch(self, origin: Any, checkpoint: Any) -> None:
        import ray

        while self._waiting and len(self._running) < self._settings.at_once and self.idle() > 0:
            once = ray.remote(max_calls=1)(_fork)  # its niceness would stay with the worker
            task = once.options(
                num_cpus=self._settings.cpus,
                max_retries=0,
                scheduling_strategy="DEFAULT",  # not within the placement group of a train worker
                name="esper-fork",
                enable_task_events=False,
            )
            with self._lock:
                if self._over.is_set():
                    return
                fork = self._waiting.pop(0)
                self._running[task.remote(origin, checkpoint, fork)] = fork
            _LOG.info("fork.begun", extra={"fork": fork.fork_id})
            if self._over.wait(EVERY_S):  # Ray takes its CPUs in the meantime
                return

    def _collect(self) -> None:
        import ray

        if not self._running:
            return
        done, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        for ref in done:
            with self._lock:
                fork = self._running.pop(ref, None)
            if fork is None:
                continue
            result = _result_of(ref, fork)
            with self._lock:
                self._results.setdefault(fork.fork_id, result)

    def _end(self, reason: str) -> None:
        """Ends all that runs; a fork that had begun is counted at its limit."""
        import ray

        with self._lock:
            self._over.set()
            running, waiting = dict(self._running), list(self._waiting)
            self._running, self._waiting = {}, []
            for fork in running.values():
                self._results[fork.fork_id] = ForkResult(fork.fork_id, flops=fork.max_flops, failure=reason)
            for fork in waiting:
                self._results[fork.fork_id] = ForkResult(fork.fork_id, failure=reason)
        for ref in running:
            ray.cancel(ref, force=True)


def _result_of(ref: Any, fork: Fork) -> ForkResult:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(ref)
    except RayError as error:  # it died, or raised what `fork_local` does not tell in a result
        words = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        _LOG.warning("fork.died", extra={"fork": fork.fork_id, "reason": words})
        return ForkResult(fork.fork_id, flops=fork.max_flops, failure=words)


def _fork(origin: Origin, checkpoint: Any, fork: Fork) -> ForkResult:
    """Runs one fork in a Ray worker."""
    os.nice(NICENESS)
    from esper.api import fork_local

    return fork_local(
        origin.workload,
        origin.config,
        checkpoint.tobytes(),
        fork,
        hub=origin.hub,
        public_key=origin.public_key,
        faults=origin.faults,
    )


def free_cpus() -> Free:
    """What nobody has of the cluster's CPUs now.

    Raises:
        UnavailableError: if Ray does not answer.
    """
    import ray
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - Cython
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.exceptions import RayError

    try:
        context = ray.get_runtime_context()
        state = get_cluster_resource_state(GcsClient(address=context.gcs_address))
        here = bytes.fromhex(context.get_node_id())
    except (RayError, RuntimeError) as error:
        raise UnavailableError(f"Ray does not say what is idle: {' '.join(str(error).split())[:200]}") from error
    nodes = sorted(state.node_states, key=lambda node: node.node_id != here)
    asked = [dict(one.request.resources_bundle) for one in state.pending_resource_requests]
    asked += [dict(one.resources_bundle) for gang in state.pending_gang_resource_requests for one in gang.requests]
    return Free(
        tuple(float(node.available_resources.get("CPU", 0.0)) for node in nodes),
        any(_waits_for_cpus(bundle) for bundle in asked),
    )


def _waits_for_cpus(bundle: Mapping[str, float]) -> bool:
    """Whether a request could go on if CPUs came free; what it lacks else, forks do not have."""
    return bundle.get("CPU", 0.0) > 0.0 and not any(name not in {"CPU", "memory"} for name in bundle)
