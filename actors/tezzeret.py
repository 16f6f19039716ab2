"""A worker of the compile pool as an actor: waits for news of submitted blueprints and works until nothing is left.

News comes over Oona, so a submission is taken up at once. Between news it looks at the hub once in `wake_s`, for work
whose worker died with the lease. It compiles nothing itself: that is done by a process of its own, which may crash.
The worker claims, keeps the lease, signs and hands over. What a compilation is lies in `esper.tezzeret`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from actors.logs import log_as
from esper.config import TezzeretConfig
from esper.leyline import (
    AssetHub,
    Bus,
    Contract,
    Delivery,
    Fault,
    KernelCharacterized,
    OonaMessage,
    Subscription,
    Topic,
    new_id,
)
from esper.tezzeret.builder import Builder
from esper.tezzeret.worker import Compiled, Idle, Rejected, Returned, work_once

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

GROUP = "tezzeret"
"""Consumer group of the pool: each submission wakes one worker."""

GAUNTLET, NATIVE = "esper.urabrask.gauntlet:examine", "esper.urabrask.native:examine_native"
"""What examines kernels and native code, by name: it is imported in the compiler's process."""

MAX_BACKOFF_S = 5.0

_LOG = logging.getLogger(__name__)


def make_builder(config: TezzeretConfig, device: str = "cpu") -> Builder:
    """A compiler of the pool, in a process of its own."""
    from esper.tezzeret.neighbours import Watch
    from esper.tezzeret.pace import Pace
    from esper.tezzeret.process import CompilerProcess, Limits

    limits = Limits(timeout_s=config.job_timeout_s, memory_mb=config.job_memory_mb)
    compiler = CompilerProcess(
        GAUNTLET,
        examine_native=NATIVE,
        device=device,
        limits=limits,
        ir_limits=config.limits,
        num_threads=config.num_threads,
    )
    compiler.may_run = Pace(config.yields, config.yield_share, Watch(compiler.family).look)
    return compiler


class CompileWorker:
    """Compiles in a thread of its own, from construction to `stop`; its methods answer at once.

    Args:
        name: unique in the pool; holds the leases.
        hub: connects to Urza; called in the worker's thread, again after a loss.
        bus: connects to Oona; likewise.
        private_key: gives the signer's key.
        builder: makes what compiles; called once.
        device: what it compiles for.
        lease_s: seconds of a lease, which is renewed while the work goes on.
        wake_s: longest pause between looks at the hub.
        idle_s: after so long without work the builder is let go of, until there is some.
    """

    def __init__(
        self,
        name: str,
        *,
        hub: Callable[[], AssetHub],
        bus: Callable[[], Bus],
        private_key: Callable[[], Ed25519PrivateKey],
        builder: Callable[[], Builder],
        device: str = "cpu",
        lease_s: float = 60.0,
        wake_s: float = 15.0,
        idle_s: float = 60.0,
    ) -> None:
        log_as(name)
        self._name = name
        self._life = f"{name}#{new_id()[:8]}"  # a process that comes after this one is another worker to the hub
        self._connect_hub = hub
        self._connect_bus = bus
        self._private_key = private_key
        self._lease_s = lease_s
        self._wake_s = wake_s
        self._idle_s = idle_s
        self._device = device
        self._builder = builder()
        self._worked_at = time.monotonic()
        self._num_compiled = 0
        self._num_rejected = 0
        self._state = "starting"
        self._bus: Bus | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"tezzeret-{name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Tezzeret({self._name}, {self._state}, {self._num_compiled} compiled, {self._num_rejected} rejected)"

    def ready(self) -> int:
        """Returns the process id."""
        return os.getpid()

    def state(self) -> str:
        """`starting`, `working`, `waiting`, `stopped`, or `reconnecting` with the reason."""
        return self._state

    def idle_s(self) -> float:
        """Seconds without work; 0 while there is some, or while it is not known."""
        return time.monotonic() - self._worked_at if self._state == "waiting" else 0.0

    def counts(self) -> tuple[int, int]:
        """Kernels compiled and jobs rejected since the start."""
        return self._num_compiled, self._num_rejected

    def stop(self, *, timeout_s: float = 10.0) -> bool:
        """Ends, giving back the job under way; returns whether it ended within `timeout_s`."""
        self._stopped.set()
        self._close_bus()  # ends the wait for news
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        backoff_s = 0.1
        while not self._stopped.is_set():
            try:
                self._serve()
                backoff_s = 0.1
            except Exception as error:  # noqa: BLE001 -- the actor's loop edge: logged, a state, and tried again
                if self._stopped.is_set():
                    break
                self._state = f"reconnecting: {error}"
                _LOG.warning("tezzeret.lost", exc_info=True, extra={"worker": self._name})
                self._stopped.wait(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        self._builder.close()
        self._state = "stopped"

    def _serve(self) -> None:
        """One life on bus and hub. It joins the group before it first looks, so that nothing falls between."""
        private_key = self._private_key()
        hub = self._connect_hub()
        bus = self._open_bus()
        try:
            subscription = bus.subscribe((Topic.BLUEPRINT_SUBMITTED,), group=GROUP)
            self._drain(hub, bus, private_key, ())
            while not self._stopped.is_set():
                self._state = "waiting"
                news = self._wait(subscription)
                self._drain(hub, bus, private_key, news)
                subscription.ack(news)
                if time.monotonic() - self._worked_at > self._idle_s:
                    self._builder.close()
        finally:
            self._close_bus()

    def _close_bus(self) -> None:
        with self._lock:
            bus, self._bus = self._bus, None
        if bus is not None:
            bus.close()

    def _open_bus(self) -> Bus:
        bus = self._connect_bus()
        with self._lock:
            self._bus = bus
        return bus

    def _wait(self, subscription: Subscription) -> list[Delivery]:
        # few at a time: the rest of a flood wakes the other workers
        return subscription.poll(max_messages=4, timeout_s=self._wake_s)

    def _drain(self, hub: AssetHub, bus: Bus, private_key: Ed25519PrivateKey, news: Sequence[Delivery]) -> None:
        """Works until there is nothing to claim."""
        traces = {delivery.message.key: delivery.message.trace_id for delivery in news}
        self._state = "working"
        while not self._stopped.is_set():
            outcome = work_once(
                hub,
                self._builder,
                worker=self._life,
                private_key=private_key,
                device=self._device,
                lease_s=self._lease_s,
                should_end=self._stopped.is_set,
            )
            if isinstance(outcome, Idle):
                return
            self._worked_at = time.monotonic()
            if isinstance(outcome, Rejected):
                self._num_rejected += 1
            if isinstance(outcome, Returned) and outcome.fault is Fault.ERROR:
                self._stopped.wait(self._wake_s)  # this machine may be at fault: the others look in once meanwhile
            if isinstance(outcome, Compiled):
                self._num_compiled += 1
                bus.publish(self._announcements(outcome, traces.get(outcome.artifact.blueprint_id)))

    def _announcements(self, outcome: Compiled, trace_id: str | None) -> list[OonaMessage]:
        artifact = outcome.artifact
        verdict = KernelCharacterized(
            kernel_id=artifact.kernel_id,
            blueprint_id=artifact.blueprint_id,
            signature=artifact.signature,
            report=artifact.report,
        )
        bodies: list[tuple[Topic, Contract]] = [
            (Topic.KERNEL_CHARACTERIZED, verdict),
            (Topic.KERNEL_READY, artifact),
        ]
        return [
            OonaMessage.of(topic, body, sender_id=self._name, key=artifact.blueprint_id, trace_id=trace_id)
            for topic, body in bodies
        ]
