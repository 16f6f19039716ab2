"""REST requests a second: the gateway behind Ray Serve, asked by client processes of this machine.

Reads and submissions are measured apart: a submission is durable before it is answered. `cpu_ms` is the CPU time of all
that serves, for one answer: it says what an idle machine could do, however busy this one is (Linux only). The clients'
own CPU time is told too, since they share the cores; and the same routes without Serve, to see where the time goes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from esper.config import HttpConfig
from esper.storage import Storage
from jobs.bench import Say
from jobs.bench.harness import Goal
from jobs.bench.urza import populate

GOAL = 5_000.0
"""Requests a second that the seeds promise."""
SIZE = 1_000
"""Kernels in the catalogue."""


def measure(*, seconds: float, num_clients: int, say: Say) -> tuple[list[dict[str, Any]], list[Goal], str]:
    """Measures; returns rows, goals, and what is to be said of them."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="esper-bench-", ignore_cleanup_errors=True) as scratch:
        storage = Storage.at(scratch)
        say(f"{SIZE:,} kernels: writing the catalogue")
        signatures = populate(storage, SIZE)
        for where, serving in (("gateway", _gateway), ("routes alone", _routes)):
            with serving(storage) as (port, kernel_ids):
                kernels = [f"/api/v1/kernels/{one}" for one in kernel_ids]
                pages = [f"/api/v1/kernels?signature={one.key}&limit=10" for one in signatures]
                for what, kind, paths in (
                    ("health", "read", ["/health"]),
                    ("kernel by id", "read", kernels),
                    ("10 kernels of a signature", "read", pages),
                    ("submission", "submit", []),
                ):
                    _ask(port, kind, paths, seconds=min(2.0, seconds), num_clients=2)  # warms up
                    row = {"what": f"{what}, {where}"} | _ask(
                        port, kind, paths, seconds=seconds, num_clients=num_clients
                    )
                    say(f"{row['what']}: {row['per_s']:,.0f} a second, p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms")
                    rows.append(row)
    goals = [_goal(f"REST requests a second, {row['what']}", row) for row in rows if "gateway" in row["what"]]
    reads = [goal.value for goal in goals if "submission" not in goal.name]
    verdict = (
        f"The gateway answers {min(reads):,.0f} to {max(reads):,.0f} reads a second here, of {GOAL:,.0f} promised."
    )
    return rows, goals, verdict


def _goal(name: str, row: dict[str, Any]) -> Goal:
    low, high = row["per_s"] - row["spread"], row["per_s"] + row["spread"]
    return Goal(name=name, value=row["per_s"], goal=GOAL, met=low > GOAL, interval=(low, high))


def _ask(port: int, kind: str, paths: Sequence[str], *, seconds: float, num_clients: int) -> dict[str, Any]:
    """Lets so many clients ask at once.

    Raises:
        RuntimeError: if a client failed.
    """
    script = str(Path(__file__).with_name("http_client.py"))
    seeds = [f"{time.time_ns()}-{client}" for client in range(num_clients)]
    cpu = _cpu_seconds()
    clients = [
        subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-S", "-E", script, "127.0.0.1", str(port), str(seconds), kind, seed, *paths],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    found = []
    for client in clients:
        out, _ = client.communicate(timeout=seconds + 120)
        if client.returncode:
            raise RuntimeError(f"a client ended with {client.returncode}")
        found.append(json.loads(out))
    cpu = _cpu_seconds() - cpu
    rates = [len(one["ms"]) / one["seconds"] for one in found]
    taken = np.concatenate([one["ms"] for one in found])
    p50, p99 = np.percentile(taken, [50, 99])
    return {
        "per_s": round(sum(rates), 1),
        # 95%, from how the clients differ
        "spread": round(1.96 * float(np.std(rates, ddof=1)) * len(rates) ** 0.5, 1),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "cpu_ms": round(cpu * 1e3 / len(taken), 3),
        "answers": len(taken),
        "failed": sum(one["num_failed"] for one in found),
        "clients": num_clients,
        "clients_cpu": round(sum(one["cpu_s"] / one["seconds"] for one in found), 2),
    }


@contextmanager
def _gateway(storage: Storage) -> Iterator[tuple[int, list[str]]]:
    """Ray, Urza and the gateway behind Serve's proxy; yields its port and some kernels' ids."""
    from actors.cluster import NAMESPACE, disconnect, prepare_environment

    prepare_environment()
    import ray

    from actors import gateway, tamiyo, urza
    from esper.leyline.catalogue import KernelQuery

    http = HttpConfig(port=_free_port())
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    try:
        hub = urza.spawn(storage.uri)
        gateway.start_serve(http, timeout_s=120.0)
        gateway.deploy(storage, http, timeout_s=120.0)
        page = hub.search_kernels(KernelQuery(limit=50))
        yield http.port, [entry.kernel.kernel_id for entry in page.kernels]
        gateway.undeploy(storage)
        tamiyo.undeploy(stop_serve=True)
    finally:
        disconnect()


@contextmanager
def _routes(storage: Storage) -> Iterator[tuple[int, list[str]]]:
    """The same routes in this process over a hub of its own, without Ray: what the routes cost by themselves."""
    import uvicorn

    from esper.leyline.catalogue import KernelQuery
    from esper.urza.guard import Limits
    from esper.urza.http import build_app
    from esper.urza.hub import Hub

    hub = Hub.open(storage)
    port = _free_port()
    config = uvicorn.Config(build_app(lambda: hub, Limits()), port=port, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("uvicorn did not start")
        time.sleep(0.05)
    try:
        page = hub.search_kernels(KernelQuery(limit=50))
        yield port, [entry.kernel.kernel_id for entry in page.kernels]
    finally:
        server.should_exit = True
        thread.join(30)


def _cpu_seconds() -> float:
    """CPU time so far of this process and of those below it that live: of what serves, once the clients are gone."""
    parents, seconds = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                seconds[int(entry.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sum(seconds[pid] for pid in ours)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
