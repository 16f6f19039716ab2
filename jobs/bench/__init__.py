"""Benchmarks: `esper bench NAME [--json]`. Each is a module here with `main(arguments, progress) -> BenchResult`.

A benchmark is found by its file's name (with dashes for underscores) and imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from esper.leyline.errors import ConfigError

if TYPE_CHECKING:
    from jobs.bench.harness import BenchResult

Say = Callable[[str], None]
"""Takes one line of progress."""

Benchmark = Callable[[Sequence[str], Say], "BenchResult"]
"""Runs with its own command-line options; exits by `SystemExit` for `--help` and wrong options, as argparse does."""

SUPPORT = frozenset(
    {
        "harness",
        "arms",
        "exam_table",
        "picture",
        "first_step",
        "mlflow_registry",
        "native_kernels",
        "rest",
        "http_client",
        "streams",
        "stream_ends",
        "scale_ranks",
    }
)
"""Modules here that are no benchmarks."""


class _Benchmarks(Mapping[str, Benchmark]):
    """Name to benchmark; knows the names without importing anything."""

    def __getitem__(self, name: str) -> Benchmark:
        if name not in set(self):
            raise KeyError(name)
        return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").main

    def __iter__(self) -> Iterator[str]:
        modules = (module.name for module in pkgutil.iter_modules(__path__))
        return (name.replace("_", "-") for name in modules if name not in SUPPORT)

    def __len__(self) -> int:
        return len(list(iter(self)))


BENCHMARKS: Mapping[str, Benchmark] = _Benchmarks()


def run_benchmark(name: str, arguments: Sequence[str], *, as_json: bool) -> int:
    """Runs a benchmark and prints its table, or its JSON; progress goes to the standard error output.

    Returns:
        0: a goal that is not met is a result, not a failure.

    Raises:
        ConfigError: if there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no benchmark {name!r}", field="bench", remedy=f"one of {', '.join(sorted(BENCHMARKS))}")
    result = BENCHMARKS[name](arguments, lambda line: print(line, file=sys.stderr, flush=True))
    if as_json:
        print(result.model_dump_json(indent=2))
    else:
        from jobs.bench.harness import show

        show(result)
    return 0
