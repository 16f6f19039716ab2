"""A grown model, exported and saved, runs in a process that cannot import Esper."""

from __future__ import annotations

import subprocess
import sys

import torch
from kasmina_support import grown

from esper.kasmina import export

SCRIPT = """
import sys
sys.modules["esper"] = None
try:
    import esper
except ImportError:
    pass
else:
    raise SystemExit("esper is importable")
import torch
torch.set_num_threads(1)
pair = torch.load("pair.pt")
model = torch.export.load("model.pt2").module()
assert torch.equal(model(pair["x"]), pair["y"])
print("equal")
"""


def test_a_saved_program_runs_where_esper_cannot_be_imported(tmp_path):
    driver, _, _ = grown("cnn")
    plain = export(driver.host).eval()
    x = driver.batches[0][0]
    torch.export.save(torch.export.export(plain, (x,)), tmp_path / "model.pt2")
    with torch.no_grad():
        torch.save({"x": x, "y": plain(x)}, tmp_path / "pair.pt")
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr
