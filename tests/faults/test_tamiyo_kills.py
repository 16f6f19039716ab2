"""Killing Serve's replica, its controller, or both never stops or harms a run: it grows as ever."""

from __future__ import annotations

import math

import fault_support as support
import pytest
from fault_support import KillActors

from esper.leyline import PolicyCard, RunHistory, RunStatus
from esper.storage import Storage
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.urza.policies import StoredPolicies

pytestmark = [
    pytest.mark.ray,
    # Ray's own, as Serve and Train are imported
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

REPLICA, CONTROLLER = "SERVE_REPLICA::tamiyo#", "SERVE_CONTROLLER_ACTOR"


@pytest.mark.parametrize(
    "names", [[REPLICA], [CONTROLLER], [CONTROLLER, REPLICA]], ids=["replica", "controller", "both"]
)
def test_a_run_whose_serve_is_killed_grows_as_ever(train, shared, tmp_path, names):
    faults = KillActors("step", support.IN_TRAINING, tmp_path / "fired", names, "serve")
    run_id = f"without-{len(names)}-{names[0][6:10].lower()}"
    settings = {"deterministic": False, "tamiyo__deadline_s": 2.0, "tolaria__epochs": support.SLOW_EPOCHS}
    result = train(shared, run_id, faults, **settings)
    assert len(faults.marker.read_text().split()) == len(names)
    summary = result.summary
    assert summary.status is RunStatus.FINISHED
    assert math.isfinite(summary.metrics.val_loss)
    # Tamiyo is back in time, or the trainer decides by the same schedule, and says so
    assert support.stages(summary) == support.STAGES
    assert all(words.startswith("Tamiyo: ") for words in summary.went_without)
    assert all(words.endswith("; the trainer decides itself meanwhile") for words in summary.went_without)
    assert summary.rollbacks == ()


def test_a_run_whose_policy_is_corrupt_goes_on_by_the_heuristic_and_says_so(train, shared):
    storage = Storage.at(shared)
    shape = NetShape(hidden=16, members=2)
    weights = PolicyNet(shape).to_bytes()
    card = PolicyCard.of(weights, name="net", shape=shape.model_dump(), observation_version=OBSERVATION_VERSION)
    version = StoredPolicies(storage).put(card, weights)
    settings = {
        "deterministic": False,
        "tamiyo__policy": "gnn",
        "tamiyo__gnn__version": version,
        "tamiyo__deadline_s": 60.0,  # a slow answer is not what is looked for
    }
    name = f"policies/{version}/weights.safetensors"
    storage.write(name, weights[:-1])
    summary = train(shared, "corrupt", **settings).summary
    assert summary.status is RunStatus.FINISHED
    [words] = summary.went_without
    assert words.startswith("Tamiyo: it failed: the weights of the policy")
    history = RunHistory.model_validate_json(storage.read("runs/corrupt/history.json"))
    assert all(
        words.startswith("without Tamiyo, decided by the trainer's own heuristic") for _, words in history.decisions
    )
    storage.write(name, weights)  # mended: the next run decides by it
    summary = train(shared, "mended", **settings).summary
    assert (summary.status, summary.went_without) == (RunStatus.FINISHED, ())
    history = RunHistory.model_validate_json(storage.read("runs/mended/history.json"))
    assert any(f"policy {version[:8]} chose" in words for _, words in history.decisions)
