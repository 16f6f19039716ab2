"""What `make` does where its programs are stood in for by a script that writes down how it was called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$@" >> {calls}
[ "$2" != pip ] || exit {code}
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("code", [0, 1])
def test_a_soak_installs_what_it_fuzzes_with_and_goes_on_without(tmp_path: Path, code: int):
    calls, python, stamp = tmp_path / "calls", tmp_path / "python", tmp_path / "installed"
    python.write_text(PYTHON.format(calls=calls, code=code))
    python.chmod(0o755)
    stamp.touch()
    command = ["make", "--no-print-directory", "soak", f"BIN={tmp_path}", f"STAMP={stamp}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    install, test = calls.read_text().splitlines()
    assert install.startswith("-m pip install")
    assert install.endswith("-c constraints.txt -e .[fuzz]")
    assert test == "-m pytest tests -m soak"
    assert ("cannot be installed here: its soak is skipped" in done.stdout) is (code == 1)
