"""A run that listens, and whose watcher is killed amid it."""

from __future__ import annotations

import time

import fault_support as support
import pytest
import ray
from fault_support import KillActors

from actors import autonomous, platform
from actors.cluster import NAMESPACE
from esper.leyline import RunStatus
from esper.storage import Storage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

LISTENS = {"deterministic": False, "tamiyo__control": "listen", "tamiyo__listen_s": 2.0}


def pid_of(name):
    watcher = ray.get_actor(name, namespace=NAMESPACE)
    return ray.get(watcher.about.remote(), timeout=60)["pid"]


def test_a_run_whose_watcher_is_killed_goes_on_and_is_told_again(train, tmp_path):
    store = tmp_path / "watched"
    name = autonomous.name_of(Storage.at(store))
    platform.up(support.config(store, **LISTENS), detached=True, wait_for_serve=False)
    pid = pid_of(name)
    faults = KillActors("step", support.IN_TRAINING, tmp_path / "fired", [name])
    result = train(store, "killed", faults, **LISTENS)
    assert faults.marker.read_text() == str(pid)
    assert result.summary.status is RunStatus.FINISHED
    assert support.stages(result.summary) == support.STAGES  # told again in time, or its own fallback's
    for _ in range(60):
        if pid_of(name) != pid:
            break
        time.sleep(0.5)
    assert pid_of(name) != pid
    platform.down(str(store))
