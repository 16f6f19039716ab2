"""The routes over a hub in memory: forms, statuses, limits."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from urza_samples import BUILD, IMAGE, VECTOR, WIDE, artifact_of, compiled, design, report_of

from esper.leyline import Check, KernelStatus, SiteKind, SiteSignature, UnavailableError, ValidationReport
from esper.leyline.catalogue import BenchmarkResult, parse_signature
from esper.leyline.errors import BlueprintError
from esper.storage import Storage
from esper.urza import http
from esper.urza.guard import Limits
from esper.urza.http import build_app
from esper.urza.hub import Hub
from esper.urza.memory import MemoryHub

API = "/api/v1"
MISFIT = SiteSignature(kind=SiteKind.VECTOR, channels=99)


@pytest.fixture
def hub():
    return MemoryHub()


@pytest.fixture
def client(hub):
    return TestClient(build_app(lambda: hub, Limits()))


def submission(width=4, **fields):
    return {"ir": design(width).model_dump(mode="json"), "name": "adapter", **fields}


def problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [key] = response.json()
    assert key == "error"
    return response.json()["error"]


def test_a_posted_design_is_compiled_found_and_downloaded(client, hub):
    asked = submission(targets=[VECTOR.model_dump(mode="json")], tags=["small"], pipelines=["fast"])
    answer = client.post(f"{API}/blueprints", json=asked)
    assert answer.status_code == 201
    body = answer.json()
    assert (body["status"], body["queue_position"], body["estimated_s"]) == ("UNVALIDATED", 1, 0.1)
    assert (body["note"], body["misfits"]) == ("", [])
    blueprint_id = body["id"]
    assert answer.headers["location"] == f"{API}/blueprints/{blueprint_id}"
    job = hub.claim("w", fingerprint=BUILD)
    view = client.get(f"{API}/blueprints/{blueprint_id}").json()
    assert (view["blueprint"]["status"], view["targets"][0]["worker"]) == ("COMPILING", "w")
    report = ValidationReport(checks=(Check(name="shape", passed=True),), risk_score=0.25)
    record, container = artifact_of(job, tags=("small",), report=report)
    hub.complete(job, record, container)
    hub.benchmark(BenchmarkResult(kernel_id=record.kernel_id, name="step", speed=1.4))
    hub.report(report_of(record))
    for path in (
        f"{API}/kernels",
        f"{API}/kernels?blueprint_id={blueprint_id}&status=VALIDATED",
        f"{API}/kernels?signature={VECTOR.key}&pipeline=fast",
        f"{API}/kernels/search?tags=small&min_performance=1.2",
        f"{API}/kernels/search?tags=small,nothing&match=any",
        f"{API}/kernels/search?max_risk=0.25&order=risk",
    ):
        page = client.get(path).json()
        assert (page["total"], page["kernels"][0]["kernel"]["kernel_id"]) == (1, record.kernel_id), path
    for path in (
        f"{API}/kernels?status=REJECTED",
        f"{API}/kernels?pipeline=optimized",
        f"{API}/kernels/search?tags=small,nothing",
        f"{API}/kernels/search?min_performance=2",
        f"{API}/kernels/search?max_risk=0.2",
        f"{API}/kernels?signature={WIDE.key}",
    ):
        assert client.get(path).json() == {"total": 0, "kernels": []}, path
    entry = client.get(f"{API}/kernels/{record.kernel_id}").json()
    assert (entry["performance"], entry["statistics"]["outcomes"]) == (1.4, {"fossilized": 1})
    artifact = client.get(f"{API}/kernels/{record.kernel_id}/artifact")
    assert artifact.content == container
    assert artifact.headers["content-type"] == "application/octet-stream"
    assert hashlib.sha256(artifact.content).hexdigest() == record.kernel_id
    assert client.get("/health").json() == {
        "status": "ok",
        "api_version": 1,
        "tamiyo": None,
        **hub.census().model_dump(),
    }


def test_an_artifact_is_cached_by_its_name_and_sent_in_pieces(client, hub, monkeypatch):
    monkeypatch.setattr(http, "CHUNK_BYTES", 10)
    kernel = compiled(hub, "one")
    path = f"{API}/kernels/{kernel.kernel_id}/artifact"
    with client.stream("GET", path) as response:
        pieces = list(response.iter_raw())
    assert [len(piece) for piece in pieces] == [10] * (kernel.size_bytes // 10) + [kernel.size_bytes % 10]
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == kernel.kernel_id
    assert response.headers["content-length"] == str(kernel.size_bytes)
    assert response.headers["etag"] == f'"{kernel.kernel_id}"'
    assert "immutable" in response.headers["cache-control"]
    fetched = hub.write_uses()
    for named in (f'"{kernel.kernel_id}"', f'"other", W/"{kernel.kernel_id}"', "*"):
        again = client.get(path, headers={"If-None-Match": named})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == f'"{kernel.kernel_id}"'
    assert client.get(path, headers={"If-None-Match": f'"{kernel.kernel_id[1:]}"'}).status_code == 200
    assert (fetched, hub.write_uses()) == (1, 1)  # what was not sent is not counted


def test_without_targets_it_is_compiled_for_what_runs_have_asked_for(client, hub):
    hub.submit_blueprint(design(9), name="somebody", targets=[MISFIT])
    body = client.post(f"{API}/blueprints", json=submission(name="early")).json()
    assert (body["targets"], body["queue_position"]) == ([], 0)
    assert "no run has registered a site of kind vector" in body["note"]
    hub.register_sites([VECTOR, WIDE, IMAGE], run_id="a-run")
    body = client.post(f"{API}/blueprints", json=submission(pipelines=["fast"])).json()
    assert [SiteSignature(**target) for target in body["targets"]] == [VECTOR, WIDE]
    assert (body["queue_position"], body["note"]) == (3, "")


def test_a_kernel_is_found_by_the_tags_of_every_design_that_has_it(client, hub):
    for name in ("shipped", "mine"):
        hub.submit_blueprint(design(), name=name, targets=[VECTOR], tags=[f"tag-{name}"])
    job = hub.claim("w", fingerprint=BUILD)
    hub.complete(job, *artifact_of(job, tags=("tag-shipped",)))
    compiled(hub, "younger", tags=("tag-mine",))
    assert hub.claim("w", fingerprint=BUILD) is None
    for tags, names in (("tag-shipped", ["shipped"]), ("tag-mine", ["shipped", "younger"])):
        found = client.get(f"{API}/kernels/search", params={"tags": tags}).json()
        assert [entry["kernel"]["blueprint_name"] for entry in found["kernels"]] == names
    assert [entry["aliases"] for entry in found["kernels"]] == [["mine"], []]


def test_what_a_repeated_submission_cannot_change_is_said(client):
    target = VECTOR.model_dump(mode="json")
    form = submission(tags=["old"], priority=3, targets=[target], pipelines=["fast"])
    assert client.post(f"{API}/blueprints", json=form).json()["note"] == ""
    assert client.post(f"{API}/blueprints", json=form).json()["note"] == ""
    assert client.post(f"{API}/blueprints", json=submission(targets=[target])).json()["note"] == ""
    note = client.post(f"{API}/blueprints", json=form | {"tags": ["new"], "priority": 9}).json()["note"]
    assert note == (
        'adapter was submitted before and keeps its tags ["old"], priority 3; what is still queued is compiled with '
        "priority 9; another name is another blueprint"
    )
    note = client.post(f"{API}/blueprints", json=form | {"metadata": {"a": 1}}).json()["note"]
    assert note == "adapter was submitted before and keeps its metadata {}; another name is another blueprint"


def test_a_target_that_does_not_fit_is_named_with_the_reason(client):
    targets = [IMAGE.model_dump(mode="json")]
    body = client.post(f"{API}/blueprints", json=submission(targets=targets)).json()
    [misfit] = body["misfits"]
    assert SiteSignature(**misfit["signature"]) == IMAGE
    assert "vector" in misfit["reason"]
    assert "fits none of its targets" in body["note"]


def test_each_pipeline_is_queued(client, hub):
    target = VECTOR.model_dump(mode="json")
    body = client.post(f"{API}/blueprints", json=submission(targets=[target])).json()
    assert body["queue_position"] == 2
    targets = hub.targets(body["id"])
    assert {target.pipeline.value for target in targets} == {"fast", "optimized"}


def test_blueprints_are_listed_and_lineage_goes_to_the_root(client):
    root = client.post(f"{API}/blueprints", json=submission(tags=["a", "b"])).json()["id"]
    child = client.post(f"{API}/blueprints", json=submission(6, parent_id=root, name="wide", tags=["a"])).json()
    line = client.get(f"{API}/blueprints/{child['id']}/lineage").json()["lineage"]
    assert [one["blueprint_id"] for one in line] == [child["id"], root]

    def listed(parameters):
        page = client.get(f"{API}/blueprints?{parameters}").json()
        return page["total"], [one["name"] for one in page["blueprints"]]

    assert listed("") == (2, ["adapter", "wide"])
    assert listed("tag=a&tag=b") == (1, ["adapter"])
    assert listed("tag=a") == (2, ["adapter", "wide"])
    assert listed("offset=1") == (2, ["wide"])
    assert listed("name=wide&status=UNVALIDATED") == (1, ["wide"])
    assert listed("order=name&descending=true&limit=1") == (2, ["wide"])


def test_what_is_wrong_is_named_with_its_status(client, hub):
    ir = design().model_dump(mode="json")
    for body, field in (
        ({"ir": ir}, "name"),
        ({"ir": ir, "name": "no name"}, "name"),
        ({"ir": ir, "name": "a", "priority": 10}, "priority"),
        ({"ir": ir, "name": "a", "unknown": 1}, "unknown"),
        ({"ir": ir | {"nodes": []}, "name": "a"}, "ir.nodes"),
        ({"ir": ir, "name": "a", "targets": [{"kind": "vector", "channels": 0}]}, "targets.0.channels"),
        ({"ir": ir, "name": "a", "targets": []}, "targets"),
        ({"ir": ir, "name": "a", "targets": [VECTOR.model_dump(mode="json")] * 257}, "targets"),
        ({"ir": ir, "name": "a", "tags": ["a"] * 33}, "tags"),
        ({"ir": ir, "name": "a", "pipelines": ["slow"]}, "pipelines.0"),
        ([], "body"),
    ):
        error = problem(client.post(f"{API}/blueprints", json=body), 422)
        assert (error["field"], error["type"]) == (field, "MalformedRequest")
        assert error["remedy"]
    for content in (b"{", b"", b"\xff\xfe", b"[" * 100_000):
        answer = client.post(f"{API}/blueprints", content=content, headers={"content-type": "application/json"})
        error = problem(answer, 422 if not content else 400)
        assert (error["field"], error["type"]) == ("body", "MalformedRequest")
        assert "routes" not in error["remedy"]
    unannounced = client.post(
        f"{API}/blueprints", content=json.dumps(submission()), headers={"content-type": "text/plain"}
    )
    error = problem(unannounced, 422)
    assert (error["field"], "'text/plain'" in error["message"]) == ("Content-Type", True)
    assert "application/json" in error["remedy"]
    bad_ir = submission()
    bad_ir["ir"]["nodes"][1]["op"] = "eval"
    error = problem(client.post(f"{API}/blueprints", json=bad_ir), 422)
    assert (error["type"], "eval" in error["message"]) == ("BlueprintError", True)
    large = submission(metadata={"text": "x" * 20_000})
    assert problem(client.post(f"{API}/blueprints", json=large), 422)["field"] == "metadata"
    error = problem(client.post(f"{API}/blueprints", json=submission(parent_id="nobody")), 404)
    assert error["type"] == "NotFoundError"
    for path in ("blueprints/x", "blueprints/x/lineage", "kernels/x", "kernels/x/artifact", "nothing"):
        assert problem(client.get(f"{API}/{path}"), 404)["remedy"]
    problem(client.delete(f"{API}/blueprints"), 405)
    for query in ("limit=0", "limit=9999", "status=NO", "offset=-1", "unknown=1", "signature=vector-x"):
        error = problem(client.get(f"{API}/kernels?{query}"), 422)
        assert error["field"] == query.partition("=")[0]
    for query in ("limit=0", "limit=9999", "status=NO", "offset=-1", "stauts=INVALID", "tags=x", "order=size"):
        error = problem(client.get(f"{API}/blueprints?{query}"), 422)
        assert error["field"] == query.partition("=")[0]
    problem(client.get(f"{API}/kernels/search?min_performance=nan"), 422)
    known = hub.submit_blueprint(design(), name="adapter", targets=[])
    hub.retire_blueprint(known.blueprint_id, "a better one")
    error = problem(client.post(f"{API}/blueprints", json=submission()), 409)
    assert "another name" in error["remedy"]


def test_an_urza_that_does_not_answer_is_503():
    def nobody():
        raise UnavailableError("no Urza runs", remedy="esper platform up")

    client = TestClient(build_app(nobody, Limits()))
    for response in (client.get("/health"), client.post(f"{API}/blueprints", json=submission())):
        assert problem(response, 503)["remedy"] == "esper platform up"
        assert int(response.headers["retry-after"]) > 0


def test_health_is_asked_of_urza_each_time(hub):
    answers = iter([hub.census()])

    def census():
        for answer in answers:
            return answer
        raise UnavailableError("Urza did not answer within its deadline")

    client = TestClient(build_app(lambda: hub, Limits(), census=census))
    assert client.get("/health").status_code == 200
    problem(client.get("/health"), 503)


def test_an_urza_that_was_taken_over_or_whose_bytes_are_damaged_is_503_without_a_time_to_come_back(tmp_path):
    storage = Storage.at(tmp_path)
    hub = Hub.open(storage)
    client = TestClient(build_app(lambda: hub, Limits()))
    kernel = compiled(hub, "one")
    blob = storage.local / "blobs" / kernel.kernel_id[:2] / kernel.kernel_id
    blob.write_bytes(b"damaged")
    response = client.get(f"{API}/kernels/{kernel.kernel_id}/artifact")
    assert problem(response, 503)["type"] == "TamperedError"
    assert "retry-after" not in response.headers
    Hub.open(storage)
    response = client.post(f"{API}/blueprints", json=submission())
    assert problem(response, 503)["type"] == "FencedError"
    assert "retry-after" not in response.headers


def test_a_bug_is_an_answer_too(hub):
    def broken():
        raise ZeroDivisionError("secret detail")

    client = TestClient(build_app(broken, Limits()), raise_server_exceptions=False)
    error = problem(client.get("/health"), 500)
    assert error["type"] == "InternalError"
    assert "secret" not in str(error)


def test_a_body_over_the_limit_is_refused_whether_it_says_so_or_not(hub):
    client = TestClient(build_app(lambda: hub, Limits(max_body_bytes=2000)))
    assert client.post(f"{API}/blueprints", json=submission()).status_code == 201
    large = submission(metadata={"text": "x" * 3000})
    assert problem(client.post(f"{API}/blueprints", json=large), 413)["remedy"].endswith("raise urza.http.max_body_kb")

    def chunks():  # sent without a length
        for _ in range(100):
            yield b"x" * 1000

    problem(client.post(f"{API}/blueprints", content=chunks()), 413)
    assert len(hub.blueprints()) == 1


class TestToken:
    TOKEN = "0123456789abcdef"

    @pytest.fixture
    def client(self, hub):
        digest = hashlib.sha256(self.TOKEN.encode()).hexdigest()
        return TestClient(build_app(lambda: hub, Limits(token_digest=digest)))

    @pytest.mark.parametrize("path", ["/health", f"{API}/kernels", "/docs", "/openapi.json", "/nothing"])
    def test_nothing_is_answered_without_it(self, client, path):
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer wrong"},
            {"Authorization": self.TOKEN},
            {"Authorization": f"Basic {self.TOKEN}"},
            {"Authorization": f"Bearer {self.TOKEN}x"},
        ):
            response = client.get(path, headers=headers)
            assert problem(response, 401)["field"] == "Authorization"
            assert response.headers["www-authenticate"] == "Bearer"

    def test_with_it_all_is(self, client):
        headers = {"Authorization": f"Bearer {self.TOKEN}"}
        assert client.get("/health", headers=headers).status_code == 200
        assert client.post(f"{API}/blueprints", json=submission(), headers=headers).status_code == 201
        assert "HTTPBearer" in client.get("/openapi.json", headers=headers).text

    def test_a_body_is_not_read_without_it(self, client):
        problem(client.post(f"{API}/blueprints", content=b"x" * (2 << 20)), 401)


def test_a_name_that_was_made_to_point_here_is_not_answered(hub):
    client = TestClient(build_app(lambda: hub, Limits(hosts=("127.0.0.1", "localhost", "[::1]"))))
    for host in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        problem(client.get("/health", headers={"Host": host}), 400)


def test_the_documents_name_every_route(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        f"{API}/blueprints",
        f"{API}/blueprints/{{blueprint_id}}",
        f"{API}/blueprints/{{blueprint_id}}/lineage",
        f"{API}/kernels",
        f"{API}/kernels/search",
        f"{API}/kernels/{{kernel_id}}",
        f"{API}/kernels/{{kernel_id}}/artifact",
        "/health",
    }
    assert set(paths[f"{API}/blueprints"]) == {"get", "post"}
    assert client.get("/docs").status_code == 200


def test_a_retired_kernel_is_listed_when_asked_for(client, hub):
    kernel = compiled(hub, "old")
    hub.mark_kernel(kernel.kernel_id, KernelStatus.RETIRED, "replaced")
    assert client.get(f"{API}/kernels").json()["total"] == 0
    assert client.get(f"{API}/kernels?status=any").json()["total"] == 1


SIGNATURES = st.one_of(
    st.builds(SiteSignature, kind=st.just(SiteKind.VECTOR), channels=st.integers(1, 99)),
    st.builds(
        SiteSignature,
        kind=st.just(SiteKind.SEQUENCE),
        channels=st.integers(1, 99),
        extent=st.tuples(st.integers(1, 99)),
        causal=st.booleans(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        device=st.sampled_from(["cpu", "cuda"]),
    ),
    st.builds(
        SiteSignature,
        kind=st.just(SiteKind.FEATURE_MAP),
        channels=st.integers(1, 99),
        extent=st.tuples(st.integers(1, 99), st.integers(1, 99)),
    ),
)


@given(SIGNATURES)
def test_a_signature_is_read_back_from_its_key(signature):
    assert parse_signature(signature.key) == signature


@given(st.text(max_size=40) | st.from_regex(r"vector-[0-9x]{0,6}-[a-z0-9]{0,8}-[a-z]{0,4}"))
def test_what_is_no_signature_is_refused(key):
    try:
        signature = parse_signature(key)
    except BlueprintError:
        return
    assert parse_signature(signature.key) == signature
