"""What becomes of native code: kept only where it is right and faster; a target says where it may run. No compiler."""

from __future__ import annotations

import subprocess

import pytest

from esper.leyline import Check, KernelRejectedError
from esper.leyline.native import NativeFacts, NativeVerdict, Timing
from esper.leyline.runtime import open_native
from esper.leyline.target import Target, target_here
from esper.tezzeret.compile import settle
from esper.tezzeret.fingerprint import target_fingerprint
from esper.tezzeret.native import NativeCode, is_of_the_machine

FACTS = NativeFacts(
    target=target_here(),
    dtype="float32",
    parameters=("w",),
    shape=(4,),
    min_batch=2,
    max_batch=64,
    saved=(0, 1),
    gradients=(0, 1),
    keeps_input=True,
    keeps_output=False,
)
CODE = NativeCode(FACTS, {FACTS.member("forward"): b"f", FACTS.member("backward"): b"b"})


def verdict(ratio: float | None, *, error: float = 1e-7) -> NativeVerdict:
    check = Check(name="native.gradient", passed=error < 1e-5, value=error, limit=1e-5)
    timing = ratio and Timing(ratio=ratio, spread=0.02, num_pairs=15, batch=32, native_ms=ratio, eager_ms=1.0)
    return NativeVerdict(checks=(check,), tolerance=error, timing=timing or None)


def test_code_that_is_right_and_faster_is_kept():
    native = settle(CODE, verdict(0.9))
    assert native.facts is not None
    assert native.facts.timing == verdict(0.9).timing
    assert native.facts.tolerance == 1e-7
    assert native.payload == CODE.payload
    assert native.dropped is None


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (verdict(0.97), "0.97 of the eager module's time"),
        (verdict(1.31), "1.31 of the eager module's time"),
        (verdict(None, error=0.5), "native.gradient 0.5 exceeds 1e-05"),
    ],
)
def test_other_code_is_dropped_and_the_kernel_passes_without(found: NativeVerdict, words: str):
    native = settle(CODE, found)
    assert (native.facts, dict(native.payload)) == (None, {})
    assert native.dropped == found.timing
    assert all(check.passed for check in native.checks)
    assert native.checks[-1].name == "native"
    assert words in native.checks[-1].detail


def test_a_target_is_met_by_more_but_not_by_less_or_other():
    here = FACTS.target
    more = here.model_copy(update={"cpu_flags": (*here.cpu_flags, "avx4096"), "capability": "AVX4096"})
    assert here.misfit(here) is None
    assert here.misfit(more) is None
    assert "lacks avx4096" in (more.misfit(here) or "")
    for field in ("torch", "revision", "machine"):
        assert field in (here.model_copy(update={field: "other"}).misfit(here) or "")
    gpu = Target(device="cuda", torch="2", revision="r", machine="m", capability="sm_90", cuda="13.0-580")
    assert gpu.misfit(gpu) is None
    assert "sm_80" in (gpu.misfit(gpu.model_copy(update={"capability": "sm_80"})) or "")
    assert "cuda" in (gpu.misfit(gpu.model_copy(update={"cuda": "13.0-570"})) or "")
    assert "device" in (gpu.misfit(here) or "")
    assert gpu.name == "cuda-m-sm_90"
    assert gpu.fingerprint == "torch-2-r-m-sm_90-13.0-580"
    assert here.fingerprint == target_fingerprint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": FACTS.target.model_copy(update={"torch": "0"})}, "built for torch 0"),
        ({"max_batch": 1}, "contradicts itself"),
        ({"saved": (2,)}, "contradicts itself"),
        ({}, "does not load"),
    ],
)
def test_what_cannot_be_opened_is_refused(change: dict[str, object], words: str):
    facts = FACTS.model_copy(update=change)
    with pytest.raises(KernelRejectedError, match=words):
        open_native("n", facts, CODE.payload)
    with pytest.raises(KernelRejectedError):
        open_native("n", facts, {})


def wrapped(inner: Exception, **fields: object) -> Exception:
    """As torch does it: the cause is an attribute, not `__cause__`."""
    outer = RuntimeError("inductor")
    for name, value in ({"inner_exception": inner} | fields).items():
        setattr(outer, name, value)
    return outer


def test_an_error_of_the_machine_is_told_from_one_of_the_design():
    from torch._inductor import exc

    full = OSError(28, "No space left on device")
    missing = exc.InvalidCxxCompiler()
    machine = [
        full,
        MemoryError(),
        missing,
        exc.CppCompileError(["g++"], "fatal error: math.h: No such file"),
        subprocess.CalledProcessError(1, ["strip"]),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        wrapped(missing),
        exc.InductorError(full, None),
        wrapped(RuntimeError("x"), __cause__=full),
    ]
    for error in machine:
        assert is_of_the_machine(error), error
    for error in (RuntimeError("no"), NotImplementedError("op"), wrapped(AssertionError()), KeyError("w")):
        assert not is_of_the_machine(error), error
