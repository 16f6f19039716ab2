"""`esper bench native`: what native code is worth, design by design: the step's CPU time against the eager module, and
what its first step costs against `torch.compile` in the trainer.

Every kernel is compiled anew, tens of seconds each; with `--keep FOLDER` what was measured is read from there, so that
a run that was broken off goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esper.leyline import KernelRejectedError, Pipeline, SiteKind, SiteSignature, ValidationReport, compile_key
from esper.leyline.canonical import canonical_hash
from esper.leyline.container import KernelManifest, pack
from esper.leyline.native import FASTER, NativeFacts
from jobs.bench import Say
from jobs.bench.harness import BenchResult, machine

SITES = {
    SiteKind.VECTOR: ((16,), (64,), (256,)),
    SiteKind.FEATURE_MAP: ((16, 16, 16), (32, 16, 16), (64, 8, 8)),
    SiteKind.SEQUENCE: ((32, 64), (64, 64), (64, 128)),
}
"""Three places for each kind of site: channels, then the extent."""
MODES = ("ir", "native", "torch_compile")


def main(arguments: Sequence[str], progress: Say) -> BenchResult:
    """Runs the benchmark; see `--help` of the command."""
    options = _parse(arguments)
    folder = Path(options.keep) if options.keep else Path(tempfile.mkdtemp(prefix="esper-bench-native-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    num_first = 0
    for name, signature in _places(options):
        row = _known(folder, name, signature)
        if row is None:
            progress(f"{name} at {signature.key}")
            row = _measure(name, signature, folder, first_steps=num_first < options.first_steps)
            (folder / f"{name}-{signature.key}.json").write_text(json.dumps(row))
        num_first += row["first ir ms"] is not None
        rows.append(row)
    here = machine()
    steps = tuple({key: row[key] for key in _STEP_COLUMNS} for row in rows)
    firsts = tuple({key: row[key] for key in _FIRST_COLUMNS} for row in rows if row["first ir ms"] is not None)
    parts = (
        BenchResult(name="native: a training step against eager's", machine=here, rows=steps, verdict=_verdict(rows)),
        BenchResult(name="native: from a container's bytes to the first step's end", machine=here, rows=firsts),
    )
    return BenchResult(name="native", machine=here, parts=parts if firsts else parts[:1])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="esper bench native", description=__doc__)
    parser.add_argument("--designs", nargs="*", help="names from the library; all of them by default")
    parser.add_argument("--sites", type=int, default=3, help="how many of the three places of each kind")
    parser.add_argument("--first-steps", type=int, default=3, help="kernels whose first steps are measured too")
    parser.add_argument("--keep", help="folder of figures to go on from")
    return parser.parse_args(arguments)


def _places(options: argparse.Namespace) -> Iterator[tuple[str, SiteSignature]]:
    """The smallest place of every design first, so that a run that is broken off has seen most designs."""
    from esper.leyline.ops import fits
    from esper.urza.library import load_library

    designs = [d for name, d in load_library().items() if not options.designs or name in options.designs]
    for index in range(options.sites):
        for design in designs:
            kind = design.ir.fit[0]
            channels, *extent = SITES[kind][index]
            signature = SiteSignature(kind=kind, channels=channels, extent=tuple(extent))
            if fits(design.ir, signature) is None:
                yield design.name, signature


def _known(folder: Path, name: str, signature: SiteSignature) -> dict[str, Any] | None:
    file = folder / f"{name}-{signature.key}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _measure(name: str, signature: SiteSignature, folder: Path, *, first_steps: bool) -> dict[str, Any]:
    from esper.leyline.lower import lower
    from esper.leyline.runtime import open_native
    from esper.tezzeret.native import compile_native
    from esper.urabrask.native import examine_native
    from esper.urza.library import load_library

    module = lower(load_library()[name].ir, signature)
    row: dict[str, Any] = dict.fromkeys(_COLUMNS)
    row |= {"design": name, "site": signature.key}
    began, cpu = time.perf_counter(), _cpu_s()
    try:
        code = compile_native(module, signature)
    except KernelRejectedError as error:
        return row | {"note": str(error)}
    row |= {"compile s": time.perf_counter() - began, "compile cpu s": _cpu_s() - cpu}
    kernel = open_native(f"bench-{name}-{signature.key}", code.facts, code.payload)
    try:
        verdict = examine_native(module, signature, kernel)
    except KernelRejectedError as error:
        return row | {"note": str(error)}
    errors = {check.name: check.value for check in verdict.checks}
    row |= {
        "batches": f"{code.facts.min_batch}-{code.facts.max_batch}",
        "output error": errors["native.output"],
        "gradient error": errors["native.gradient"],
        "KiB": sum(map(len, code.payload.values())) // 1024,
    }
    if verdict.timing is None:
        return row | {"note": verdict.reason}
    timing = verdict.timing
    row |= {"ratio": timing.ratio, "spread": timing.spread, "eager ms": timing.eager_ms}
    if first_steps:
        facts = code.facts.model_copy(update={"tolerance": verdict.tolerance, "timing": timing})
        row |= _first_steps(name, signature, facts, code.payload, folder)
    return row


_STEP_COLUMNS = (
    "design", "site", "ratio", "spread", "eager ms", "batches", "output error", "gradient error", "KiB", "compile s",
    "compile cpu s", "note",
)  # fmt: skip
_FIRST_COLUMNS = ("design", "site", *(f"{what} {mode} ms" for mode in MODES for what in ("load", "first")))
_COLUMNS = tuple(dict.fromkeys(_STEP_COLUMNS + _FIRST_COLUMNS))


def _cpu_s() -> float:
    """CPU seconds of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ---------------------------------------------------------------- first steps, each in a process of its own


def _first_steps(
    name: str, signature: SiteSignature, facts: NativeFacts, payload: Any, folder: Path
) -> dict[str, float]:
    """Milliseconds from a container's bytes to a module, and of that module's first step, in a fresh process each."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    file = folder / "first-step.kernel"
    file.write_bytes(_container(name, signature, facts, payload, key))
    found: dict[str, float] = {}
    for mode in MODES:
        command = [sys.executable, "-m", "jobs.bench.first_step", str(file), key.public_key().public_bytes_raw().hex()]
        with tempfile.TemporaryDirectory(prefix="esper-first-step-") as cache:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
            done = subprocess.run(  # noqa: S603 - our own module and file
                [*command, mode], env=environment, capture_output=True, text=True, check=True, timeout=900
            )
        load_ms, first_ms = json.loads(done.stdout.splitlines()[-1])
        found |= {f"load {mode} ms": load_ms, f"first {mode} ms": first_ms}
    file.unlink()
    return found


def _container(name: str, signature: SiteSignature, facts: NativeFacts, payload: Any, key: Any) -> bytes:
    from esper.leyline.lower import lower
    from esper.leyline.ops import count_flops, count_parameters, memory_bytes, needs_neighbour
    from esper.tezzeret.fingerprint import target_fingerprint
    from esper.urza.library import load_library

    ir = load_library()[name].ir
    ir_hash, fingerprint = canonical_hash(ir), target_fingerprint()
    manifest = KernelManifest(
        ir=ir,
        ir_hash=ir_hash,
        compile_key=compile_key(ir_hash, signature, Pipeline.OPTIMIZED, fingerprint),
        signature=signature,
        pipeline=Pipeline.OPTIMIZED,
        optimization_level=1,
        fingerprint=fingerprint,
        blueprint_id="bench",
        blueprint_name=name,
        num_parameters=count_parameters(ir, signature),
        flops_per_sample=count_flops(ir, signature),
        memory_bytes=memory_bytes(ir, signature),
        zero_at_birth=ir.zero_at_birth,
        replaces=ir.replaces,
        needs_neighbour=needs_neighbour(ir),
        report=ValidationReport(checks=()),
        native=facts,
    )
    weights = {name: tensor.numpy() for name, tensor in lower(ir, signature).state_dict().items()}
    return pack(manifest, weights, key, payload=payload)


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    kept = sum(ratio < FASTER for ratio in ratios)
    without = len(rows) - len(ratios)
    words = f"{kept} of {len(rows)} kernels keep native code (below {FASTER} of eager's CPU time)"
    return words + (f"; {without} have none that is right" if without else "")
