"""The gateway behind Serve's proxy, over a real socket; who may open it, and when it is refused."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection

import pytest
import ray
import safetensors.numpy
from ports import free_ports
from test_tamiyo_serve import CONFIG, packet
from urza_samples import BUILD, VECTOR, artifact_of, design

from actors import gateway, tamiyo, urza
from actors.cluster import connected
from esper.config import HttpConfig
from esper.leyline import ConfigError, ConflictError, PolicyCard
from esper.storage import Storage
from esper.tamiyo import initial_state, step
from esper.urza.policies import StoredPolicies

pytestmark = pytest.mark.ray

EMPTY = safetensors.numpy.save({})


@pytest.fixture(scope="module")
def http():
    return HttpConfig(port=free_ports(1)[0])


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return Storage.at(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def hub(storage):
    with connected(dashboard=False):
        handle = urza.spawn(storage.uri, num_cpus=0.01, deadline_s=240.0)
        yield handle
        ray.kill(handle._actor)


@pytest.fixture(scope="module")
def base(hub, storage, http):
    gateway.start_serve(http, timeout_s=240.0)
    tamiyo.deploy(timeout_s=240.0)  # shares Serve
    where = gateway.deploy(storage, http, timeout_s=240.0)
    yield where
    gateway.undeploy(storage, timeout_s=240.0)
    tamiyo.undeploy(timeout_s=240.0, stop_serve=True)


def ask_once(url, body=None, *, host=None, token=None):
    """The status and the body of a request."""
    headers = {"Content-Type": "application/json"} | ({} if host is None else {"Host": host})
    headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def ask(url, body=None, **more):
    """Likewise, once it says something else than 503: it does so while Urza or Tamiyo start, or the machine is busy."""
    deadline = time.monotonic() + 240
    while True:
        status, answer = ask_once(url, body, **more)
        if status != 503 or time.monotonic() > deadline:
            return status, answer
        time.sleep(1.0)


def is_healthy(base, token=None):
    """Whether it answers so, sooner or later."""
    return ask(f"{base}/health", token=token)[0] == 200


def announced(http, length):
    """The status of a request that would send so many bytes. None is sent: who refuses them may close the connection,
    and what is under way then ends in a reset, with or without an answer.
    """
    connection = HTTPConnection("127.0.0.1", http.port, timeout=60)
    try:
        connection.putrequest("POST", "/api/v1/blueprints")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(length))
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_design_goes_in_and_its_kernel_comes_out(base, hub, http):
    assert base == f"http://127.0.0.1:{http.port}"
    body = {"ir": design().model_dump(mode="json"), "name": "adapter", "targets": [VECTOR.model_dump(mode="json")]}
    body |= {"pipelines": ["fast"]}
    status, answer = ask(f"{base}/api/v1/blueprints", body)
    assert status == 201, answer
    assert json.loads(answer)["queue_position"] == 1
    job = hub.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job, tags=("small",), content=bytes(range(256)) * 12_000)  # several pieces
    hub.complete(job, record, container)
    [found] = json.loads(ask(f"{base}/api/v1/kernels/search?tags=small")[1])["kernels"]
    assert found["kernel"]["kernel_id"] == record.kernel_id
    assert ask(f"{base}/api/v1/kernels/{record.kernel_id}/artifact") == (200, container)
    assert ask(f"{base}/api/v1/kernels/{'0' * 64}")[0] == 404
    assert announced(http, 2 << 20) == 413
    assert ask(f"{base}/docs")[0] == 200
    assert ask(f"{base}/health", host="evil.example")[0] == 400


def test_tamiyo_decides_over_http_as_the_local_step_does(base, storage):
    body = {"packet": packet(0).model_dump(mode="json"), "config": CONFIG.model_dump(mode="json"), "seed": 3}
    status, answer = ask(f"{base}/api/v1/decide", body)
    assert status == 200, answer
    state, signal = step(initial_state(CONFIG, 3), packet(0), CONFIG)
    assert json.loads(answer) == {"state": state, "signal": signal.model_dump(mode="json")}
    deadline = time.monotonic() + 240
    while (said := json.loads(ask(f"{base}/health")[1])["tamiyo"]) != "ok":
        assert time.monotonic() < deadline, said  # it has 5 s to answer, on a busy machine too
    status, answer = ask(f"{base}/api/v1/decide", body | {"state": json.loads(answer)["state"] | {"version": 9}})
    assert (status, json.loads(answer)["error"]["field"]) == (409, "state.version")


def test_what_is_no_packet_or_names_no_policy_is_told_so(base, storage):
    good = packet(0).model_dump(mode="json")
    for path, value in (("val_loss", float("nan")), ("epoch", -1), ("train_loss", "high")):
        status, answer = ask(f"{base}/api/v1/decide", {"packet": good | {"epoch": good["epoch"] | {path: value}}})
        assert status in {400, 422}, (path, answer)
    assert ask(f"{base}/api/v1/decide", {"packet": good, "version": "promoted"})[0] == 404
    version = StoredPolicies(storage).put(PolicyCard.of(EMPTY, name="waits", kind="none", observation_version=1), EMPTY)
    status, answer = ask(f"{base}/api/v1/decide", {"packet": good, "version": version[:10]})
    assert (status, json.loads(answer)["signal"]["policy"]) == (200, "none")
    status, answer = ask(f"{base}/api/v1/policies")
    assert (status, json.loads(answer)["live"]) == (200, None)
    assert [card["version"] for card in json.loads(answer)["policies"]] == [version]


def test_a_body_without_a_length_is_limited_too(base, http):
    connection = HTTPConnection("127.0.0.1", http.port, timeout=60)
    try:
        chunks = (b"x" * 100_000 for _ in range(20))  # 2 MB in chunks; more than the limit of 1
        connection.request(
            "POST", "/api/v1/blueprints", chunks, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.load(answer)["error"]["field"] == "body"
    finally:
        connection.close()


def test_it_goes_on_when_urza_is_killed(base, hub):
    os.kill(hub.ready(), signal.SIGKILL)
    assert is_healthy(base)


def test_deploying_again_changes_nothing_but_what_is_let_in(base, storage, http, tmp_path):
    assert gateway.deploy(storage, http, timeout_s=240.0) == base
    gateway.start_serve(http, timeout_s=240.0)
    path = tmp_path / "token"
    strict = http.model_copy(update={"always_token": True, "token_file": str(path)})
    try:
        assert gateway.deploy(storage, strict, timeout_s=240.0) == f"{base} (bearer token required)"
        assert ask(f"{base}/health")[0] == 401
        assert is_healthy(base, path.read_text().strip())
        gateway.deploy(storage, http, replace=False, timeout_s=240.0)  # as a run does that knows of no token
        assert ask(f"{base}/health")[0] == 401
    finally:
        assert gateway.deploy(storage, http, timeout_s=240.0) == base
    assert is_healthy(base)


def test_the_routes_belong_to_one_platform(base, http, tmp_path):
    other = Storage.at(tmp_path)
    with pytest.raises(ConflictError, match="another platform"):
        gateway.deploy(other, http, timeout_s=240.0)
    gateway.undeploy(other)  # harmless
    assert "no such application" in gateway.address(other)


def test_a_serve_that_is_open_to_others_gets_no_gateway_without_a_token():
    with pytest.raises(ConflictError, match=r"0\.0\.0\.0:1") as caught:
        gateway.check_place(HttpConfig(), ("0.0.0.0", 1))
    assert "urza.http.host=0.0.0.0" in caught.value.remedy
    gateway.check_place(HttpConfig(host="0.0.0.0"), ("127.0.0.1", 1))  # less open than was asked for


def test_a_serve_without_http_is_named():
    with pytest.raises(ConflictError, match="without HTTP"):
        gateway.check_place(HttpConfig(), None)


def test_beyond_loopback_it_asks_for_the_token_of_a_private_file(tmp_path):
    path = tmp_path / "secrets" / "token"
    http = HttpConfig(host="0.0.0.0", token_file=str(path))
    limits = gateway.limits_of(http)
    assert limits.hosts is None
    assert len(limits.token_digest) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().strip() not in limits
    assert gateway.limits_of(http) == limits
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        gateway.limits_of(http)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="fewer than 16"):
        gateway.limits_of(http)
    (tmp_path / "in the way").write_text("")
    with pytest.raises(ConfigError):
        gateway.limits_of(HttpConfig(host="0.0.0.0", token_file=str(tmp_path / "in the way" / "token")))
    assert gateway.limits_of(HttpConfig(host="::1")).token_digest is None
    local = gateway.limits_of(HttpConfig(host="127.0.0.2", always_token=True, token_file=str(tmp_path / "mine")))
    assert local.token_digest is not None
    assert "127.0.0.2" in local.hosts


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host, expected):
    assert gateway.is_loopback(host) is expected
    assert gateway.is_loopback("localhost.example") is False


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConflictError) as caught:
            gateway._check_port(HttpConfig(port=taken.getsockname()[1]))
    assert caught.value.field == "urza.http.port"
