"""AutonomousTamiyo under load: health signals a second that it takes in while it decides, and whether all arrived.

A Ray of its own, Oona with its log, the service as an actor, and this process as the runs: so many runs tell one epoch
after the other, each with so many sites and seeds, at a paced rate of health signals; the service answers each epoch.
Nothing is dropped if the service counted as many signals as were sent, the bus dropped none for its group, and every
epoch of every run was decided about.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from esper.config import OonaConfig, TamiyoConfig
from esper.leyline import Bus, Contract, OonaMessage, RunState, SystemStatePacket, Topic
from esper.storage import Storage
from esper.tamiyo import initial_state
from jobs.bench.harness import BenchResult, Goal, machine
from jobs.bench.tamiyo_latency import packet_of

GOAL = 10_000.0
_WAIT_S = 120.0


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="esper bench tamiyo-watch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", type=int, nargs="+", default=[10_000, 20_000], help="health signals a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each rate")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=200, help="of each run, an even number")
    options = parser.parse_args(arguments)
    from actors.cluster import connected

    rows = []
    with connected(dashboard=False):
        for rate in options.rates:
            say(f"{rate} health signals a second")
            with tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
                rows.append(_measure(Storage.at(folder), rate, options))
    first = rows[0]
    kept = first["taken_a_second"] if not (first["lost"] or first["dropped"] or first["undecided"]) else 0.0
    goal = Goal(name="health signals a second, nothing dropped", value=kept, goal=GOAL, met=kept >= 0.99 * GOAL,
                interval=(kept, kept))  # fmt: skip
    verdict = "sent by one process that shares the machine; p50 and p99 are from an epoch's last part to the command"
    return BenchResult(name="tamiyo-watch", machine=machine(), rows=tuple(rows), goals=(goal,), verdict=verdict)


def _measure(storage: Storage, rate: int, options: argparse.Namespace) -> dict[str, Any]:
    import ray

    from actors import autonomous, oona

    assert storage.local is not None
    handle = oona.spawn(OonaConfig(), storage.local / "oona", prefix=oona.prefix_of(storage))
    make_bus = partial(_bus, oona.prefix_of(storage))  # by name: a handle would not outlive a restart
    service = autonomous.spawn(make_bus, storage)
    bus = make_bus()
    try:
        ray.get(service.about.remote(), timeout=_WAIT_S)
        time.sleep(2.0)  # its group begins at the end of the log
        return _drive(bus, service, rate, options)
    finally:
        ray.get(service.stop.remote(), timeout=_WAIT_S)
        ray.kill(service)
        bus.close()
        handle.stop()


def _drive(bus: Bus, service: Any, rate: int, options: argparse.Namespace) -> dict[str, Any]:
    import ray

    from actors.autonomous import GROUP

    def about() -> Any:
        return ray.get(service.about.remote(), timeout=_WAIT_S)

    heard = _Heard(bus)
    num_epochs = max(1, round(options.seconds * rate / (options.runs * options.seeds)))
    told: dict[tuple[str, int], float] = {}
    began = time.perf_counter()
    for number in range(num_epochs * options.runs):
        epoch, run = divmod(number, options.runs)
        messages = _messages(f"run-{run}", epoch, options.seeds)
        ahead_s = number * options.seeds / rate - (time.perf_counter() - began)
        time.sleep(max(0.0, ahead_s))
        told[f"run-{run}", epoch] = time.perf_counter()
        bus.publish(messages)
    bus.flush(timeout_s=_WAIT_S)
    seconds = time.perf_counter() - began
    sent = num_epochs * options.runs * options.seeds
    deadline = time.monotonic() + _WAIT_S
    while (seen := about())["told"] + seen["overtaken"] < len(told):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    caught_up_s = time.perf_counter() - began - seconds
    heard.close()
    took = [1e3 * (at - told[key]) for key, at in heard.at.items() if key in told]
    groups = [group for group in bus.stats().groups if group.group == GROUP]
    p50, p99 = np.percentile(took, [50, 99]) if took else (float("nan"), float("nan"))
    return {
        "asked_a_second": rate, "taken_a_second": sent / seconds, "signals": sent, "lost": sent - seen["health"],
        "dropped": sum(group.dropped for group in groups), "epochs": len(told),
        "undecided": len(told) - seen["told"] - seen["overtaken"], "overtaken": seen["overtaken"],
        "p50_ms": float(p50), "p99_ms": float(p99), "caught_up_s": caught_up_s,
    }  # fmt: skip


class _Heard:
    """Notes when each command came, in a thread."""

    def __init__(self, bus: Bus) -> None:
        self.at: dict[tuple[str, int], float] = {}
        self._subscription = bus.listen([Topic.KASMINA_COMMANDS])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over.is_set():
            deliveries = self._subscription.poll(timeout_s=0.2)
            now = time.perf_counter()
            for delivery in deliveries:
                self.at[delivery.message.key, delivery.message.payload["epoch"]] = now
            self._subscription.ack(deliveries)

    def close(self) -> None:
        """Listens no more."""
        time.sleep(0.5)
        self._over.set()
        self._thread.join()
        self._subscription.close()


_CONFIG = TamiyoConfig()
_PACKETS: dict[int, SystemStatePacket] = {}


def _messages(run_id: str, epoch: int, num_seeds: int) -> list[OonaMessage]:
    """What a run tells of an epoch: its health, its row, its state."""
    packet = _PACKETS.setdefault(num_seeds, packet_of(num_seeds, 12, epoch=9))
    at = {"run_id": run_id, "epoch": epoch}
    state = RunState(
        **at, sites=tuple(layer.layer_id for layer in packet.layers), memory=initial_state(_CONFIG, 0),
        config=_CONFIG.model_dump(mode="json"), options=packet.options[:12], budget=packet.budget,
    )  # fmt: skip
    bodies: list[tuple[Topic, Contract]] = [
        *((Topic.SEED_HEALTH, layer.model_copy(update=at)) for layer in packet.layers),
        (Topic.EPOCH, packet.epoch.model_copy(update=at | {"num_epochs": 10**6})),
        (Topic.RUN_STATE, state),
    ]
    return [OonaMessage.of(topic, body, sender_id="tolaria", key=run_id) for topic, body in bodies]


def _bus(prefix: str) -> Bus:
    from actors import oona

    return oona.connect(prefix).bus()
