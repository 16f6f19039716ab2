"""Ctrl-C and SIGTERM, as a terminal and `ray job stop` send them: the run ends by itself, and can be gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ray_head import wait_for

from esper.leyline import RunHistory, RunStatus, RunSummary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
ESPER = Path(sys.executable).parent / "esper"
NUM_EPOCHS = 60
PATIENCE_S = 240.0


class Driver:
    """An `esper train` in a process group of its own, as a terminal starts it."""

    def __init__(self, storage, *arguments):
        self.storage = storage
        self.output = storage / f"output-{len(list(storage.glob('output-*')))}"
        command = [ESPER, "train", *arguments]
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def folder(self):
        (folder,) = (self.storage / "runs").iterdir()
        return folder

    @property
    def summary(self):
        return RunSummary.model_validate_json((self.folder / "summary.json").read_text())

    @property
    def num_epochs(self):
        """Epochs that the run has behind it, from its history."""
        path = next(self.storage.glob("runs/*/history.json"), None)
        return 0 if path is None else len(RunHistory.model_validate_json(path.read_text()).epochs)

    def wait_for_epochs(self, number):
        def there():
            assert self.process.poll() is None, self.output.read_text()
            return self.num_epochs >= number

        wait_for(there, f"epoch {number}", timeout_s=PATIENCE_S)

    def end(self):
        """Waits until the process has ended by itself; returns its exit code."""
        return self.process.wait(PATIENCE_S)

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def start(tmp_path):
    drivers = []

    def begin(*arguments):
        drivers.append(Driver(tmp_path, *arguments))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.close()


def check_interrupted(driver, *, reason):
    """What an interrupted run leaves: the summary so far, and a checkpoint that exists."""
    output = driver.output.read_text()
    assert driver.end() == 130, output
    assert "Traceback" not in output
    assert f"esper train --resume {driver.folder.name}" in output
    summary = driver.summary
    assert summary.status is RunStatus.INTERRUPTED, reason
    assert 0 < driver.num_epochs < NUM_EPOCHS
    assert (driver.folder / summary.last_checkpoint).exists()
    assert (driver.folder / "report.html").exists()
    return driver.num_epochs


def test_a_run_is_interrupted_twice_and_finished(start, tmp_path):
    settings = [
        f"storage={tmp_path}", f"tezzeret.key_file={tmp_path}/key.pem", f"tolaria.epochs={NUM_EPOCHS}",
        "tezzeret.optimize=never",  # a C++ compiler beside each of the three would take half of the machine
    ]  # fmt: skip
    first = start("configs/digits.yaml", *settings)
    first.wait_for_epochs(3)
    os.killpg(first.process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches every process of the group
    first.end()
    done = check_interrupted(first, reason="Ctrl-C")

    resume = ("--resume", first.folder.name, "--storage", str(tmp_path))
    second = start(*resume)
    second.wait_for_epochs(done + 3)
    second.process.send_signal(signal.SIGTERM)
    second.end()
    assert check_interrupted(second, reason="SIGTERM") >= done + 3

    third = start(*resume)
    assert third.end() == 0, third.output.read_text()
    history = RunHistory.model_validate_json((third.folder / "history.json").read_text())
    assert [record.epoch for record in history.epochs] == list(range(NUM_EPOCHS))
    assert third.summary.status is RunStatus.FINISHED
