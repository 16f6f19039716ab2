"""What a compiler on the same cores costs a trainer's steps, by each setting of `tezzeret.yields`.

A small network trains in this process, in epochs with a pause between them, while a compiler in a process of its own
builds native code without an end. Turns of all settings alternate; in one of them the compiler stands still. Wall
clock: it is the trainer's own time that others could take.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from actors.tezzeret import GAUNTLET, NATIVE
from esper.config import TezzeretConfig
from esper.leyline import Pipeline, SiteKind, SiteSignature
from esper.leyline.presence import Presence
from esper.tezzeret.neighbours import Watch
from esper.tezzeret.pace import Pace, Yields
from esper.tezzeret.process import CompilerProcess, always
from esper.tezzeret.worker import work_once
from esper.urza.library import load_library
from esper.urza.memory import MemoryHub
from jobs.bench import Say
from jobs.bench.harness import BenchResult, machine, median_interval

ALONE = "no compiler"
EPOCH_S, PAUSE_S = 2.0, 0.5
DESIGN = "mlp_adapter"


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures all settings; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench yields", description=__doc__)
    parser.add_argument("--threads", default="1,2", help="of the trainer, by commas (default 1,2)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of every setting (default 6, at least 3)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn (default 10)")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with _compiler() as compiler:
        for threads in map(int, options.threads.split(",")):
            rows += _measure(compiler, threads, max(3, options.rounds), options.seconds, say)
    verdict = "Median step of a turn against the compiler's standing still in the same round; p99 likewise."
    return BenchResult(name="yields", machine=machine(), rows=tuple(rows), verdict=verdict)


@contextmanager
def _compiler() -> Iterator[CompilerProcess]:
    """One that always has native code to build, in a thread of its own."""
    compiler = CompilerProcess(GAUNTLET, examine_native=NATIVE)
    compiler.fingerprint()
    hub, ends = MemoryHub(), threading.Event()
    ir = load_library()[DESIGN].ir

    def work() -> None:
        for channels in itertools.count(16):
            site = SiteSignature(kind=SiteKind.VECTOR, channels=channels)
            hub.submit_blueprint(ir, name=f"{DESIGN}-{channels}", targets=[site], pipelines=[Pipeline.OPTIMIZED])
            if ends.is_set():
                return
            with suppress(ValueError, OSError):  # its pipes are closed under it at the end
                work_once(hub, compiler, worker="bench", private_key=Ed25519PrivateKey.generate())

    thread = threading.Thread(target=work, name="bench-compiler", daemon=True)
    thread.start()
    try:
        yield compiler
    finally:
        ends.set()
        compiler.may_run = always
        compiler.close()
        thread.join(30.0)


def _measure(compiler: CompilerProcess, threads: int, rounds: int, seconds: float, say: Say) -> list[dict[str, Any]]:
    paces: dict[str, Callable[[Pipeline], bool]] = {ALONE: lambda _pipeline: False}
    share = TezzeretConfig().yield_share
    for yields in get_args(Yields):
        paces[yields] = Pace(yields, share, Watch(compiler.family).look)
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in paces}
    train = _trainer(threads)
    compiler.may_run = paces[ALONE]
    train(2.0)
    for number in range(rounds):
        names = list(paces)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            compiler.may_run = paces[name]
            time.sleep(0.5)  # the compiler stops or goes on
            before = _cpu_s(compiler)
            times = train(seconds)
            used = max(_cpu_s(compiler) - before, 0.0) / seconds
            turns[name].append((statistics.median(times), statistics.quantiles(times, n=100)[98], used))
        say(f"{threads} threads: round {number + 1} of {rounds}")
    return [_row(name, threads, turns) for name in paces]


def _row(name: str, threads: int, turns: dict[str, list[tuple[float, float, float]]]) -> dict[str, Any]:
    pairs = list(zip(turns[name], turns[ALONE], strict=True))
    median = median_interval([mine[0] / alone[0] for mine, alone in pairs])
    tail = median_interval([mine[1] / alone[1] for mine, alone in pairs])
    return {
        "trainer's threads": threads,
        "yields": name,
        "step ms": 1e3 * statistics.median(turn[0] for turn in turns[name]),
        "median ratio": median.value,
        "95% interval": f"{median.low:.3f} to {median.high:.3f}",
        "p99 ratio": tail.value,
        "compiler's cores": statistics.median(turn[2] for turn in turns[name]),
    }


def _trainer(threads: int) -> Callable[[float], list[float]]:
    """Trains for so many seconds and returns the seconds of each step."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(128, 256), torch.randint(10, (128,))

    def train(seconds: float) -> list[float]:
        times: list[float] = []
        ends = time.monotonic() + seconds
        presence = Presence()
        with presence.shown():
            while time.monotonic() < ends:
                epoch_ends = min(ends, time.monotonic() + EPOCH_S)
                with presence.busy():
                    while time.monotonic() < epoch_ends:
                        began = time.perf_counter()
                        optimizer.zero_grad()
                        nn.functional.cross_entropy(model(x), y).backward()
                        optimizer.step()
                        times.append(time.perf_counter() - began)
                time.sleep(PAUSE_S)
        return times

    return train


def _cpu_s(compiler: CompilerProcess) -> float:
    """CPU seconds of the compiler and of all it has waited for (Linux only)."""
    total = 0.0
    for pid in compiler.family():
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total
