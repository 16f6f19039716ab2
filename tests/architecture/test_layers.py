"""Who may import whom, and what an import may not cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def lint_imports(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", code, "--no-cache", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_layers_hold():
    done = lint_imports()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "jobs -> actors -> esper KEPT" in done.stdout
    assert "the library never imports ray KEPT" in done.stdout
    assert "systems meet only in leyline KEPT" in done.stdout


def test_the_contracts_would_catch_an_import_of_ray(tmp_path):
    """The check itself can fail: one wrong import in a copy breaks two contracts."""
    for package in ("esper", "actors", "jobs"):
        for path in (ROOT / package).rglob("*.py"):
            copied = tmp_path / path.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    with (tmp_path / "esper" / "tamiyo" / "plateau.py").open("a") as file:
        file.write("\nimport ray\nimport esper.kasmina\n")
    done = lint_imports(cwd=tmp_path)
    assert done.returncode != 0
    assert "the library never imports ray BROKEN" in done.stdout


@pytest.mark.parametrize(
    "modules",
    [
        ("esper",),
        ("esper.config", "esper.leyline"),
        ("esper.oona",),
        ("esper.urza",),
        ("esper.nissa",),
        ("esper.tamiyo",),
    ],
)
def test_importing_it_brings_neither_torch_nor_ray(modules):
    done = python(f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'ray'}} & sys.modules.keys()))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
