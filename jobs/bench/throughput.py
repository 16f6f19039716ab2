"""What the seeds promise, measured and reported against it, met or not: REST requests a second."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from jobs.bench import rest
from jobs.bench.harness import BenchResult, machine

Say = Callable[[str], None]


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench throughput", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default 10)")
    parser.add_argument("--clients", type=int, default=16, help="client processes, one connection each (default 16)")
    options = parser.parse_args(arguments)
    rows, goals, verdict = rest.measure(seconds=options.seconds, num_clients=max(2, options.clients), say=say)
    return BenchResult(name="throughput", machine=machine(), rows=tuple(rows), goals=tuple(goals), verdict=verdict)
