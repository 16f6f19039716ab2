"""A gauntlet that misbehaves, for compiler processes of tests: it is imported and called in such a process.

What happens is asked for by the number of channels of the site.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from esper.leyline import BlueprintIR, Check, SiteSignature, ValidationReport
from esper.leyline.native import NativeVerdict
from esper.leyline.runtime import NativeKernel
from esper.urabrask.native import examine_native

CRASH, EXIT, HANG, HOG, ASK_TOO_MUCH, RAISE, FAIL, BABBLE, FAMILY, TELL, PRINT = range(101, 112)
"""Channels of the site at which each happens; all other sites pass."""


def examine(module: torch.nn.Module, ir: BlueprintIR, signature: SiteSignature) -> ValidationReport:
    """Does what the site's number of channels asks for."""
    what = signature.channels
    sys.stderr.write(f"looking at {signature.key}\n")
    sys.stderr.flush()
    _DEEDS.get(what, lambda: None)()
    return ValidationReport(checks=(Check(name="shape", passed=what != FAIL, detail="too round"),))


def _hog() -> None:
    kept = []
    for _ in range(40):
        kept.append(bytearray(os.urandom(1) * (16 << 20)))
        time.sleep(0.1)
    time.sleep(3600)  # until it is noticed


def _raise() -> None:
    raise KeyError("no such thing")


def _start_a_hog() -> None:
    code = "import time; input(); kept = bytes(range(256)) * (3 << 20); time.sleep(3600)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE)
    sys.stderr.write(f"started {child.pid}\n")
    sys.stderr.flush()
    assert child.stdin is not None
    child.stdin.write(b"\n")  # it takes the memory only now, as that ends both
    child.stdin.flush()
    time.sleep(3600)


def _tell() -> None:
    sys.stderr.write("\n".join(sorted(os.environ)) + "\n")
    sys.stderr.flush()
    raise RuntimeError(f"{os.getpgid(0) == os.getpid()} {Path.cwd()}")


def _babble() -> None:
    """Writes to the pipe to the worker: the one pipe for writing that is neither output nor error."""
    for entry in sorted(Path("/proc/self/fd").iterdir(), key=lambda path: int(path.name)):
        number = int(entry.name)
        if number > 2 and entry.exists() and str(entry.readlink()).startswith("pipe:"):
            lines = Path(f"/proc/self/fdinfo/{number}").read_text().splitlines()
            flags = int(next(line.split()[1] for line in lines if line.startswith("flags")), 8)
            if flags & os.O_ACCMODE == os.O_WRONLY:
                os.write(number, b"\xff" * 64)
                time.sleep(3600)
    raise AssertionError("no pipe")


def examine_crashing(module: torch.nn.Module, signature: SiteSignature, kernel: NativeKernel) -> NativeVerdict:
    """Examines native code that reads where nothing is, once it meets a NaN."""

    def forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if inputs[-1].isnan().any():
            sys.stderr.write("met a NaN\n")
            ctypes.string_at(0)
        return kernel.forward(inputs)

    return examine_native(module, signature, NativeKernel("crashing", kernel.facts, forward, kernel.backward))


_DEEDS: dict[int, Callable[[], object]] = {
    CRASH: lambda: ctypes.string_at(0),
    EXIT: lambda: os._exit(7),
    HANG: lambda: time.sleep(3600),
    HOG: _hog,
    ASK_TOO_MUCH: lambda: torch.zeros(1 << 34),
    RAISE: _raise,
    BABBLE: _babble,
    FAMILY: _start_a_hog,
    TELL: _tell,
    PRINT: lambda: sys.stdout.write("this is no answer\n") and sys.stdout.flush(),
}
