"""The folders of compilers: none outlives its worker for long, and none goes while its worker lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from esper.tezzeret.scratch import SETTLED_S, Scratch, sweep

HOLDER = """
import os, signal, subprocess, sys, time
from pathlib import Path
from esper.tezzeret.scratch import Scratch, environment
scratch = Scratch(Path(sys.argv[1]))
compiler = subprocess.Popen(
    ["sleep", "600"], env=os.environ | environment(scratch.path), start_new_session=True, stdout=subprocess.DEVNULL
)
os.kill(compiler.pid, signal.SIGSTOP)
print(scratch.path, compiler.pid, flush=True)
time.sleep(600)
"""


def aged(path):
    then = time.time() - 2 * SETTLED_S
    os.utime(path, (then, then))
    return path


def test_a_folder_goes_with_its_compiler(tmp_path):
    scratch = Scratch(tmp_path)
    (scratch.path / "object.o").write_bytes(b"x")
    scratch.close()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_worker_left_goes_with_the_next_compiler_and_not_while_it_lives(tmp_path):
    """Its folder, and the compiler that stood still in it."""
    worker = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        left, compiler = worker.stdout.readline().split()
        (tmp_path / left / "object.o").write_bytes(b"x")
        aged(left)
        assert sweep(tmp_path) == 0
        assert became(compiler, {"T"})
        os.kill(worker.pid, signal.SIGKILL)
    finally:
        worker.kill()
        worker.communicate()
    scratch = Scratch(tmp_path)
    assert [str(path) for path in tmp_path.iterdir()] == [str(scratch.path)]
    assert became(compiler, {"", "Z"})
    scratch.close()


def became(pid, states):
    """Whether the process came to one of the states; a signal takes its time."""
    until = time.monotonic() + 60
    while state_of(pid) not in states and time.monotonic() < until:
        time.sleep(0.01)
    return state_of(pid) in states


def state_of(pid):
    """As `ps` tells it; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_folder_without_a_lock_goes_once_it_is_old(tmp_path):
    young = tmp_path / "esper-compiler-young"
    young.mkdir()
    other = tmp_path / "somebody-elses"
    for path in (tmp_path / "esper-compiler-old", other):
        path.mkdir()
        aged(path)
    assert sweep(tmp_path) == 1
    assert set(tmp_path.iterdir()) == {young, other}
