"""Resource use: what a kernel costs in values, FLOPs, memory and time. Figures, never verdicts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from esper.leyline import Latency
from esper.leyline.ops import count_flops, count_parameters, memory_bytes
from esper.urabrask.finding import Finding
from esper.urabrask.saved import saved_for_backward
from esper.urabrask.subject import Subject, forward, run_pass

MEASURED_BATCH = 2
MIN_REPEATS, MAX_REPEATS = 3, 7
ENOUGH_S = 0.02
"""A measurement of fewer than `MAX_REPEATS` repetitions ends after so long."""


def resources(subject: Subject) -> Finding:
    """`parameters`, `flops_per_sample` and `memory_bytes` by the IR, and `train_peak_bytes` as measured."""
    ir, signature = subject.ir, subject.signature
    figures = {
        "parameters": count_parameters(ir, signature),
        "flops_per_sample": count_flops(ir, signature),
        "memory_bytes": memory_bytes(ir, signature),
        "train_peak_bytes": train_peak_bytes(subject, MEASURED_BATCH),
    }
    return Finding(figures={name: float(value) for name, value in figures.items()})


def latencies(subject: Subject) -> tuple[Latency, ...]:
    """`forward`, and `step`: forward and backward, of the module as it is, on this machine at this hour."""
    h = subject.first_input(MEASURED_BATCH)
    return (
        measure("forward", lambda: forward(subject.module, h), MEASURED_BATCH),
        measure("step", lambda: run_pass(subject.module, h), MEASURED_BATCH),
    )


def measure(name: str, run: Callable[[], object], batch: int) -> Latency:
    """Times `run` after one call that does not count. CPU seconds of this thread: what others run takes no part."""
    run()
    taken: list[float] = []
    while len(taken) < MIN_REPEATS or (len(taken) < MAX_REPEATS and sum(taken) < ENOUGH_S):
        started = time.thread_time()
        run()
        taken.append(time.thread_time() - started)
    low, median, high = (1e3 * quartile for quartile in statistics.quantiles(taken, n=4, method="inclusive"))
    return Latency(name=name, median_ms=median, spread_ms=high - low, num_repeats=len(taken), batch=batch)


def train_peak_bytes(subject: Subject, batch: int) -> int:
    """Bytes alive where a training step holds most, at the turn from forward to backward: parameters, h, the output
    and all that was saved for the backward pass, each once. What an op takes and gives back within itself, up to a
    copy of its output, is not in it.
    """
    h = subject.first_input(batch).requires_grad_()
    with saved_for_backward() as kept:
        for parameter in subject.module.parameters():
            kept.count(parameter.detach())
        kept.count(h.detach())
        kept.count(subject.module(h).detach())
    return sum(kept.sizes.values())
