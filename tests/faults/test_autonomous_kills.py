"""A run that listens, and whose watcher is killed amid it."""

from __future__ import annotations

import time
from contextlib import suppress

import fault_support as support
import pytest
import ray
from fault_support import KillActors
from ray.exceptions import RayActorError

from actors import autonomous, platform
from actors.cluster import NAMESPACE
from esper.leyline import RunStatus
from esper.storage import Storage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

LISTENS = {
    "deterministic": False,
    "tamiyo__control": "listen",
    # longer than `tamiyo.deadline_s`: however long the watcher takes to come again, each epoch hears its command, or is
    # decided about by the run's own fallback. One that only waits is an epoch less for growth
    "tamiyo__listen_s": 30.0,
    "tolaria__epochs": support.SLOW_EPOCHS,
}


def pid_of(name):
    watcher = ray.get_actor(name, namespace=NAMESPACE)
    return ray.get(watcher.about.remote(), timeout=60)["pid"]


def pid_now(name):
    """None while it comes again."""
    with suppress(RayActorError):
        return pid_of(name)


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
    deadline = time.monotonic() + 120
    while pid_now(name) in {pid, None}:
        assert time.monotonic() < deadline, "it did not come again"
        time.sleep(0.5)
    platform.down(str(store))
