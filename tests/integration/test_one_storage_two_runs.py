"""Two runs at once on one machine and one storage: the second is refused, the first does not notice. Then Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray_head import REPOSITORY, wait_for

from esper.leyline import RunStatus, RunSummary

pytestmark = pytest.mark.ray


def test_a_second_run_is_refused_and_ctrl_c_ends_the_first_cleanly(tmp_path):
    store = tmp_path / "store"
    command = [
        Path(sys.executable).with_name("esper"), "train", REPOSITORY / "configs" / "digits.yaml", f"storage={store}",
        f"tezzeret.key_file={tmp_path / 'key.pem'}", "tolaria.epochs=5000", "nissa.view=plain", "nissa.dashboard=false",
        "tezzeret.optimize=never",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    log = tmp_path / "first.log"
    with log.open("w") as out:
        first = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        wait_for(lambda: first.poll() is not None or _saved(store), f"the first checkpoint; see {log}")
        assert first.poll() is None, log.read_text()
        before = sorted(store.glob("runs/*"))
        second = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=240)
        assert second.returncode == 2
        assert second.stdout == ""
        (line,) = second.stderr.splitlines()
        assert line.startswith(f"esper: storage: {store} is served by the run of process {first.pid} (wait for it, ")
        assert sorted(store.glob("runs/*")) == before
        assert first.poll() is None
        first.send_signal(signal.SIGINT)
        assert first.wait(240) == 130, log.read_text()
    finally:
        first.kill()
        first.wait(60)
    summary = _saved(store)
    assert summary is not None
    assert summary.status is RunStatus.INTERRUPTED
    assert (before[0] / "report.html").exists()
    assert "Traceback" not in log.read_text()
    assert f"esper train --resume {summary.run_id}" in log.read_text()


def _saved(store: Path) -> RunSummary | None:
    """The one run's summary, as soon as it names a checkpoint."""
    for path in store.glob("runs/*/summary.json"):
        summary = RunSummary.model_validate_json(path.read_text())
        if summary.last_checkpoint is not None:
            return summary
    return None
