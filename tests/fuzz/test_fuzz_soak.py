"""Each fuzz target for a while (`ESPER_FUZZ_SECONDS`, 60 by default), in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SECONDS = int(os.environ.get("ESPER_FUZZ_SECONDS", "60"))
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(SECONDS + 600),
    pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install '.[fuzz]'"),
]


@pytest.mark.parametrize("target", ["json", "ir", "gauntlet", "container", "damage"])
def test_nothing_is_found(target: str, tmp_path: Path):
    command = [sys.executable, "tests/fuzz/run.py", target, "--seconds", str(SECONDS), "--findings", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4_000:]
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None
    assert int(executed[1]) > len(list((tmp_path / "corpus").glob("seed-*")))
