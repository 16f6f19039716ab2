"""Stored policies behind Ray Serve: loaded while it answers, tried in shadow, refused where they are damaged."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import pytest
import ray
import safetensors.numpy
from test_tamiyo_serve import CONFIG, packet

from actors import oona, tamiyo
from actors.cluster import connected
from actors.deciding import Tamiyo
from esper.config import CanaryConfig, GnnConfig, OonaConfig
from esper.leyline import AdaptationSignal, CanaryVerdict, PolicyCard, PolicyChange, TamperedError, Topic
from esper.storage import Storage
from esper.tamiyo import initial_state, step
from esper.tamiyo.http import DecisionRequest
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.urza.policies import StoredPolicies, _sealed

pytestmark = pytest.mark.ray

WEIGHTS = safetensors.numpy.save({})
CANARY = CanaryConfig(decisions=10, actions=0, require_value=False)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage.at(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def store(storage):
    return StoredPolicies(storage)


def put(store, name, kind, **shape):
    """A policy that is a set of settings: its kind decides."""
    return store.put(PolicyCard.of(WEIGHTS, name=name, kind=kind, shape=shape, observation_version=1), WEIGHTS)


@pytest.fixture(scope="module")
def bus(storage):
    with connected(dashboard=False):
        handle = oona.spawn(OonaConfig(), storage.local / "oona", prefix=oona.prefix_of(storage))
        bus = handle.bus()
        yield bus
        bus.close()
        handle.stop()


@pytest.fixture(scope="module")
def events(bus):
    subscription = bus.listen([Topic.POLICIES], from_start=True)
    told = []

    def wait_for(change, version):
        deadline = time.monotonic() + 240
        while (change, version) not in [(event.change, event.version) for event in told]:
            assert time.monotonic() < deadline, told
            deliveries = subscription.poll(timeout_s=1.0)
            told.extend(delivery.message.body() for delivery in deliveries)
            subscription.ack(deliveries)
        return next(event for event in told if (event.change, event.version) == (change, version))

    yield wait_for
    subscription.close()


@pytest.fixture(scope="module")
def desk(bus, storage):
    tamiyo.deploy(timeout_s=240.0, canary=CANARY, poll_s=0.2)
    desk = tamiyo.HttpDesk(storage, timeout_s=240.0)
    desk.policies()  # it follows the storages that it was asked about
    yield desk
    tamiyo.undeploy(timeout_s=240.0, stop_serve=True)


def ask(desk, version="promoted"):
    """The name of the policy that decided."""
    request = DecisionRequest(packet=packet(0), config=CONFIG, version=version)
    return desk.decide(request).signal.policy


def test_the_life_of_policies_without_a_dropped_request(desk, store, storage, events):
    """Promoted, hot reloaded, nominated and promoted by what it shows, while requests come."""
    first, second, third = put(store, "a", "heuristic"), put(store, "b", "schedule"), put(store, "c", "none")
    store.promote(first)
    events(PolicyChange.LOADED, first)
    assert ask(desk) == "heuristic"
    answers, failures, over = [], [], threading.Event()

    def keep_asking():
        while not over.is_set():
            try:
                answers.append((time.monotonic(), ask(desk)))
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failures.append(error)

    asker = threading.Thread(target=keep_asking)
    asker.start()
    try:
        pid = desk._asking.ask(lambda handle: handle.about.remote(), 240.0)["pid"]
        _until(lambda: answers)  # the first is of the first policy
        store.promote(second)
        assert events(PolicyChange.LOADED, second).before == first
        _until(lambda: answers[-1][1] == "schedule")
        # in shadow: both wait, so they agree
        store.nominate(third)
        passed = events(PolicyChange.PASSED, third)
        assert (passed.before, passed.canary.num_decisions, passed.canary.num_agreed) == (second, 10, 10)
        _until(lambda: answers[-1][1] == "none")
        assert store.promoted() == third
        assert desk._asking.ask(lambda handle: handle.about.remote(), 240.0)["pid"] == pid  # one replica, all the time
    finally:
        over.set()
        asker.join(400)
    assert failures == []
    names = [name for _, name in answers]
    assert [name for name, _ in itertools.groupby(names)] == ["heuristic", "schedule", "none"]
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(answers)]
    assert max(gaps) < 5.0, max(gaps)  # serve.run's own replacement stalls for more


@pytest.mark.parametrize("damage", ["card.json", "weights.safetensors", "note"])
def test_a_corrupt_policy_is_refused_and_the_one_before_decides(desk, store, storage, events, damage):
    good = put(store, "good", "random", warmup_epochs=len(damage))
    store.promote(good)
    events(PolicyChange.LOADED, good)
    bad = put(store, "worse", "none", warmup_epochs=len(damage))
    note = _sealed({"version": bad})
    if damage == "note":
        note = note.replace(bad.encode(), good[::-1].encode())  # by hand, without its digest
    else:
        name = f"policies/{bad}/{damage}"
        storage.write(name, storage.read(name)[:-3])
        with pytest.raises(TamperedError):
            store.promote(bad)  # the store refuses; somebody who writes the note himself is found out too
    storage.write("policies/promoted", note)
    refused = events(PolicyChange.REFUSED, "" if damage == "note" else bad)
    assert (refused.before, bool(refused.reason)) == (good, True)
    assert ask(desk) == "random"
    shelf = desk.policies()
    assert (shelf.live, ("promoted" if damage == "note" else bad) in shelf.refused) == (good, True)
    store.promote(good)


@pytest.mark.parametrize("prefix", ["SERVE_REPLICA::tamiyo#", "SERVE_CONTROLLER_ACTOR"])
def test_a_replica_and_a_controller_that_were_killed_are_an_event(desk, bus, prefix):
    """Callers notice neither: who else should say it?"""
    subscription = bus.listen([Topic.POLICIES])
    desk.policies()
    deadline = time.monotonic() + 240
    while desk._asking.ask(lambda handle: handle.about.remote(), 240.0)["serve_controller"] is None:
        assert time.monotonic() < deadline  # who never saw the one before cannot tell that there is another
        time.sleep(0.1)
    victims = [row["name"] for row in ray.util.list_named_actors(all_namespaces=True) if row["name"].startswith(prefix)]
    for name in victims:
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=False)
    assert victims
    word = "decides for this storage" if "REPLICA" in prefix else "took over"
    deadline, told = time.monotonic() + 240, []
    while not any(event.change is PolicyChange.SERVING and word in event.reason for event in told):
        assert time.monotonic() < deadline, told
        desk.policies()  # it follows the storages that it was asked about
        deliveries = subscription.poll(timeout_s=0.5)
        told.extend(delivery.message.body() for delivery in deliveries)
        subscription.ack(deliveries)
    subscription.close()


def test_people_see_which_policy_decides_and_how_the_new_one_stands(desk, store, events):
    live, new = put(store, "live", "random", warmup_epochs=1), put(store, "new", "none", warmup_epochs=1)
    store.promote(live)
    events(PolicyChange.LOADED, live)
    store.nominate(new)
    events(PolicyChange.CANARY, new)
    ask(desk)
    shelf = desk.policies()
    assert (shelf.live, shelf.canary.version, shelf.canary.beside) == (live, new, live)
    assert shelf.canary.verdict is CanaryVerdict.RUNNING
    assert {card.name for card in shelf.policies} >= {"live", "new"}
    store.nominate(None)


def test_many_callers_at_once_each_get_their_own_answer(desk):
    answers = {}
    local = {seed: step(initial_state(CONFIG, seed), packet(0), CONFIG) for seed in range(40)}

    def one(seed):
        request = DecisionRequest(packet=packet(0), config=CONFIG, seed=seed)
        decision = desk.decide(request)
        answers[seed] = (decision.state, decision.signal)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in local]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    assert answers == local


def test_a_replica_answers_more_callers_than_a_few_together():
    """In this process: all ask before the loop hears of the first answer, which over Serve hangs on the machine."""
    replica = Tamiyo(poll_s=60.0)

    async def ask_all():
        initial = initial_state(CONFIG, 0)
        asked = (replica.decide(initial, packet(0).model_dump_json(), CONFIG.model_dump_json()) for _ in range(40))
        return await asyncio.gather(*asked)

    state, signal = step(initial_state(CONFIG, 0), packet(0), CONFIG)
    try:
        answers = asyncio.run(ask_all())
    finally:
        replica.close()
    assert [(after, AdaptationSignal.model_validate_json(json)) for after, json in answers] == [(state, signal)] * 40
    about = replica.about()
    assert (about["decisions"], about["batches"], about["largest_batch"]) == (40, 2, 39)


@pytest.fixture(scope="module")
def learned(store):
    """A small network, stored; the configuration that names it."""
    from esper.tamiyo.net import NetShape, PolicyNet

    shape = NetShape(hidden=16, members=2)
    weights = PolicyNet(shape).to_bytes()
    card = PolicyCard.of(weights, name="net", shape=shape.model_dump(), observation_version=OBSERVATION_VERSION)
    return CONFIG.model_copy(update={"policy": "gnn", "gnn": GnnConfig(version=store.put(card, weights))})


def test_a_learned_policy_decides_through_the_handle_as_it_does_here(desk, store, storage, learned):
    controller = tamiyo.ServeController(learned, seed=3, storage=storage)
    remote = local = initial_state(learned, 3)
    for epoch in range(4):
        local, expected = step(local, packet(epoch), learned, store.get)
        remote, decided = controller.decide(remote, packet(epoch))
        assert decided.explanation is not None
        assert (decided.commands, decided.vetoes, decided.policy) == (expected.commands, expected.vetoes, "gnn")
        assert decided.value == pytest.approx(expected.value, abs=1e-4)
    assert remote == local


def test_a_learned_policy_answers_many_at_once_as_one_by_one(desk, storage, learned):
    controller, answers = tamiyo.ServeController(learned, seed=3, storage=storage), []
    alone = controller.decide({}, packet(0))[1]
    threads = [threading.Thread(target=lambda: answers.append(controller.decide({}, packet(0))[1])) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    assert [(one.commands, one.vetoes) for one in answers] == [(alone.commands, alone.vetoes)] * 24


def test_a_question_of_several_megabytes_is_answered(desk):
    words = "x" * (6 << 20)
    decision = desk.decide(DecisionRequest(packet=packet(0).model_copy(update={"missing": (words,)}), config=CONFIG))
    assert decision.signal.commands == ()


def _until(condition, timeout_s=240.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
