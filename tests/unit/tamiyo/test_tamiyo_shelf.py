"""Policies that a server holds: new ones come without a pause, in shadow first, and damaged ones change nothing."""

from __future__ import annotations

import math
import threading

import pytest
import safetensors.numpy
from tamiyo_story import packet

from esper.config import CanaryConfig, TamiyoConfig
from esper.leyline import (
    Action,
    CanaryRecord,
    CanaryVerdict,
    KasminaControlCommand,
    NotFoundError,
    PermanentError,
    PolicyCard,
    PolicyChange,
    StorageError,
    TamperedError,
)
from esper.storage import Storage
from esper.tamiyo import initial_state
from esper.tamiyo.canary import compare, judge
from esper.tamiyo.deciders import Decided, Question, Steps, load_policy
from esper.tamiyo.shelf import Shelf
from esper.urza.policies import MemoryPolicies, StoredPolicies

CONFIG = TamiyoConfig(policy="heuristic")
CANARY = CanaryConfig(decisions=4, min_agreement=0.75, actions=0)
WEIGHTS = safetensors.numpy.save({})


def put(store, name="waits", kind="none", **shape):
    card = PolicyCard.of(WEIGHTS, name=name, kind=kind, shape=shape, observation_version=1)
    return store.put(card, WEIGHTS)


class Scripted:
    """A policy that germinates or waits as it is told, and predicts a value."""

    def __init__(self, card, _weights=b""):
        self.acts, self.value = card.shape.get("acts", False), card.shape.get("value")
        self.site = card.shape.get("site", "a")
        self.breaks = card.shape.get("breaks")
        if self.breaks == "when loaded":
            raise PermanentError("not for this net")

    def decide(self, questions):
        if self.breaks:
            raise ZeroDivisionError(self.breaks)
        answers = Steps({"policy": "none"}).decide(questions)
        command = KasminaControlCommand(
            action=Action.GERMINATE, site=self.site, seed_id="s0", blueprint="conv", reason="so"
        )
        more = {"commands": (command,) if self.acts else (), "value": self.value}
        return [Decided(state, signal.model_copy(update=more)) for state, signal in answers]


class Server:
    """A shelf, what it told, and a way to ask it."""

    def __init__(self, store, config=CANARY, load=Scripted):
        self.told = []
        self.shelf = Shelf(store, config, tell=self.told.append, load=load)

    def ask(self, version="promoted", config=CONFIG):
        question = Question(initial_state(config, 0), packet(0), config)
        held = self.shelf.held(version)
        [(_, signal)] = held.decider.decide([question])
        self.shelf.compare(question, held, signal)
        return held.version, signal

    @property
    def changes(self):
        return [(event.change, event.version) for event in self.told]


@pytest.fixture
def store():
    return MemoryPolicies()


@pytest.fixture
def server(store):
    return Server(store)


def test_the_promoted_policy_decides_from_the_next_look_on(store, server):
    first, second = put(store, value=0.1), put(store, value=0.2)
    store.promote(first)
    assert server.ask()[0] == first  # it looks by itself where it holds none yet
    store.promote(second)
    assert server.ask()[0] == first
    server.shelf.refresh()
    assert server.ask()[0] == second
    assert server.changes == [(PolicyChange.LOADED, first), (PolicyChange.LOADED, second)]
    assert server.told[1].before == first


def test_a_pinned_version_decides_whatever_is_promoted(store, server):
    pinned, other = put(store, value=0.1), put(store, value=0.2)
    store.promote(other)
    server.shelf.refresh()
    assert (server.ask(pinned)[0], server.ask(pinned[:9])[0], server.ask(other[:9])[0]) == (pinned, pinned, other)
    with pytest.raises(NotFoundError):
        server.ask("0" * 64)


def test_without_a_promoted_one_the_question_says_what_to_do(store, server):
    with pytest.raises(NotFoundError, match="no policy was promoted"):
        server.ask()
    assert server.ask(None)[0] is None


@pytest.mark.parametrize("first", [True, False], ids=["first policy", "second policy"])
def test_a_nominated_policy_is_promoted_once_it_has_passed_in_shadow(store, server, first):
    before = None
    if not first:
        before = put(store, value=0.1)
        store.promote(before)
    new = put(store, value=0.2)
    store.nominate(new)
    server.shelf.refresh()
    server.shelf.refresh()  # looking again begins nothing anew
    for _ in range(CANARY.decisions):
        assert store.promoted() == before
        assert server.ask(None if first else "promoted")[0] == before
    assert (store.promoted(), store.nominated(), server.shelf.live) == (new, None, new)
    assert [change for change, version in server.changes if version == new] == [
        PolicyChange.CANARY,
        PolicyChange.PASSED,
    ]
    record = server.shelf.view().canary
    assert (record.verdict, record.num_decisions, record.num_agreed) == (CanaryVerdict.PASSED, 4, 4)
    assert (record.value, record.value_before, record.beside) == (0.2, 0.0 if first else 0.1, before or "built-in")
    assert server.ask()[0] == new


def test_a_look_that_began_before_one_passed_does_not_bring_the_one_before_back(store, monkeypatch):
    server = Server(store)
    before, new = put(store, value=0.1), put(store, value=0.2)
    store.promote(before)
    store.nominate(new)
    server.shelf.refresh()
    for _ in range(CANARY.decisions - 1):
        server.ask()
    last, read = threading.Thread(target=server.ask), store.promoted

    def passes_meanwhile():
        found = read()
        monkeypatch.setattr(store, "promoted", read)
        last.start()
        last.join(0.5)  # it ends by then, unless it is held back, as it should be
        return found

    monkeypatch.setattr(store, "promoted", passes_meanwhile)
    server.shelf.refresh()
    last.join(60)
    assert server.changes == [
        (PolicyChange.LOADED, before),
        (PolicyChange.CANARY, new),
        (PolicyChange.PASSED, new),
    ]
    assert (store.promoted(), server.shelf.live) == (new, new)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"value": 0.2, "acts": True}, "agreed in 0 of 4 decisions, less than 75%"),
        ({"value": 0.05}, "more than 0 less"),
        ({}, "predicts no value"),
        ({"value": 0.2, "breaks": "division"}, "it fails: ZeroDivisionError: division"),
    ],
)
def test_one_that_does_not_pass_is_not_promoted_and_the_one_before_stays(store, server, shape, reason):
    before = put(store, value=0.1)
    store.promote(before)
    new = put(store, **shape)
    store.nominate(new)
    server.shelf.refresh()
    for _ in range(2 * CANARY.decisions):
        assert server.ask()[0] == before
    assert (store.promoted(), store.nominated(), server.shelf.live) == (before, None, before)
    event = server.told[-1]
    assert (event.change, event.version, event.before) == (PolicyChange.FAILED, new, before)
    assert reason in event.reason
    server.shelf.refresh()
    assert server.told[-1] is event  # it does not begin again


def acting(value, *, site="a"):
    return {"acts": True, "value": value, "site": site}


@pytest.mark.parametrize(
    ("shape", "verdict", "words"),
    [
        (acting(0.2), CanaryVerdict.PASSED, "in 3 of 3 in which one of them acted"),
        (acting(0.2, site="b"), CanaryVerdict.FAILED, "in 0 of 3 in which one of them acted, less than 50%"),
        ({"value": 0.2}, CanaryVerdict.FAILED, "in 0 of 3 in which one of them acted, less than 50%"),
    ],
    ids=["acts alike", "acts elsewhere", "waits always"],
)
def test_waiting_together_promotes_nobody(store, shape, verdict, words):
    def decided(shape):
        scripted = Scripted(PolicyCard.of(WEIGHTS, name="x", kind="none", shape=shape, observation_version=1))
        [(_, signal)] = scripted.decide([Question(initial_state(CONFIG, 0), packet(0), CONFIG)])
        return signal

    config = CanaryConfig(decisions=4, min_agreement=0.5, actions=3)
    waits, acts, new = decided({"value": 0.2}), decided(acting(0.1)), decided(shape)
    record = CanaryRecord(version="0" * 64, beside="x")
    for before, own in (*[(waits, waits)] * 8, *[(acts, new)] * 3):
        assert record.verdict is CanaryVerdict.RUNNING
        record = judge(compare(record, before, own), config)
    assert record.verdict is verdict
    assert words in record.reason
    assert (record.num_decisions, record.num_actions) == (11, 3)


@pytest.mark.parametrize("policy", ["none", "random", "schedule"])
def test_a_control_group_is_not_compared_with(store, server, policy):
    store.nominate(put(store, **acting(0.2)))
    server.shelf.refresh()
    for _ in range(2 * CANARY.decisions):
        server.ask(None, TamiyoConfig(policy=policy))
    assert server.shelf.view().canary.num_decisions == 0
    server.ask(None)
    assert server.shelf.view().canary.num_decisions == 1


@pytest.mark.parametrize("passes", [True, False])
def test_who_was_nominated_meanwhile_is_next(store, server, passes):
    first, second = put(store, value=0.2, acts=not passes), put(store, value=0.3)
    store.nominate(first)
    server.shelf.refresh()
    store.nominate(second)  # not looked at yet when the first comes to its end
    for _ in range(CANARY.decisions):
        server.ask(None)
    assert store.nominated() == second
    server.shelf.refresh()
    assert server.shelf.view().canary.version == second


@pytest.mark.parametrize("looked", [True, False], ids=["looked at", "not looked at yet"])
def test_who_was_promoted_by_hand_meanwhile_stays_and_the_candidate_begins_anew_beside_it(store, server, looked):
    before, new, by_hand = (put(store, value=value) for value in (0.1, 0.2, 0.3))
    store.promote(before)
    store.nominate(new)
    server.shelf.refresh()
    for _ in range(CANARY.decisions - 1):
        server.ask()
    store.promote(by_hand)
    if looked:
        server.shelf.refresh()
    server.ask()
    assert store.promoted() == by_hand
    server.shelf.refresh()
    for _ in range(2 * CANARY.decisions):
        assert server.ask()[0] == by_hand
    record = server.shelf.view().canary
    assert (record.version, record.beside, record.verdict) == (new, by_hand, CanaryVerdict.FAILED)
    assert (record.num_decisions, record.value_before) == (CANARY.decisions, pytest.approx(0.3))
    assert store.promoted() == by_hand


def test_one_that_passes_takes_the_place_of_a_promoted_one_that_cannot_be_loaded(tmp_path):
    storage = Storage.at(tmp_path)
    store = StoredPolicies(storage)
    good, bad, new = (put(store, value=value) for value in (0.1, 0.2, 0.3))
    store.promote(good)
    server = Server(store)
    server.shelf.refresh()
    store.promote(bad)
    storage.write(f"policies/{bad}/weights.safetensors", b"torn")
    store.nominate(new)
    server.shelf.refresh()
    for _ in range(CANARY.decisions):
        assert server.ask()[0] == good
    assert (store.promoted(), store.nominated(), server.ask()[0]) == (new, None, new)


def test_a_damaged_policy_that_a_run_has_pinned_is_told_once(tmp_path):
    storage = Storage.at(tmp_path)
    store = StoredPolicies(storage)
    bad = put(store, value=0.2)
    storage.write(f"policies/{bad}/weights.safetensors", b"torn")
    server = Server(store)
    for _ in range(2):
        with pytest.raises(TamperedError):
            server.ask(bad)
    assert server.changes == [(PolicyChange.REFUSED, bad)]


def test_a_value_that_is_no_number_is_no_signal(server):
    _, signal = server.ask(None)
    with pytest.raises(ValueError, match="finite"):
        type(signal).model_validate({**signal.model_dump(), "value": math.nan})


def test_an_action_counts_as_agreed_only_if_both_want_it(store, server):
    _, waits = server.ask(None)
    command = KasminaControlCommand(action=Action.CULL, site="a", seed_id="s", reason="r")
    acts = waits.model_copy(update={"commands": (command,)})
    record = CanaryRecord(version="0" * 64, beside="x")
    for before, new in ((waits, waits), (acts, acts), (waits, acts)):
        record = compare(record, before, new)
    assert (record.num_decisions, record.num_agreed, record.num_actions, record.num_actions_agreed) == (3, 2, 2, 1)


@pytest.mark.parametrize("note", ["promote", "nominate"])
def test_a_damaged_policy_is_refused_once_and_the_one_before_stays(tmp_path, note):
    storage = Storage.at(tmp_path)
    store = StoredPolicies(storage)
    good, bad = put(store, value=0.1), put(store, value=0.2)
    store.promote(good)
    server = Server(store)
    server.shelf.refresh()
    getattr(store, note)(bad)
    whole = storage.read(f"policies/{bad}/weights.safetensors")
    storage.write(f"policies/{bad}/weights.safetensors", whole[:-1])
    for _ in range(3):
        server.shelf.refresh()
        assert server.ask()[0] == good
    assert server.changes == [(PolicyChange.LOADED, good), (PolicyChange.REFUSED, bad)]
    assert "are not its own" in server.shelf.view().refused[bad]
    storage.write(f"policies/{bad}/weights.safetensors", whole)  # mended
    server.shelf.refresh()
    assert server.changes[2:] == [(PolicyChange.LOADED if note == "promote" else PolicyChange.CANARY, bad)]
    assert server.shelf.view().refused == {}


def test_a_policy_that_this_code_cannot_load_is_refused(store, server):
    good, bad = put(store, value=0.1), put(store, breaks="when loaded")
    for version in (good, bad):
        store.promote(version)
        server.shelf.refresh()
    assert server.changes == [(PolicyChange.LOADED, good), (PolicyChange.REFUSED, bad)]
    assert server.ask()[0] == good


def test_a_damaged_note_changes_nothing(tmp_path):
    storage = Storage.at(tmp_path)
    store = StoredPolicies(storage)
    good = put(store, value=0.1)
    store.promote(good)
    server = Server(store)
    server.shelf.refresh()
    storage.write("policies/promoted", b'{"sha256": "')
    server.shelf.refresh()
    server.shelf.refresh()
    assert server.ask()[0] == good
    assert server.changes == [(PolicyChange.LOADED, good), (PolicyChange.REFUSED, "")]
    assert "torn" in server.told[-1].reason


def test_a_store_that_does_not_answer_changes_nothing(store, server, monkeypatch, caplog):
    good = put(store, value=0.1)
    store.promote(good)
    server.shelf.refresh()

    def gone():
        raise StorageError("no route to the bucket")

    monkeypatch.setattr(store, "promoted", gone)
    server.shelf.refresh()
    assert server.ask()[0] == good
    assert "policies.unread" in [record.message for record in caplog.records]


def test_settings_can_be_stored_as_a_policy():
    store = MemoryPolicies()
    version = put(store, "eager", "schedule", warmup_epochs=0)
    store.promote(version)
    server = Server(store, load=load_policy)
    _, signal = server.ask()
    assert (signal.policy, server.shelf.live) == ("schedule", version)


@pytest.mark.parametrize(
    ("kind", "shape"), [("heuristic", {"no_such_field": 1}), ("heuristic", {"max_risk": 7}), ("x", {})]
)
def test_what_is_no_policy_is_refused(kind, shape):
    card = PolicyCard.of(WEIGHTS, name="odd", kind=kind, shape=shape, observation_version=1)
    with pytest.raises(PermanentError):
        load_policy(card, WEIGHTS)
    with pytest.raises(TamperedError):
        MemoryPolicies().put(card.model_copy(update={"shape": {"other": 1}}), WEIGHTS)
