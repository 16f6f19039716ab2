"""Trainings in processes of their own, killed by SIGKILL and begun again: what was learned and what was logged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from small_training import EPOCHS

from esper.leyline import SeedStage
from esper.simic.experience import Experience
from esper.storage import Storage
from esper.urza.policies import StoredPolicies

ROOT = Path(__file__).parents[2]
QUICK = ("tolaria.epochs=4", "tolaria.batch_size=256", "tezzeret.blueprints=[mlp_adapter]")


def test_a_killed_process_goes_on_where_it_was(tmp_path):
    """`python -m jobs.train_tamiyo`, killed by SIGKILL in its second update, then begun again."""
    settings = [
        f"storage={tmp_path}",
        "iterations=2",
        "warm_up=1",
        "judged=0",
        "imitation.epochs=1",
        "rollout.episodes=1",
        "overrides=[" + ", ".join(f'"{text}"' for text in QUICK) + "]",
    ]
    command = [sys.executable, "-m", "jobs.train_tamiyo", "--here", "--config", "configs/tamiyo_ppo.yaml", *settings]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("update 1:"):
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert StoredPolicies(Storage.at(tmp_path)).ls() == []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "going on after update" in done.stdout
    (card,) = StoredPolicies(Storage.at(tmp_path)).ls()
    assert f"policy {card.version}" in done.stdout


def train(storage, kill_at):
    command = [sys.executable, str(ROOT / "tests/integration/small_training.py"), str(storage), str(kill_at)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(storage)}
    return subprocess.run(
        command, cwd=storage, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_killed_training_loses_at_most_what_was_open_and_goes_on(tmp_path):
    """A real process, killed by SIGKILL after the decision of its sixth epoch."""
    done = train(tmp_path, 5)
    assert done.returncode == -signal.SIGKILL, done.stderr
    storage = Storage.at(tmp_path)
    (cut,) = Experience(storage).episodes(only_whole=False)
    assert not cut.is_over
    assert 2 <= len(cut.moments) <= 5  # of six decisions; one was open, two may have been on their way
    assert [moment.epoch for moment in cut.moments] == list(range(len(cut.moments)))
    done = train(tmp_path, -1)
    assert done.returncode == 0, done.stderr
    (whole,) = Experience(storage).episodes()
    assert whole.moments[: len(cut.moments)] == cut.moments
    epochs = [moment.epoch for moment in whole.moments]
    assert epochs == sorted(set(epochs))
    assert 5 in epochs  # decided by the first process, carried out by the second from the log of commands
    assert epochs[-1] == EPOCHS - 1
    stages = {seed.stage for moment in whole.moments for layer in moment.packet.layers for seed in layer.seeds}
    assert SeedStage.TRAINING in stages  # it did grow
