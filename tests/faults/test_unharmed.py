"""Outside deterministic mode a run whose systems die goes on without them, ends unharmed, and says so."""

from __future__ import annotations

import math

import fault_support as support
import pytest
from fault_support import KillActors

from esper.leyline import RunStatus

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,
    # Ray's own, as Serve and Train are imported
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


@pytest.mark.parametrize("system", ["tamiyo", "urza", "oona", "nissa"])
def test_a_run_outlives_a_killed_system(train, shared, key, tmp_path, system):
    name, namespace = ("SERVE_REPLICA::tamiyo#", "serve") if system == "tamiyo" else (f"{system}-{key}", "esper")
    faults = KillActors("step", support.IN_TRAINING, tmp_path / "fired", [name], namespace)
    result = train(shared, f"without-{system}", faults, deterministic=False, tamiyo__deadline_s=2.0)
    assert faults.marker.read_text()
    summary = result.summary
    assert summary.status is RunStatus.FINISHED
    assert math.isfinite(summary.metrics.val_loss)
    # either the system was back in time, and growth went on as ever, or the summary says what was missing
    assert support.stages(summary) == support.STAGES or summary.went_without
    systems = {"tamiyo", "urza", "oona", "tezzeret", "nissa"}
    assert all(words.split(":")[0].lower() in systems for words in summary.went_without)
