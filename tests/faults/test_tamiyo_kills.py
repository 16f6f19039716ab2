"""Killing Serve's replica, its controller, or both never stops or harms a run: it grows as ever."""

from __future__ import annotations

import math

import fault_support as support
import pytest
from fault_support import KillActors

from esper.leyline import RunStatus

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
    result = train(shared, run_id, faults, deterministic=False, tamiyo__deadline_s=2.0)
    assert len(faults.marker.read_text().split()) == len(names)
    summary = result.summary
    assert summary.status is RunStatus.FINISHED
    assert math.isfinite(summary.metrics.val_loss)
    # Tamiyo is back in time, or the trainer decides by the same schedule, and says so
    assert support.stages(summary) == support.STAGES
    assert all(words.startswith("Tamiyo: ") for words in summary.went_without)
    assert all(words.endswith("; the trainer decides itself meanwhile") for words in summary.went_without)
    assert summary.rollbacks == ()
