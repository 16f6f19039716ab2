"""How long a decision of Tamiyo takes by handle and by HTTP, alone and beside other callers.

A Ray of its own, Ray Serve with its two settings of `actors.cluster`, one replica. The packets are those of
`bench tamiyo-latency`; state and configuration travel with each. Times are the callers', of the wall clock. HTTP is one
connection that is kept, to the gateway on this machine. The first row is a call that decides nothing: what Ray Serve
takes for itself.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection
from itertools import product
from typing import Any, Self

import numpy as np

from esper.config import HttpConfig, TamiyoConfig
from esper.leyline import SystemStatePacket
from esper.storage import Storage
from esper.tamiyo import initial_state
from esper.urza.policies import StoredPolicies
from jobs.bench.harness import BenchResult, Goal, machine
from jobs.bench.tamiyo_latency import learned, packet_of

SEEDS = (20, 200, 2_000, 10_000)
CALLERS = (1, 4, 8, 16, 32)
GOALS_MS = {200: 10.0, 10_000: 100.0}
_CONFIG = TamiyoConfig(deadline_s=120.0, startup_s=120.0)
POLICIES = ("heuristic", "gnn")


def main(arguments: Sequence[str], say: Callable[[str], None]) -> BenchResult:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(prog="esper bench tamiyo-served", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of a host, an even number")
    parser.add_argument("--kernels", type=int, default=12, help="ready for each site")
    parser.add_argument("--calls", type=int, default=200, help="of each kind, fewer where they take 5 s together")
    parser.add_argument("--callers", type=int, nargs="*", default=list(CALLERS), help="at once, by handle, 20 seeds")
    options = parser.parse_args(arguments)
    from actors.cluster import connected

    with connected(dashboard=False), tempfile.TemporaryDirectory(prefix="esper-bench-") as folder:
        rows, together = _measure(Storage.at(folder), options, say)
    here = machine()
    goals = [
        Goal(name=f"p99 by handle at {row['seeds']} seeds, ms", value=row["p99_ms"], goal=GOALS_MS[row["seeds"]],
             met=row["p99_ms"] < GOALS_MS[row["seeds"]], interval=(row["p50_ms"], row["p99_ms"]))
        for row in rows if (row["by"], row["policy"]) == ("handle", "gnn") and row["seeds"] in GOALS_MS
    ]  # fmt: skip
    parts = (
        BenchResult(name="one caller", machine=here, rows=tuple(rows)),
        BenchResult(name="callers at once, by handle, 20 seeds", machine=here, rows=tuple(together)),
    )
    return BenchResult(name="tamiyo-served", machine=here, goals=tuple(goals), parts=parts)


def _measure(
    storage: Storage, options: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from actors import gateway, tamiyo

    http = HttpConfig(port=_free_port(), max_body_kb=256 * 1024)
    gateway.start_serve(http, timeout_s=120.0)
    tamiyo.deploy(timeout_s=120.0)
    gateway.deploy(storage, http, timeout_s=120.0)
    controller = tamiyo.ServeController(_CONFIG, storage=storage)
    controller.about()
    floor = {"seeds": 0, "policy": "nothing is decided", "by": "handle"}
    rows, together = [floor | _timed(controller.about, options.calls)], []
    gnn, policies = learned()
    StoredPolicies(storage).put(*policies(gnn.version))
    for num_seeds, policy in product(options.seeds, POLICIES):
        packet = packet_of(num_seeds, options.kernels, epoch=9)
        config = _CONFIG.model_copy(update={"policy": policy, "gnn": gnn})
        what = {"seeds": num_seeds, "policy": policy}
        say(f"{num_seeds} seeds, {policy}")
        asking = tamiyo.ServeController(config, storage=storage)
        rows.append(what | {"by": "handle"} | _timed(_by_handle(asking, packet), options.calls))
        with _Client(http.port, packet, config) as client:
            rows.append(what | {"by": "HTTP"} | _timed(client.ask, options.calls))
    for num_callers in options.callers:
        say(f"{num_callers} callers")
        together.append(_together(controller, num_callers, options.calls))
    gateway.undeploy(storage)
    tamiyo.undeploy()
    return rows, together


def _by_handle(controller: Any, packet: SystemStatePacket) -> Callable[[], Any]:
    state = initial_state(_CONFIG, 0)
    return lambda: controller.decide(state, packet)


def _together(controller: Any, num_callers: int, num_calls: int) -> dict[str, Any]:
    """So many threads ask at once, each one question after the other."""
    call, took, lock = _by_handle(controller, packet_of(20, 12, epoch=9)), [], threading.Lock()
    call()
    before = controller.about()["batches"]

    def ask() -> None:
        own = []
        for _ in range(num_calls):
            began = time.perf_counter()
            call()
            own.append(time.perf_counter() - began)
        with lock:
            took.extend(own)

    threads = [threading.Thread(target=ask) for _ in range(num_callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    p50, p99 = np.percentile(took, [50, 99])
    per_batch = len(took) / max(1, controller.about()["batches"] - before)
    return {
        "callers": num_callers, "a_second": len(took) / seconds, "p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99),
        "questions_a_batch": per_batch,
    }  # fmt: skip


class _Client:
    """One connection that is kept; a context."""

    def __init__(self, port: int, packet: SystemStatePacket, config: TamiyoConfig) -> None:
        body = {"packet": packet.model_dump(mode="json"), "config": config.model_dump(mode="json")}
        self._body = json.dumps(body).encode()
        self._connection = HTTPConnection("127.0.0.1", port, timeout=120)

    def __enter__(self) -> Self:
        self._connection.connect()
        assert self._connection.sock is not None
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self) -> None:
        """One decision; raises if it was refused."""
        self._connection.request("POST", "/api/v1/decide", self._body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {data[:300]!r}")


def _timed(call: Callable[[], Any], num_calls: int, *, longest_s: float = 5.0) -> dict[str, Any]:
    call()
    took: list[float] = []
    while len(took) < num_calls and (sum(took) < longest_s or len(took) < 3):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    p50, p99 = np.percentile(took, [50, 99])
    return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99), "calls": len(took)}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
