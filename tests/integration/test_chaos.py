"""`kill -9` of a trainer in the middle of a graft, a checkpoint and a rollback, and a storage that fails for a while:
the run ends with the weights that it would have had, bit by bit.

In a process of its own and without Ray; what kills the other systems is in `tests/faults`. `make test` runs a few
fixed plans, `make soak` thirty random ones; it keeps its results below `ESPER_SOAK_DIR` (default: `.soak`), where it
goes on if it was stopped.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esper.storage import Storage
from esper.tolaria.checkpoint import Checkpoints

pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).parents[2]
NUM_PLANS, NUM_EPOCHS, STEPS_PER_EPOCH = 30, 8, 3
FIXED = {
    "graft": {"place": "grafting"},
    "checkpoint": {"place": "writing", "step": 4},
    "rollback": {"place": "rolling_back"},
    "outage": {"place": "step", "step": 7, "outage_s": 2.0},
}
PLACES = ("step", "grafting", "rolling_back", "writing", "checkpoint", "logged", "control", "outage")


def train(folder: Path, plan: dict[str, object]) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests/unit/tolaria")])
    return subprocess.run(
        [sys.executable, Path(__file__).with_name("chaos_trainer.py"), folder, json.dumps(plan)],
        env={**os.environ, "PYTHONPATH": path}, check=False, timeout=300, capture_output=True, text=True,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = Checkpoints(Storage.at(folder)).latest()
    assert found is not None
    assert found.epoch == NUM_EPOCHS - 1
    return found.state["session"]["module"]


def disturbed(folder: Path, plan: dict[str, object]) -> dict[str, torch.Tensor]:
    """The final weights of a run under a plan; it is resumed where it was killed."""
    done = train(folder, plan)
    assert folder.with_suffix(".fired").exists(), done.stderr
    if "outage_s" not in plan:
        assert done.returncode == -9, done.stderr
        done = train(folder, plan)
    assert done.returncode == 0, done.stderr
    return weights(folder)


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in one.keys() | other.keys() if name not in one or name not in other
            or not torch.equal(one[name], other[name])]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = train(folder, {})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"rollbacks": 1, "resumed": False}
    return weights(folder)


@pytest.mark.parametrize("name", FIXED)
def test_a_disturbed_run_ends_with_the_same_weights(undisturbed, tmp_path, name):
    assert differences(disturbed(tmp_path / "run", FIXED[name]), undisturbed) == []


def drawn(number: int) -> dict[str, object]:
    """A random plan, the same for the same number; every place comes in turn."""
    draw, place = random.Random(number), PLACES[number % len(PLACES)]
    if place in ("grafting", "rolling_back"):
        return {"place": place}
    step = draw.randrange(NUM_EPOCHS * STEPS_PER_EPOCH if place in ("step", "outage") else NUM_EPOCHS)
    return {"place": "step", "step": step, "outage_s": 10.0} if place == "outage" else {"place": place, "step": step}


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
def test_thirty_random_plans(undisturbed, tmp_path, capsys):
    folder = Path(os.environ.get("ESPER_SOAK_DIR", ".soak")).resolve() / "chaos"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PLANS):
        done = folder / f"plan-{number:02d}.json"
        if done.exists():
            continue
        plan = drawn(number)
        unequal = differences(disturbed(tmp_path / f"run-{number}", plan), undisturbed)
        with capsys.disabled():
            sys.stdout.write(f"{number}: {plan}: {unequal or 'bit-equal'}\n")
            sys.stdout.flush()
        assert unequal == [], plan
        done.write_text(json.dumps(plan))
    assert len(list(folder.glob("plan-*.json"))) == NUM_PLANS
