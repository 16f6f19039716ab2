"""`esper bench tezzeret`: what the compile pool gets done, and what its native code is worth: `bench pool`, then
`bench native`, which have more options each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jobs.bench import Say, native, pool
from jobs.bench.harness import BenchResult, machine


def main(arguments: Sequence[str], say: Say) -> BenchResult:
    """Measures both; see the module."""
    parser = argparse.ArgumentParser(prog="esper bench tezzeret", description=__doc__)
    parser.add_argument("--workers", default="1,2", help="sizes of the pool, by commas (default 1,2)")
    parser.add_argument("--sites", type=int, default=3, help="how many of the three places of each kind (default 3)")
    parser.add_argument("--keep", help="folder of the native code's figures to go on from")
    options = parser.parse_args(arguments)
    keep = ["--keep", options.keep] if options.keep else []
    parts = (
        pool.main(["--workers", options.workers], say),
        native.main(["--sites", str(options.sites), *keep], say),
    )
    return BenchResult(name="tezzeret", machine=machine(), parts=parts)
