"""What Tamiyo's routes refuse: packets of the right form whose parts do not belong together."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from tamiyo_story import layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import NotFoundError, PolicyShelf
from esper.tamiyo import initial_state, step
from esper.tamiyo.http import Decision, add_routes
from esper.urza import problems

CONFIG = TamiyoConfig(warmup_epochs=0)


class LocalDesk:
    """Decides in this process."""

    def decide(self, request):
        if request.version is not None:
            raise NotFoundError(f"there is no policy {request.version!r}", remedy="see `esper policy ls`")
        state = request.state or initial_state(request.config, request.seed)
        state, signal = step(state, request.packet, request.config)
        return Decision(state=state, signal=signal)

    def policies(self):
        return PolicyShelf()


@pytest.fixture(scope="module")
def client():
    app = FastAPI()
    problems.install(app)
    add_routes(app, LocalDesk)
    return TestClient(app)


def asked(epoch=5, *, layers=None, options=(), **fields):
    """A request's body, with `fields` of its packet in place of the right ones."""
    seen = packet(epoch, *(layers or (layer("a", epoch), layer("b", epoch))), options=options)
    return {"packet": seen.model_dump(mode="json") | fields, "config": CONFIG.model_dump(mode="json")}


def test_a_packet_whose_parts_belong_together_is_decided_about(client):
    assert client.post("/api/v1/decide", json=asked()).status_code == 200
    # health that is missing or old is no error: the reason says what it means
    old = asked(layers=(layer("a", 4),), options=(option("a", "conv"), option("b", "conv")))
    assert client.post("/api/v1/decide", json=old).status_code == 200


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        (asked(layers=(layer("a", 5), layer("a", 5))), "packet.layers.1.layer_id", "second report of 'a'"),
        (asked(layers=(layer("a", 5), layer("b", 6))), "packet.layers.1.epoch", "epoch 6 is later"),
        (asked(run_id="other"), "packet.layers.0.run_id", "'run' is not the 'other' of packet.run_id"),
        (asked(api_version=99), "packet.api_version", "version 99"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_by_name(client, body, field, word):
    answer = client.post("/api/v1/decide", json=body)
    assert answer.status_code == 422, answer.text
    problem = answer.json()["error"]
    assert (problem["field"], word in problem["message"]) == (field, True), problem
    assert problem["remedy"]


def test_a_seed_of_another_site_is_refused(client):
    body = asked()
    body["packet"]["layers"][1]["seeds"][0]["layer_id"] = "c"
    problem = client.post("/api/v1/decide", json=body).json()["error"]
    assert problem["field"] == "packet.layers.1.seeds.0.layer_id"


@pytest.mark.parametrize("epoch", [4, 5])
def test_an_epoch_that_the_state_has_seen_is_stale(client, epoch):
    first = client.post("/api/v1/decide", json=asked(5))
    assert client.post("/api/v1/decide", json=asked(5)).json() == first.json()  # the same question is the same answer
    state = first.json()["state"]
    answer = client.post("/api/v1/decide", json=asked(epoch) | {"state": state})
    assert answer.status_code == 409, answer.text
    problem = answer.json()["error"]
    assert (problem["field"], "seen epoch 5" in problem["message"]) == ("packet.epoch.epoch", True)
    assert client.post("/api/v1/decide", json=asked(6) | {"state": state}).status_code == 200
    strange = client.post("/api/v1/decide", json=asked(epoch) | {"state": state | {"version": 9}})
    assert (strange.status_code, strange.json()["error"]["field"]) == (409, "state.version")


def test_a_policy_that_there_is_not_is_named(client):
    problem = client.post("/api/v1/decide", json=asked() | {"version": "ffff"}).json()["error"]
    assert (problem["field"], problem["remedy"]) == ("version", "see `esper policy ls`")
    answer = client.post("/api/v1/decide", json=asked() | {"version": ""})  # was taken for none
    assert (answer.status_code, answer.json()["error"]["field"]) == (422, "version")
