"""Fuzzes one target with atheris, guided by the coverage of `esper.leyline`:

    python tests/fuzz/run.py ir --seconds 60

Ends with 0 and libFuzzer's figures if nothing was found; else the input that was found lies under `--findings`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit" / "leyline")]

with atheris.instrument_imports(include=["esper.leyline"]):
    import targets

    from esper.urza.library import load_library

T = TypeVar("T")

MEMORY_MB = 3_000
INPUT_S = 60
"""What one input may take."""


class FuzzedChance:
    """Choices made by the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = atheris.FuzzedDataProvider(data)

    def choice(self, seq: Sequence[T], /) -> T:
        return seq[self.randrange(len(seq))]

    def randrange(self, stop: int, /) -> int:
        return self._data.ConsumeIntInRange(0, stop - 1)


TARGETS = {
    "json": targets.fuzz_json,
    "ir": lambda data: targets.fuzz_ir(FuzzedChance(data)),
    "gauntlet": lambda data: targets.fuzz_ir(FuzzedChance(data), examined=True),
    "container": targets.fuzz_container,
    "damage": lambda data: targets.fuzz_damage(FuzzedChance(data)),
}


def seeds(target: str) -> list[bytes]:
    """Inputs to begin with."""
    if target == "container":
        return [targets.PACKED]
    if target == "json":
        return [design.ir.model_dump_json().encode() for design in load_library().values()]
    return [bytes(range(256))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, help="a folder; by default a temporary one")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="esper-fuzz-")) if args.findings is None else args.findings
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(args.target)):
        (corpus / f"seed-{number}").write_bytes(data)
    target = TARGETS[args.target]

    def one_input(data: bytes) -> None:
        target(data)

    limits = [f"-rss_limit_mb={MEMORY_MB}", f"-timeout={INPUT_S}", "-max_len=8192", f"-max_total_time={args.seconds}"]
    options = [*limits, f"-artifact_prefix={folder}/", "-print_final_stats=1", "-verbosity=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
