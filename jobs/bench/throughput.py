"""What the seeds promise, measured and reported against it, met or not: REST requests a second, compilations accepted
at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jobs.bench import Say, pool, rest
from jobs.bench.harness import BenchResult, machine


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench throughput", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default 10)")
    parser.add_argument("--clients", type=int, default=16, help="client processes, one connection each (default 16)")
    parser.add_argument("--submissions", type=int, default=128, help="submitted at once (default 128)")
    options = parser.parse_args(arguments)
    row, goal = pool.accepted(options.submissions, say)
    rows, goals, verdict = rest.measure(seconds=options.seconds, num_clients=max(2, options.clients), say=say)
    here = machine()
    parts = (
        BenchResult(name="compilations accepted", machine=here, rows=(row,), goals=(goal,)),
        BenchResult(name="REST requests", machine=here, rows=tuple(rows), goals=tuple(goals), verdict=verdict),
    )
    return BenchResult(name="throughput", machine=here, parts=parts)
