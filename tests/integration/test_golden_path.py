"""The golden path from outside: `curl` posts a design, and a run grafts its kernel by name.

A platform on a head of its own; who speaks with the gateway knows its address and its token and nothing of Esper.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import time
import urllib.parse

import pytest
from ports import free_ports
from ray_head import head, wait_for

from esper.leyline import RunStatus, RunSummary
from esper.leyline.container import unpack
from esper.leyline.keys import load, public_hex
from esper.leyline.native import Rung

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]  # native code takes 20 s on idle cores, minutes on busy ones

_LOG = logging.getLogger(__name__)
NAME = "golden"
PIPELINES = ("fast", "optimized")
LIMIT_S = 900.0
SIGNATURE = {"kind": "feature_map", "channels": 4, "extent": [8, 8]}
IR = {
    "fit": ["feature_map"],
    "nodes": [  # squeeze and excite: many small operations, of which a compiler makes few
        {"id": "squeeze", "op": "pool", "inputs": ["h"]},
        {"id": "reduce", "op": "linear", "inputs": ["squeeze"], "params": {"out": "C"}},
        {"id": "act", "op": "silu", "inputs": ["reduce"]},
        {"id": "expand", "op": "linear", "inputs": ["act"], "params": {"out": "C", "init": "zeros"}},
        {"id": "excite", "op": "tanh", "inputs": ["expand"]},
        {"id": "gated", "op": "gate", "inputs": ["h", "excite"]},
    ],
    "output": "gated",
    "zero_at_birth": True,
}
CONFIG = """
name: golden
seed: 3
data: {type: digits, layout: image}
host: {type: cnn, channels: [4], blocks_per_stage: 1}
budget: {params: 20.0, flops: 20.0}
tolaria: {epochs: 40}
kasmina: {sites: [stages.0.0], evidence_z: 0.0, min_training_epochs: 1, harm_tolerance: 5.0}
tamiyo: {policy: schedule, schedule: [{epoch: 0, site: stages.0.0, blueprint: golden}]}
tezzeret: {blueprints: [golden]}
nissa: {view: plain}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    (path / "golden.yaml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def cluster():
    with head() as started:
        yield started


@pytest.fixture(scope="module")
def curl(cluster, folder):
    """Asks the gateway of a platform that is up; gives the status and the body."""
    [port] = free_ports(1)
    token = folder / "token"
    up = cluster.run(
        "esper", "platform", "up", "--storage", folder / "store", f"urza.http.port={port}",
        "urza.http.always_token=true", f"urza.http.token_file={token}", f"tezzeret.key_file={folder / 'key.pem'}",
        "tamiyo.startup_s=300",
    )  # fmt: skip
    assert up.returncode == 0, up.stdout + up.stderr
    said = f"http://127.0.0.1:{port} (bearer token required)"
    status = ("esper", "platform", "status", "--storage", folder / "store")  # a gateway may be busy as it comes up
    wait_for(lambda: said in up.stdout or said in cluster.run(*status).stdout, said)

    def ask(path, *options, with_token=True):
        """The status and the body; waits while Urza is too busy to answer, which is a 503 and changes nothing."""

        def answered():
            status, body = once(path, *options, with_token=with_token)
            return None if status == 503 and "POST" not in options else (status, body)

        return wait_for(answered, f"an answer of {path}")

    def once(path, *options, with_token):
        header = ["-H", f"Authorization: Bearer {token.read_text().strip()}"] if with_token else []
        command = ["curl", "-sS", "-w", "\n%{http_code}", *header, *options, f"http://127.0.0.1:{port}{path}"]
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        body, _, status = done.stdout.rpartition(b"\n")
        return int(status), body

    yield ask
    down = cluster.run("esper", "platform", "down", "--storage", folder / "store")
    assert down.returncode == 0, down.stderr
    assert " serve " not in down.stdout + down.stderr  # a line of Ray Serve's log


@pytest.fixture(scope="module")
def kernels(curl):
    """By pipeline, the records of the posted design's kernels, found by its tag."""
    body = {"ir": IR, "name": NAME, "tags": ["from-outside"], "targets": [SIGNATURE]}
    post = ["-X", "POST", "-H", "Content-Type: application/json", "--data", json.dumps(body)]
    began = time.monotonic()
    status, answer = curl("/api/v1/blueprints", *post)
    assert status == 201, answer
    submitted = json.loads(answer)

    def compiled():
        status, answer = curl(f"/api/v1/blueprints/{submitted['id']}")
        assert status == 200, answer
        view = json.loads(answer)
        return view if view["outlook"]["num_open"] == 0 else None

    view = wait_for(compiled, "the kernels", timeout_s=LIMIT_S)
    _LOG.info("compiled by %s %.1f s after the post", ", ".join(PIPELINES), time.monotonic() - began)
    assert view["blueprint"]["status"] == "VALIDATED", view
    assert {target["pipeline"]: target["state"] for target in view["targets"]} == dict.fromkeys(PIPELINES, "compiled")
    found = {}
    for pipeline in PIPELINES:
        query = urllib.parse.urlencode({"tags": "from-outside", "pipeline": pipeline})
        [entry] = json.loads(curl(f"/api/v1/kernels/search?{query}")[1])["kernels"]
        assert entry["kernel"]["status"] == "VALIDATED"
        assert entry["kernel"]["signature"] | SIGNATURE == entry["kernel"]["signature"]
        found[pipeline] = entry["kernel"]
    return found


def test_nobody_gets_in_without_the_token(curl):
    for path in ("/health", "/api/v1/kernels", "/docs"):
        assert curl(path, with_token=False)[0] == 401

    def healthy():
        status, health = curl("/health")
        assert status in {200, 503}  # the latter where Urza is busy for a moment
        return health if status == 200 else None

    assert json.loads(wait_for(healthy, "health"))["status"] == "ok"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_is_downloaded_is_what_was_signed(cluster, curl, kernels, folder, pipeline):
    kernel_id = kernels[pipeline]["kernel_id"]
    out, fetched = folder / f"{pipeline}.downloaded", folder / f"{pipeline}.fetched"
    status, _ = curl(f"/api/v1/kernels/{kernel_id}/artifact", "-o", str(out))
    assert status == 200
    data = out.read_bytes()
    assert hashlib.sha256(data).hexdigest() == kernel_id
    key = public_hex(load(folder / "key.pem"))
    manifest = unpack(data, key).manifest
    assert (manifest.blueprint_name, manifest.pipeline.value) == (NAME, pipeline)
    command = ["esper", "kernels", "fetch", kernel_id, "--out", fetched, "--public-key", key]
    done = cluster.run(*command, "--storage", folder / "store")
    assert done.returncode == 0, done.stderr
    assert fetched.read_bytes() == data


def test_a_run_grafts_it_by_name(cluster, curl, kernels, folder):
    run = cluster.run(
        "esper", "train", folder / "golden.yaml", "--json", f"storage={folder / 'store'}",
        f"tezzeret.key_file={folder / 'key.pem'}", "tezzeret.optimize=grafted", timeout_s=600.0,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    summary = RunSummary.model_validate_json(run.stdout)
    assert summary.status is RunStatus.FINISHED
    own = [event for event in summary.events if event.blueprint == NAME]
    assert own[-1].to_stage == "FOSSILIZED"
    fast = kernels["fast"]["kernel_id"]  # a seed starts on it, native code comes after
    assert next(event.kernel_id for event in own if event.kernel_id) == fast
    _LOG.info("runs from %s", [(rung.rung.value, rung.reason) for rung in summary.rungs])
    native = kernels["optimized"]["optimization_level"] == 1  # else it was not faster here: timing decides no test
    assert [rung.rung for rung in summary.rungs] == [Rung.NATIVE if native else Rung.IR], summary.rungs
    status, answer = curl(f"/api/v1/kernels/{fast}")
    assert json.loads(answer)["statistics"]["outcomes"] == {"fossilized": 1}
    # the run has registered its site: a design without targets is compiled for it
    body = {"ir": IR | {"zero_at_birth": False}, "name": "later", "pipelines": ["fast"]}
    status, answer = curl(
        "/api/v1/blueprints", "-X", "POST", "-H", "Content-Type: application/json", "--data", json.dumps(body)
    )
    assert status == 201, answer
    [target] = json.loads(answer)["targets"]
    assert target | SIGNATURE == target
