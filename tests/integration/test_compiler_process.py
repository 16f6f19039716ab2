"""A compiler in a process of its own, a real one: what it does to itself never reaches its worker."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import examiners
import pytest

from esper.leyline import (
    Blueprint,
    BlueprintIR,
    CompileJob,
    Fault,
    LeaseLostError,
    Node,
    Pipeline,
    SiteKind,
    SiteSignature,
    UnavailableError,
)
from esper.leyline.canonical import canonical_hash
from esper.tezzeret import wire
from esper.tezzeret.compile import Unsigned, build
from esper.tezzeret.fingerprint import target_fingerprint
from esper.tezzeret.process import CompilerProcess, Limits, always
from esper.urabrask.gauntlet import examine

IR = BlueprintIR(
    fit=(SiteKind.VECTOR,),
    nodes=(Node(id="lin", op="linear", params={"init": "zeros"}),),
    output="lin",
    zero_at_birth=True,
)
LIMITS = Limits(timeout_s=60.0, memory_mb=2048)


def job(channels: int = 4, name: str = "design") -> CompileJob:
    blueprint = Blueprint(blueprint_id="b1", name=name, ir=IR, ir_hash=canonical_hash(IR), created_at=1.0)
    site = SiteSignature(kind=SiteKind.VECTOR, channels=channels)
    return CompileJob(
        job_id="j1", blueprint=blueprint, signature=site, pipeline=Pipeline.FAST, worker="w", deadline=0.0
    )


def never() -> None:
    """A worker that has nothing else to do."""


def is_gone(pid: int) -> bool:
    """Whether a process has ended, should nobody have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between opening and reading
        return True


def wait_until(holds, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def search_path():
    """Puts this folder where a compiler process finds `examiners`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def shared(search_path):
    compiler = CompilerProcess("examiners:examine", limits=LIMITS)
    yield compiler
    compiler.close()


@pytest.fixture
def compiler(shared):
    """The compiler of this module; one that a test ended is replaced, as it always is."""
    shared._limits, shared.may_run = LIMITS, always
    return shared


def test_what_it_builds_is_what_would_be_built_here():
    compiler = CompilerProcess("esper.urabrask.gauntlet:examine", limits=LIMITS)
    try:
        assert compiler.fingerprint() == target_fingerprint()
        there = compiler.build(job(), never)
        here = build(job(), fingerprint=target_fingerprint(), examine=examine)
        assert isinstance(there, Unsigned)
        assert there.manifest == here.manifest
        assert there.weights.keys() == here.weights.keys()
        assert all((there.weights[name] == here.weights[name]).all() for name in here.weights)
        pid = compiler.pid
        assert isinstance(compiler.build(job(5), never), Unsigned)
        assert compiler.pid == pid  # warm: its imports are not paid again
    finally:
        compiler.close()
    wait_until(lambda: is_gone(pid))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (examiners.CRASH, "the compiler was killed by SIGSEGV"),
        (examiners.EXIT, "the compiler exited with code 7"),
        (examiners.BABBLE, "an answer that cannot be read"),
    ],
)
def test_a_crash_is_a_verdict_with_the_last_lines_and_the_next_job_gets_a_new_process(compiler, what, words):
    compiler.fingerprint()
    compiler.build(job(), never)
    pid = compiler.pid
    verdict = compiler.build(job(what), never)
    assert isinstance(verdict, wire.Broken)
    assert verdict.fault is Fault.DEATH
    assert words in verdict.reason
    assert f"looking at vector-{what}" in verdict.log
    assert isinstance(compiler.build(job(), never), Unsigned)
    assert compiler.pid != pid
    wait_until(lambda: is_gone(pid))


def test_a_crash_tells_where_it_was(compiler):
    verdict = compiler.build(job(examiners.CRASH), never)
    assert "Fatal Python error: Segmentation fault" in verdict.log
    assert "examiners.py" in verdict.log


def test_a_job_that_hangs_is_ended_at_its_limit(compiler):
    compiler.build(job(), never)
    compiler._limits = Limits(timeout_s=0.5, memory_mb=2048)
    verdict = compiler.build(job(examiners.HANG), never)
    assert (verdict.fault, verdict.reason) == (Fault.DEATH, "the compiler took longer than 0.5 s")


def test_a_job_that_takes_too_much_memory_is_ended_at_its_limit(compiler):
    compiler.build(job(), never)
    compiler._limits = Limits(timeout_s=60.0, memory_mb=int(compiler._child.resident_mb()) + 100)
    verdict = compiler.build(job(examiners.HOG), never)
    assert verdict.fault is Fault.DEATH
    assert "took more than" in verdict.reason


def test_memory_of_what_a_compiler_starts_counts_and_it_ends_with_it(compiler):
    compiler.build(job(), never)
    compiler._limits = Limits(timeout_s=60.0, memory_mb=int(compiler._child.resident_mb()) + 500)
    verdict = compiler.build(job(examiners.FAMILY), never)
    assert "took more than" in verdict.reason
    started = int(verdict.log.split("started ")[1].split()[0])
    wait_until(lambda: is_gone(started))


def test_one_huge_allocation_is_refused_before_it_takes_the_machine(compiler):
    verdict = compiler.build(job(examiners.ASK_TOO_MUCH), never)
    assert verdict.fault is Fault.ERROR
    assert "can't allocate memory" in verdict.reason


def test_an_error_that_is_nobodys_fault_yet_keeps_the_process_and_its_traceback(compiler):
    compiler.build(job(), never)
    pid = compiler.pid
    verdict = compiler.build(job(examiners.RAISE), never)
    assert (verdict.fault, verdict.reason) == (Fault.ERROR, "KeyError: 'no such thing'")
    assert "Traceback" in verdict.log
    assert compiler.pid == pid


def test_a_blueprint_at_fault_is_refused(compiler):
    verdict = compiler.build(job(examiners.FAIL), never)
    assert isinstance(verdict, wire.Refused)
    assert "too round" in verdict.reason


def test_what_a_library_prints_ends_up_in_no_answer(compiler):
    assert isinstance(compiler.build(job(examiners.PRINT), never), Unsigned)


def test_it_has_no_credentials_and_a_folder_of_its_own(compiler, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "ESPER_STORAGE", "HF_TOKEN"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiler.close()
    verdict = compiler.build(job(examiners.TELL), never)
    names = set(verdict.log.split())
    assert "TORCHINDUCTOR_COMPILE_THREADS" in names
    assert not [name for name in names if name.startswith(("AWS", "RAY", "ESPER", "HF"))]
    own_group, _, folder = verdict.reason.removeprefix("RuntimeError: ").partition(" ")
    assert own_group == "True"
    assert not Path(folder).samefile(".")
    compiler.close()
    assert not Path(folder).exists()


def test_a_worker_that_loses_interest_ends_the_work(compiler):
    compiler.build(job(), never)
    pid = compiler.pid

    def lost() -> None:
        raise LeaseLostError("another has it")

    with pytest.raises(LeaseLostError):
        compiler.build(job(examiners.HANG), lost)
    wait_until(lambda: is_gone(pid))
    assert isinstance(compiler.build(job(), never), Unsigned)


def test_a_process_that_died_between_jobs_is_replaced(compiler):
    compiler.build(job(), never)
    os.kill(compiler.pid, signal.SIGKILL)
    wait_until(lambda: compiler._child.exit_code() is not None)
    assert isinstance(compiler.build(job(), never), Unsigned)


def test_while_it_may_not_run_it_is_stopped_and_its_clock_too(compiler):
    compiler.build(job(), never)
    compiler._limits = Limits(timeout_s=3.0, memory_mb=2048)
    states: list[str] = []
    began = time.monotonic()

    def may_run(_pipeline: Pipeline) -> bool:
        stat = Path(f"/proc/{compiler.pid}/stat").read_text()
        states.append(stat.rpartition(")")[2].split()[0])
        return time.monotonic() - began > 4.0

    compiler.may_run = may_run
    verdict = compiler.build(job(examiners.HANG), never)
    assert "T" in states
    assert states[-1] != "T"
    assert verdict.reason == "the compiler took longer than 3 s"
    assert time.monotonic() - began > 4.0  # had its clock run on while it was stopped, that would have been its end


def test_it_ends_when_its_worker_is_gone(search_path, tmp_path):
    import subprocess
    import sys

    code = (
        "from esper.tezzeret.process import CompilerProcess\n"
        "compiler = CompilerProcess('examiners:examine')\n"
        "compiler.fingerprint()\n"
        "print(compiler.pid, flush=True)\n"
        "import time; time.sleep(3600)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path.cwd())])
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        pid = int(worker.stdout.readline())
        assert not is_gone(pid)
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()
    wait_until(lambda: is_gone(pid))


def test_a_compiler_that_cannot_start_is_no_fault_of_the_job():
    compiler = CompilerProcess("no_such_module:examine", limits=LIMITS)
    with pytest.raises(UnavailableError, match="No module named 'no_such_module'"):
        compiler.build(job(), never)


def test_a_machine_that_cannot_compile_is_no_fault_of_the_design(search_path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no g++ to be found
    monkeypatch.delenv("CXX", raising=False)
    compiler = CompilerProcess(
        "examiners:examine", examine_native="esper.urabrask.native:examine_native", limits=Limits(timeout_s=300.0)
    )
    try:
        verdict = compiler.build(job(8).model_copy(update={"pipeline": Pipeline.OPTIMIZED}), never)
        assert isinstance(verdict, wire.Broken), verdict
        assert verdict.fault is Fault.ERROR
        assert "no native code can be compiled here" in verdict.reason
        assert "No working C++ compiler" in verdict.log
    finally:
        compiler.close()
