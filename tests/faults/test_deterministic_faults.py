"""With `deterministic: true`, `kill -9` of anything ends in the same weights, bit for bit, as if nothing had happened.

One undisturbed run in a storage of its own is what all others are compared with.
"""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import fault_support as support
import pytest
import ray
from fault_support import KillActors, KillSelf, WriteHashes

from actors.cluster import NAMESPACE
from esper.leyline import NoFaults, RunStatus
from esper.nissa import table

pytestmark = [
    pytest.mark.ray,
    # Ray's own, as Serve and Train are imported
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


def test_a_driver_killed_in_the_middle_of_growth_resumes_to_the_same_weights(train, undisturbed, tmp_path):
    """All of its Ray dies with it; the run is taken up on another."""
    faults = KillSelf("step", support.IN_GRAFTING, tmp_path / "fired")
    storage = tmp_path / "store"
    killed = support.drive(tmp_path, support.config(storage), "killed", faults)
    assert faults.marker.exists(), killed.stderr
    assert killed.returncode == -9, killed.stderr
    resumed = train(storage, "killed", resume=True)
    assert resumed.summary.status is RunStatus.FINISHED
    assert support.differences(support.final_weights(resumed.directory), undisturbed) == []


@pytest.mark.soak
def test_a_killed_train_worker_is_replaced_and_ends_with_the_same_weights(train, undisturbed, shared, tmp_path):
    faults = KillSelf("step", support.IN_GRAFTING, tmp_path / "fired")
    result = train(shared, "worker", faults, tolaria__num_workers=1)
    assert faults.marker.exists()
    assert result.summary.status is RunStatus.FINISHED
    assert support.stages(result.summary) == support.STAGES
    assert support.differences(support.final_weights(result.directory), undisturbed) == []


@pytest.mark.parametrize(
    ("system", "step"),
    [
        ("urza", support.IN_TRAINING),
        pytest.param("urza", 2, marks=pytest.mark.soak),
        pytest.param("oona", support.IN_TRAINING, marks=pytest.mark.soak),
        pytest.param("oona", 2, marks=pytest.mark.soak),
    ],
)
def test_a_killed_system_is_waited_for(train, undisturbed, shared, key, tmp_path, system, step):
    faults = KillActors("step", step, tmp_path / "fired", [f"{system}-{key}"])
    result = train(shared, f"{system}-{step}", faults)
    assert faults.marker.read_text()
    assert support.differences(support.final_weights(result.directory), undisturbed) == []
    assert result.summary.went_without == ()


@dataclass(frozen=True)
class EndNissa:
    """Ends Nissa for good, from within the trainer, once the view has shown the run."""

    name: str
    marker: Path

    def at(self, place: str, step: int) -> None:
        if (place, step) == ("step", support.IN_TRAINING) and support.first_at(self.marker):
            deadline = time.monotonic() + 120
            while "run without-nissa: " not in sys.stdout.getvalue():
                assert time.monotonic() < deadline, "no view"
                time.sleep(0.05)
            ray.kill(ray.get_actor(self.name, namespace=NAMESPACE), no_restart=True)


def test_without_nissa_training_goes_on_to_the_same_weights_and_says_so_once(
    train, undisturbed, shared, key, tmp_path, monkeypatch
):
    faults = EndNissa(f"nissa-{key}", tmp_path / "fired")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    result = train(shared, "without-nissa", faults, nissa__view="plain")
    said = sys.stdout.getvalue()
    assert faults.marker.exists()
    assert result.summary.status is RunStatus.FINISHED
    assert support.differences(support.final_weights(result.directory), undisturbed) == []
    assert said.count("the view has no answer from Nissa; training goes on without it") == 1
    [words] = result.summary.went_without
    assert words.startswith("Nissa: its last picture may lack what came last")
    assert "went without Nissa: its last picture" in " ".join(table(result.summary).split())


@pytest.mark.soak
@pytest.mark.parametrize("step", [2, support.IN_TRAINING])
def test_a_killed_tamiyo_is_waited_for(train, undisturbed, shared, tmp_path, step):
    faults = KillActors("step", step, tmp_path / "fired", ["SERVE_REPLICA::tamiyo#"], namespace="serve")
    result = train(shared, f"tamiyo-{step}", faults)
    assert faults.marker.read_text()
    assert support.differences(support.final_weights(result.directory), undisturbed) == []
    assert result.summary.went_without == ()


@pytest.mark.soak
def test_a_compiler_killed_at_its_work_is_waited_for(train, undisturbed, tmp_path):
    faults = KillActors("step", 0, tmp_path / "fired", ["tezzeret-"])
    result = train(tmp_path / "fresh", "compiler", faults)
    assert faults.marker.read_text()
    assert support.differences(support.final_weights(result.directory), undisturbed) == []


@pytest.mark.soak
@pytest.mark.parametrize("seam", ["checkpoint", "logged", "control"])
def test_a_worker_killed_at_a_seam_of_the_boundary(train, undisturbed, shared, tmp_path, seam):
    """Between checkpoint and decision, between decision and its being applied, and after that."""
    faults = KillSelf(seam, 2, tmp_path / "fired")
    result = train(shared, f"seam-{seam}", faults, tolaria__num_workers=1)
    assert faults.marker.exists()
    assert support.stages(result.summary) == support.STAGES
    assert support.differences(support.final_weights(result.directory), undisturbed) == []


@pytest.fixture(scope="module")
def pair(train, shared, tmp_path_factory):
    """A run of two workers that nobody disturbs, and the folder in which each wrote the hashes of its parameters."""
    folder = tmp_path_factory.mktemp("pair")
    return train(shared, "pair", WriteHashes(folder, NoFaults()), tolaria__num_workers=2), folder


def test_two_workers_graft_at_the_same_step_and_stay_equal(pair, quiet):
    result, folder = pair
    assert support.stages(result.summary) == support.STAGES
    first, second = ((folder / f"rank-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert len(first) == support.NUM_EPOCHS * support.STEPS_PER_EPOCH
    assert len({line.split()[1] for line in first}) == 2  # the kernel's parameters came, on both at once
    # each saw half of every batch; the account is that of both
    assert result.summary.ledger.flops.host == quiet.summary.ledger.flops.host


def test_one_of_two_workers_killed_is_replaced_by_ray_train_and_both_go_on_from_the_checkpoint(
    train, pair, shared, tmp_path
):
    faults = KillSelf("step", support.IN_FINE_TUNING, tmp_path / "fired", rank=1)
    killed = train(shared, "pair-killed", faults, tolaria__num_workers=2)
    assert faults.marker.exists()
    assert killed.summary.status is RunStatus.FINISHED
    assert support.stages(killed.summary) == support.STAGES
    weights = [support.final_weights(result.directory) for result in (pair[0], killed)]
    assert support.differences(*weights) == []
