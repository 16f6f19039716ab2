"""How much the compile pool gets done: kernels a minute by one and by two workers, what is asked for again, and how
many submissions it takes at once.

Each worker is a thread with a compiler process of its own over one Urza on a directory, as in the pool's actors but
without Ray. Wall clock: who waits for a kernel waits by it. Compilers have their imports before the clock starts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from actors.tezzeret import make_builder
from esper.config import TezzeretConfig
from esper.leyline import Pipeline, SiteKind, SiteSignature
from esper.storage import Storage
from esper.tezzeret.builder import Builder
from esper.tezzeret.worker import Compiled, Idle, Rejected, work_once
from esper.urza.hub import Hub
from esper.urza.library import designs_for, load_library
from jobs.bench import Say
from jobs.bench.harness import BenchResult, Goal, machine
from jobs.bench.urza import design

SITES = (
    SiteSignature(kind=SiteKind.VECTOR, channels=64),
    SiteSignature(kind=SiteKind.FEATURE_MAP, channels=16, extent=(8, 8)),
    SiteSignature(kind=SiteKind.SEQUENCE, channels=32, extent=(16,)),
)
ACCEPTED_GOAL = 100


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures everything; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench pool", description=__doc__)
    parser.add_argument("--workers", default="1,2", help="sizes of the pool, by commas (default 1,2)")
    parser.add_argument("--submissions", type=int, default=128, help="submitted at once (default 128)")
    parser.add_argument("--designs", type=int, default=99, help="at most so many designs of the library (default all)")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for number in map(int, options.workers.split(",")):
        rows += _rates(number, options.designs, say)
    row, goal = accepted(options.submissions, say)
    return BenchResult(
        name="pool",
        machine=machine(),
        rows=(*rows, row),
        goals=(goal,),
        verdict="Kernels of the fast pipeline, examined by the whole gauntlet; Urza acknowledges each durably.",
    )


def _rates(num_workers: int, num_designs: int, say: Say) -> list[dict[str, Any]]:
    """Cold, then the same designs under other names."""
    builders = [make_builder(TezzeretConfig(yields="never")) for _ in range(num_workers)]
    try:
        for builder in builders:
            builder.fingerprint()
        with tempfile.TemporaryDirectory(prefix="esper-bench-") as scratch:
            hub = Hub.open(Storage.at(scratch))
            rows = []
            for what in ("cold", "deduplicated"):
                num_jobs = _submit(hub, what, num_designs)
                began = time.perf_counter()
                made = _work(hub, builders)
                seconds = time.perf_counter() - began
                assert hub.backlog().open("cpu") == 0
                row = _row(f"{what}, {num_workers} workers", num_jobs, seconds, compiled=made)
                say(f"{row['what']}: {row['per_minute']} kernels a minute, {made} of {num_jobs} compiled")
                rows.append(row)
            return rows
    finally:
        for builder in builders:
            builder.close()


def _submit(hub: Hub, what: str, num_designs: int) -> int:
    library = load_library()
    fitting = {name: [site for site in SITES if library[name] in designs_for(site, library)] for name in library}
    for name in list(fitting)[:num_designs]:
        hub.submit_blueprint(library[name].ir, name=f"{name}-{what}", targets=fitting[name], tags=library[name].tags)
    return hub.pending(SITES, pipeline=Pipeline.FAST)


def _work(hub: Hub, builders: Sequence[Builder]) -> int:
    """Works until nothing is left; returns how many kernels were compiled."""
    key = Ed25519PrivateKey.generate()

    def turn(place: int) -> int:
        made = 0
        while not isinstance(outcome := work_once(hub, builders[place], worker=f"w{place}", private_key=key), Idle):
            assert not isinstance(outcome, Rejected), outcome.reason
            made += isinstance(outcome, Compiled)
        return made

    with ThreadPoolExecutor(len(builders)) as threads:
        return sum(threads.map(turn, range(len(builders))))


def accepted(number: int, say: Say) -> tuple[dict[str, Any], Goal]:
    """So many different designs are submitted at once; all of them are queued, durably, at the same time."""
    with tempfile.TemporaryDirectory(prefix="esper-bench-") as scratch:
        hub = Hub.open(Storage.at(scratch))

        def submit(place: int) -> None:
            hub.submit_blueprint(design(place + 1), name=f"design-{place}", targets=SITES[:1])

        began = time.perf_counter()
        with ThreadPoolExecutor(number) as threads:
            list(threads.map(submit, range(number)))
        seconds = time.perf_counter() - began
        queued = hub.backlog().open("cpu")
    goal = Goal(
        name="compilations accepted at once", value=queued, goal=ACCEPTED_GOAL, met=queued >= ACCEPTED_GOAL,
        interval=(queued, queued),
    )  # fmt: skip
    say(f"{queued} of {number} submissions accepted at once in {seconds:.2f} s")
    return _row("accepted at once", queued, seconds, compiled=0), goal


def _row(what: str, number: int, seconds: float, *, compiled: int) -> dict[str, Any]:
    return {
        "what": what,
        "kernels": number,
        "compiled": compiled,
        "seconds": round(seconds, 2),
        "per_minute": round(60.0 * number / seconds, 1),
    }
