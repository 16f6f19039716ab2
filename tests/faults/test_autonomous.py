"""AutonomousTamiyo: two runs at once that ask nobody and grow by what they are told; what it must not be harmed by."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import fault_support as support
import pytest
import ray

from actors import autonomous, oona, platform
from actors.cluster import NAMESPACE
from esper.leyline import NoFaults, OonaMessage, RunHistory, RunStatus, RunSummary, Topic
from esper.storage import Storage

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

LISTENS = {
    "deterministic": False,
    "tamiyo__control": "listen",
    "tamiyo__listen_s": 60.0,  # nobody is in the watcher's way: however slow it is, each epoch hears its own command
    "tolaria__epochs": support.SLOW_EPOCHS,
}


@pytest.fixture(scope="module")
def store(cluster, tmp_path_factory):
    path = tmp_path_factory.mktemp("watched")
    yield path
    platform.down(str(path))


@pytest.fixture(scope="module")
def storage(store):
    return Storage.at(store)


def watcher(storage):
    return ray.get_actor(autonomous.name_of(storage), namespace=NAMESPACE)


def about(storage):
    return ray.get(watcher(storage).about.remote(), timeout=60)


def num_expected(seen):
    """Commands for two runs: one an epoch that was asked about to the end."""
    return 2 * support.SLOW_EPOCHS - seen["overtaken"] - seen["incomplete"]


@pytest.fixture(scope="module")
def runs(store, storage, tmp_path_factory):
    """Two runs at once, each with a driver of its own, on one Ray and one platform; their summaries, and what the
    watcher told of itself when they had ended.
    """
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    platform.up(support.config(store, **LISTENS), detached=True, wait_for_serve=False)
    # at once: what a run tells before, the watcher never hears
    assert ray.get(watcher(storage).wait.remote(0.0), timeout=60)

    def one(run_id):
        folder = tmp_path_factory.mktemp(run_id)
        return support.drive(folder, support.config(store, **LISTENS), run_id, NoFaults(), **address)

    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(one, ("first", "second")))
    for driver in ended:
        assert driver.returncode == 0, driver.stderr[-3000:]
    summaries = [storage.read(f"runs/{name}/summary.json") for name in ("first", "second")]
    deadline = time.monotonic() + 120
    # what a run ended without hearing is told all the same
    while (seen := about(storage))["told"] < num_expected(seen):
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    return [RunSummary.model_validate_json(summary) for summary in summaries], seen


def test_two_runs_at_once_grow_by_what_they_are_told(runs):
    summaries, seen = runs
    for summary in summaries:
        assert (summary.status, summary.went_without) == (RunStatus.FINISHED, ())
        assert support.stages(summary) == support.STAGES
    assert seen["told"] >= num_expected(seen) > 0
    assert (seen["refused"], seen["strange"], seen["unread"], seen["failed"]) == (0, 0, 0, 0)


def test_each_heard_its_own_commands_and_says_when(runs, storage):
    for name, summary in zip(("first", "second"), runs[0], strict=True):
        assert {event.run_id for event in summary.events} == {name}
        history = RunHistory.model_validate_json(storage.read(f"runs/{name}/history.json"))
        assert any("germinating" in words for _, words in history.decisions)


def test_health_that_is_no_number_and_states_that_are_none_go_to_the_dead_letters(runs, storage):
    bus = oona.connect(oona.prefix_of(storage)).bus()
    dead = bus.listen([Topic.DEAD_LETTERS])
    try:
        page = bus.read([Topic.SEED_HEALTH], key="first")
        good = page.deliveries[0].message
        payload = {**good.payload, "seeds": [{**good.payload["seeds"][0], "grow_potential": "NaN"}]}
        before = about(storage)
        bad = OonaMessage(sender_id="t", trace_id="t", topic=Topic.SEED_HEALTH, key="poison", payload=payload)
        stale = good.model_copy(update={"event_id": "again"})
        bus.publish([bad, stale])
        bus.flush()
        letters, deadline = [], time.monotonic() + 60
        while not letters:
            assert time.monotonic() < deadline, about(storage)
            letters = dead.poll(timeout_s=1.0)
        while (after := about(storage))["stale"] == before["stale"]:
            assert time.monotonic() < deadline, after
            time.sleep(0.1)
        assert after["refused"] == before["refused"] + 1
        assert letters[0].message.payload["group"] == autonomous.GROUP
        assert after["pid"] == before["pid"]
    finally:
        dead.close()
        bus.close()
