"""How fast Urza answers: queries, durable changes, restarts and fetches, at 1k, 10k and 100k kernels.

Figures of time are wall clock: a query has a caller who waits. The catalogue is made by Urza's own rules in memory and
written in large commits, so that it is what 1k to 100k registrations leave; the kernels that are fetched are stored one
by one. With `--mlflow PYTHON` (an interpreter that can import mlflow) the same register-and-search work is done by an
MLflow model registry on SQLite, for comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from esper.leyline import (
    BlueprintIR,
    Check,
    CompiledKernelArtifact,
    CompileJob,
    KernelStatus,
    Node,
    SiteKind,
    SiteSignature,
    ValidationReport,
    compile_key,
    now,
)
from esper.leyline.catalogue import KernelQuery
from esper.storage import Storage
from esper.urza.blobs import MemoryBlobs
from esper.urza.events import DeltaLog, MemoryLog
from esper.urza.hub import Hub
from jobs.bench import Say
from jobs.bench.harness import BenchResult, Goal, machine, median_interval

SIZES = (1_000, 10_000, 100_000)
NUM_SIGNATURES = 100
BUILD = "bench"
FETCHED = {"256 KB": 256 << 10, "10 MB": 10 << 20}
COMMIT_EVENTS = 20_000
MLFLOW_SIZE = 200


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures every size; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench urza", description=__doc__)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="kernels in the catalogue, by commas")
    parser.add_argument("--queries", type=int, default=1_000, help="queries of each kind (default 1000)")
    parser.add_argument("--changes", type=int, default=100, help="durable status changes (default 100)")
    parser.add_argument("--mlflow", metavar="PYTHON", help="interpreter of an environment that has mlflow")
    options = parser.parse_args(arguments)
    sizes = [int(size) for size in options.sizes.split(",")]
    rows: list[dict[str, Any]] = []
    goals: list[Goal] = []
    with _cluster() as spawn:
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="esper-bench-", ignore_cleanup_errors=True) as scratch:
                storage = Storage.at(scratch)
                say(f"{size:,} kernels: writing the catalogue")
                signatures = populate(storage, size)
                for row, goal in _measure(storage, size, signatures, options.queries, options.changes, spawn):
                    say(f"{size:,} kernels: {row['what']}: p50 {row['p50_ms']} ms, p99 {row['p99_ms']} ms")
                    rows.append(row)
                    goals += [goal] if goal else []
        fetched, fetch_goals = _fetches(spawn, say)
        rows += fetched
        goals += fetch_goals
    verdict = "MLflow was not compared: give --mlflow PYTHON."
    if options.mlflow:
        compared, verdict = _against_mlflow(options.mlflow, say)
        rows += compared
    return BenchResult(name="urza", machine=machine(), rows=tuple(rows), goals=tuple(goals), verdict=verdict)


# ---------------------------------------------------------------- the catalogue


def populate(storage: Storage, size: int) -> list[SiteSignature]:
    """Fills an empty storage with `size` validated kernels; returns their signatures."""
    signatures = [SiteSignature(kind=SiteKind.VECTOR, channels=8 + i) for i in range(min(NUM_SIGNATURES, size))]
    memory = MemoryLog(now)
    hub = Hub(memory, MemoryBlobs())
    for at in range(-(-size // len(signatures))):
        targets = signatures[: min(len(signatures), size - at * len(signatures))]
        register(hub, design(at + 1), f"design-{at}", targets)
    log = DeltaLog.take_over(storage, now)
    events = memory.replay()[1:]  # without the first: the log began with its own
    for start in range(0, len(events), COMMIT_EVENTS):
        log.append(events[start : start + COMMIT_EVENTS])
    return signatures


def design(width: int) -> BlueprintIR:
    """An adapter for vectors; each width is another design."""
    return BlueprintIR(
        fit=(SiteKind.VECTOR,),
        nodes=(
            Node(id="down", op="linear", params={"out": width}),
            Node(id="act", op="relu", inputs=("down",)),
            Node(id="up", op="linear", inputs=("act",), params={"out": "C"}),
        ),
        output="up",
    )


def register(hub: Hub, ir: BlueprintIR, name: str, targets: Sequence[SiteSignature], payload: bytes = b"") -> None:
    """Submits a design and completes its jobs with containers of Urza's own bookkeeping size."""
    hub.submit_blueprint(ir, name=name, targets=targets, tags=("bench", f"wide-{len(name) % 3}"))
    while (job := hub.claim("bench", fingerprint=BUILD)) is not None:
        hub.complete(job, *_artifact(job, payload))


def _artifact(job: CompileJob, payload: bytes) -> tuple[CompiledKernelArtifact, bytes]:
    key = compile_key(job.blueprint.ir_hash, job.signature, job.pipeline, BUILD)
    container = key.encode() + payload
    record = CompiledKernelArtifact(
        kernel_id=hashlib.sha256(container).hexdigest(),
        compile_key=key,
        blueprint_id=job.blueprint.blueprint_id,
        blueprint_name=job.blueprint.name,
        signature=job.signature,
        pipeline=job.pipeline,
        fingerprint=BUILD,
        num_parameters=72,
        flops_per_sample=128,
        memory_bytes=300,
        size_bytes=len(container),
        zero_at_birth=False,
        report=ValidationReport(checks=(Check(name="shape", passed=True),)),
    )
    return record, container


# ---------------------------------------------------------------- what is measured


def _measure(
    storage: Storage, size: int, signatures: Sequence[SiteSignature], queries: int, changes: int, spawn: Any
) -> Iterator[tuple[dict[str, Any], Goal | None]]:
    began = time.perf_counter()
    hub = Hub.open(storage)
    restart = 1e3 * (time.perf_counter() - began)
    yield (
        _row(size, "restart: open and replay", [restart]),
        _at_most(f"restart at {size:,}, s", [restart / 1e3], 15.0, 50) if size >= 100_000 else None,
    )
    ids = [kernel.kernel_id for kernel in hub.kernels(signature=signatures[0])]
    inside = _timed(lambda i: hub.kernel(ids[i % len(ids)]), queries)
    yield _row(size, "kernel by id, inside", inside), _at_most(f"by id, inside, at {size:,}, p99 ms", inside, 1.0, 99)
    for what, ask in _queries(hub, signatures):
        inside = _timed(ask, queries)
        goal = None if what == WHOLE else _at_most(f"{what}, inside, at {size:,}, p99 ms", inside, 1.0, 99)
        yield _row(size, f"{what}, inside", inside), goal
    every = list(itertools.islice((k for sig in signatures[1:] for k in hub.kernels(signature=sig)), changes))
    marked = _timed(lambda i: hub.mark_kernel(every[i].kernel_id, KernelStatus.RETIRED, "bench"), len(every))
    yield _row(size, "durable status change", marked), None

    handle = spawn(storage)  # takes over from here
    through = _timed(lambda i: handle.kernel(ids[i % len(ids)]), queries)
    row = _row(size, "kernel by id, through the actor", through)
    yield row, _at_most(f"by id, through the actor, at {size:,}, p99 ms", through, 5.0, 99)
    for what, ask in _queries(handle, signatures):
        through = _timed(ask, max(10, queries // 10) if what == WHOLE else queries)
        goal = None if what == WHOLE else _at_most(f"{what}, through the actor, at {size:,}, p99 ms", through, 5.0, 99)
        yield _row(size, f"{what}, through the actor", through), goal

    os.kill(handle.ready(), signal.SIGKILL)
    restarts = [_ms(lambda: handle.kernel(ids[0]))]
    row = _row(size, "restart: kill -9 of the actor until it answers", restarts)
    goal = (
        _at_most(f"kill -9 until answered at {size:,}, s", [restarts[0] / 1e3], 15.0, 50) if size >= 100_000 else None
    )
    yield row, goal


WHOLE = "whole records of a signature"
"""All of them at once; nobody who is in a hurry asks so, and it has no goal."""


def _queries(hub: Any, signatures: Sequence[SiteSignature]) -> list[tuple[str, Callable[[int], object]]]:
    """The questions about the kernels of a signature, each for another one at each call."""

    def of(i: int) -> SiteSignature:
        return signatures[i % len(signatures)]

    return [
        ("briefs of a signature", lambda i: hub.kernel_briefs(of(i))),
        ("a page of 100 of a signature", lambda i: hub.search_kernels(KernelQuery(signature=of(i)))),
        (WHOLE, lambda i: hub.kernels(signature=of(i))),
    ]


def _fetches(spawn: Any, say: Say) -> tuple[list[dict[str, Any]], list[Goal]]:
    """Fetches of hot kernels against `ray.get` of the same bytes, in turns."""
    import ray

    rows, goals = [], []
    with tempfile.TemporaryDirectory(prefix="esper-bench-", ignore_cleanup_errors=True) as scratch:
        storage = Storage.at(scratch)
        hub = Hub.open(storage)
        signature = SiteSignature(kind=SiteKind.VECTOR, channels=8)
        for at, num_bytes in enumerate(FETCHED.values()):
            payload = np.random.default_rng(at).bytes(num_bytes)
            register(hub, design(at + 1), f"fetched-{at}", [signature], payload)
        kernels = {kernel.blueprint_name: kernel for kernel in hub.kernels()}
        handle = spawn(storage)
        for at, name in enumerate(FETCHED):
            kernel_id = kernels[f"fetched-{at}"].kernel_id
            ref = ray.put(np.frombuffer(handle.fetch(kernel_id), dtype=np.uint8))
            plain, fetched = [], []
            for _ in range(100):
                plain.append(_ms(lambda ref=ref: ray.get(ref)))
                fetched.append(_ms(lambda kernel_id=kernel_id: handle.fetch(kernel_id)))
            rows += [_row(2, f"fetch of {name}", fetched), _row(2, f"ray.get of {name}", plain)]
            ratio = median_interval([one / other for one, other in zip(fetched, plain, strict=True)])
            met = ratio.high <= 1.3
            say(f"fetch of {name}: {ratio.value:.2f} times ray.get [{ratio.low:.2f}, {ratio.high:.2f}]")
            goals.append(
                Goal(
                    name=f"fetch of {name}, times ray.get", value=ratio.value, goal=1.3, met=met,
                    interval=(ratio.low, ratio.high),
                )
            )  # fmt: skip
    return rows, goals


def _against_mlflow(python: str, say: Say) -> tuple[list[dict[str, Any]], str]:
    """The same work by both, each in a directory of its own, one after the other."""
    say(f"MLflow: {MLFLOW_SIZE:,} registrations and searches")
    with tempfile.TemporaryDirectory(prefix="esper-bench-", ignore_cleanup_errors=True) as scratch:
        script = Path(__file__).with_name("mlflow_registry.py")
        command = [python, str(script), scratch, str(MLFLOW_SIZE), str(MLFLOW_SIZE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)  # noqa: S603 - the caller's own interpreter
        if done.returncode:
            raise SystemExit(f"MLflow failed: {done.stderr[-1_000:]}")
        theirs = json.loads(done.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory(prefix="esper-bench-", ignore_cleanup_errors=True) as scratch:
        hub = Hub.open(Storage.at(scratch))
        signatures = [SiteSignature(kind=SiteKind.VECTOR, channels=8 + i) for i in range(10)]
        registered = _timed(lambda i: register(hub, design(i + 1), f"design-{i}", [signatures[i % 10]]), MLFLOW_SIZE)
        searched = _timed(lambda i: hub.kernels(signature=signatures[i % 10]), MLFLOW_SIZE)
    ours = {"register": registered, "search": searched}
    rows = [
        _row(MLFLOW_SIZE, f"{what}, {who}", samples)
        for what in ours
        for who, samples in (("Urza", ours[what]), (f"MLflow {theirs['version']}", theirs[what]))
    ]
    ratios = {what: float(np.median(ours[what]) / np.median(theirs[what])) for what in ours}
    words = ", ".join(f"{what} {ratio:.2g} times the median of MLflow's" for what, ratio in ratios.items())
    return (
        rows,
        f"Urza against MLflow on SQLite, {MLFLOW_SIZE:,} entries: {words}. Urza registers durably, by three commits.",
    )


def _timed(call: Callable[[int], object], times: int) -> list[float]:
    return [_ms(lambda i=i: call(i)) for i in range(times)]


def _ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


def _row(size: int, what: str, samples: Sequence[float]) -> dict[str, Any]:
    p50, p99 = np.percentile(samples, [50, 99])
    return {
        "kernels": size,
        "what": what,
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "worst_ms": round(max(samples), 3),
        "samples": len(samples),
    }


def _at_most(name: str, samples: Sequence[float], goal: float, quantile: float) -> Goal:
    """A quantile with its 95% bootstrap interval; met when the interval does not reach above the goal."""
    values = np.asarray(samples)
    picks = np.random.default_rng(0).integers(len(values), size=(2_000, len(values)))
    low, high = np.percentile(np.percentile(values[picks], quantile, axis=1), [2.5, 97.5])
    value = float(np.percentile(values, quantile))
    return Goal(name=name, value=value, goal=goal, met=float(high) <= goal, interval=(float(low), float(high)))


@contextmanager
def _cluster() -> Iterator[Callable[[Storage], Any]]:
    """A Ray of its own; yields what starts the Urza of an address there, the one before it being stopped."""
    from actors.cluster import NAMESPACE, disconnect, prepare_environment

    prepare_environment()
    import ray

    from actors import urza

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    running: list[Any] = []  # an actor ends with its last handle

    def spawn(storage: Storage) -> Any:
        running[:] = [urza.spawn(storage.uri, deadline_s=300.0)]
        return running[0]

    try:
        yield spawn
    finally:
        disconnect()
