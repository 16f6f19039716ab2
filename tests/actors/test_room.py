"""Workers for which Ray has no room: waited for in sight, given up on a wish, refused where nothing can change."""

from __future__ import annotations

import threading
import time

import pytest

from actors import room
from actors.cluster import connected
from esper.config import TolariaConfig
from esper.leyline import ConfigError, UnavailableError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cpus():
    """All CPUs of this Ray."""
    import ray

    with connected(dashboard=False):
        yield ray.cluster_resources()["CPU"]


@pytest.fixture
def taken(cpus):
    """Somebody who holds all CPUs; called, he leaves."""
    import ray
    from ray.util import placement_group, remove_placement_group

    held = placement_group([{"CPU": cpus}])
    assert ray.get(held.ready(), timeout=240) is not None
    deadline = time.monotonic() + 240
    while ray.available_resources().get("CPU", 0.0) > 0.0:  # it is told of a moment later
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield lambda: remove_placement_group(held)
    remove_placement_group(held)


@pytest.fixture(autouse=True)
def says_at_once(monkeypatch):
    monkeypatch.setattr(room, "_SAY_AFTER_S", 0.0)


def wait(workers, *, owned=False, stop=lambda: None, say=lambda words: None, **more):
    room.wait_for_room(workers, owned=owned, stop=stop, say=say, **more)


def workers(num_workers, cpus_per_worker):
    return TolariaConfig(num_workers=num_workers, cpus_per_worker=cpus_per_worker)


def test_where_there_is_room_nothing_stays_taken(cpus):
    for _ in range(3):  # the second would find no room if the first had kept it
        wait(workers(2, cpus / 2), owned=True)
    wait(TolariaConfig(num_workers=0))


def test_it_says_what_it_waits_for_and_goes_on_when_somebody_leaves(cpus, taken):
    said, spoke = [], threading.Event()

    def say(words):
        said.append(words)
        spoke.set()

    waiting = threading.Thread(target=wait, args=[workers(2, cpus / 2)], kwargs={"say": say})
    waiting.start()
    assert spoke.wait(240)
    assert waiting.is_alive()
    taken()
    waiting.join(240)
    assert not waiting.is_alive()
    assert said[0] == f"waiting for 2 workers of {cpus / 2:g} CPU each: of {cpus:g} CPU, 0 CPU free"


def test_a_wish_to_stop_ends_the_wait(cpus, taken):
    with pytest.raises(UnavailableError, match=r"interrupted by Ctrl-C while it waited for 1 worker of .* CPU each"):
        wait(workers(1, cpus), stop=lambda: "interrupted by Ctrl-C")


def test_a_ray_of_its_own_that_is_too_small_is_refused(cpus):
    with pytest.raises(ConfigError, match=rf"2 workers .* need {2 * cpus:g} CPU; this Ray has {cpus:g}") as refused:
        wait(workers(2, cpus), owned=True)
    assert refused.value.field == "tolaria.num_workers"
    assert refused.value.remedy == f"tolaria.num_workers=1, or tolaria.cpus_per_worker={cpus / 2:g}"


def test_a_ray_of_its_own_that_stays_full_is_refused_after_a_while(cpus, taken):
    with pytest.raises(ConfigError, match="has left, beside the platform, 0") as refused:
        wait(workers(1, 1.0), owned=True, patience_s=0.0)
    assert refused.value.remedy == "tolaria.num_workers=0 trains in the driver itself"
