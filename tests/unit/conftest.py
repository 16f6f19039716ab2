"""Unit tests pass with Ray not installed; with `ESPER_TEST_WITHOUT_RAY=1` (as in `make test`) Ray is hidden."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from importlib.abc import MetaPathFinder

import pytest
import torch


class _NoRay(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "ray" or fullname.startswith("ray."):
            raise ModuleNotFoundError("ray is hidden from the unit tests", name=fullname)


if os.environ.get("ESPER_TEST_WITHOUT_RAY") == "1":
    assert "ray" not in sys.modules
    sys.meta_path.insert(0, _NoRay())

# What these tests write lies in memory where there is room: a third of their time was waiting for a disk.
MEMORY = "/dev/shm"
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 << 30:
    os.environ["TMPDIR"] = MEMORY
    tempfile.tempdir = None  # to be looked up anew

# No test takes the power from this machine, and thousands of waits for its disk are a tenth of these tests' time. A
# wrong descriptor is refused as ever; tests of what a disk does that fails put a failing one here themselves.
os.fsync = os.fstat

# These tests make and drop much and keep little: looking for cycles less often saves a twentieth of their time.
gc.set_threshold(20_000, 20, 20)

# The models here are tiny: a second thread costs more than it brings, and makes times depend on the machine's load.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws from torch's own generator must not hang on who drew before: their order is random."""
    torch.default_generator.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Nor on whether a fixture that it shares was made for it or for another."""
    torch.default_generator.manual_seed(1)
