"""`esper blueprints`, `kernels` and `urza` on a storage address where no Ray is joined."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner
from urza_samples import BUILD, IMAGE, VECTOR, WIDE, artifact_of, design

from esper.leyline import KernelStatus, Pipeline
from esper.leyline.canonical import canonical_hash
from esper.leyline.catalogue import BenchmarkResult, KernelOrder
from esper.leyline.container import unpack
from esper.leyline.keys import load_or_create, public_hex
from esper.leyline.native import Timing
from esper.storage import Storage
from esper.tezzeret.builder import InProcess
from esper.tezzeret.compile import benchmark
from esper.tezzeret.worker import Idle, work_once
from esper.urabrask.gauntlet import examine
from esper.urza.hub import Hub
from esper.urza.rules import blueprint_id
from jobs import cli, options
from jobs.blueprints import tree
from jobs.kernels import kernels_app
from jobs.tables import time_of

MINE = {
    "name": "mine",
    "description": "A small adapter.",
    "tags": ["own"],
    "fit": ["vector"],
    "nodes": [{"id": "down", "op": "linear", "out": 4}, {"id": "up", "op": "linear", "out": "C", "init": "zeros"}],
}


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    path = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("ESPER_STORAGE", raising=False)
    return path


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPER_STORAGE", str(tmp_path / "store"))
    return Storage.at(tmp_path / "store")


@pytest.fixture
def esper(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def answer(esper):
    """The JSON of a command that must succeed."""

    def run(*arguments):
        code, out, err = esper(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINE))
    return path


def compile_all(storage):
    """Does what a platform's compilers would do, with the signing key of this home."""
    hub = Hub.open(storage)
    key = load_or_create("~/.config/esper/signing_key.pem")
    turn = None
    while not isinstance(turn, Idle):
        turn = work_once(hub, InProcess(examine), worker="w", private_key=key)
    hub.project(storage)
    return hub


# ---------------------------------------------------------------- blueprints


def test_a_design_goes_the_whole_way(esper, answer, storage, file, tmp_path):
    submitted = answer("blueprints", "submit", file, "--target", VECTOR.key, "--pipeline", "fast", "--tag", "quick")
    assert (submitted["status"], submitted["queue_position"]) == ("UNVALIDATED", 1)
    hub = compile_all(storage)
    [kernel] = hub.kernels()
    assert kernel.tags[:2] == ("own", "quick")  # what Urabrask has given comes after
    view = answer("blueprints", "show", "mine")
    assert view["blueprint"]["status"] == "VALIDATED"
    assert view["targets"][0]["kernel_ids"] == [kernel.kernel_id]
    assert answer("blueprints", "show", submitted["id"][:8]) == view
    [listed] = answer("blueprints", "ls", "--tag", "quick", "--status", "validated")["blueprints"]
    assert listed["blueprint_id"] == submitted["id"]
    for chosen in (
        [],
        ["--blueprint", "mine"],
        ["--signature", VECTOR.key, "--pipeline", "fast"],
        ["--order", "size"],
    ):
        assert [row["kernel"]["kernel_id"] for row in answer("kernels", "ls", *chosen)["kernels"]] == [kernel.kernel_id]
    for chosen in (["--signature", WIDE.key], ["--status", "rejected"], ["--pipeline", "optimized"], ["--offset", 1]):
        assert answer("kernels", "ls", *chosen)["kernels"] == []
    hub.benchmark(BenchmarkResult(kernel_id=kernel.kernel_id, name="step", speed=1.4))
    assert answer("kernels", "search", "--tag", "own", "--tag", "quick", "--min-performance", 1.3)["total"] == 1
    assert answer("kernels", "search", "--tag", "own", "--tag", "nothing")["total"] == 0
    assert answer("kernels", "search", "--tag", "own", "--tag", "nothing", "--any")["total"] == 1
    assert answer("kernels", "search", "--min-performance", 1.5)["total"] == 0
    assert answer("kernels", "search", "--max-risk", kernel.risk_score)["total"] == 1
    assert answer("kernels", "search", "--max-risk", kernel.risk_score - 0.01)["total"] == 0
    assert answer("kernels", "show", kernel.kernel_id[:10])["performance"] == 1.4
    out = tmp_path / "out.kernel"
    fetched = answer("kernels", "fetch", kernel.kernel_id, "--out", out)
    assert fetched["kernel_id"] == kernel.kernel_id
    assert unpack(out.read_bytes(), fetched["signed_by"]).kernel_id == kernel.kernel_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "out.kernel", "store"]  # no draft


def test_what_is_shown_to_people(esper, storage, file):
    _, out, _ = esper("blueprints", "submit", file, "--target", VECTOR.key, "--target", IMAGE.key)
    assert "mine version 1 is UNVALIDATED" in out
    assert f"targets: {VECTOR.key}" in out
    assert f"does not fit {IMAGE.key}" in out
    assert "2 to be compiled until it is done, about 30.1 s from now; it is compiled as soon as" in out
    hub = compile_all(storage)
    kernel = hub.kernels()[0]
    _, out, _ = esper("blueprints", "ls")
    head, line = out.splitlines()
    keys = "id name version status targets priority created_at submitted_by tags"
    assert head.split() == keys.split()
    assert line.split()[1:4] == ["mine", "1", "VALIDATED"]
    _, out, _ = esper("blueprints", "show", "mine")
    assert "down = linear(h; out=4)" in out
    assert "r(h) = up" in out
    assert kernel.kernel_id[:12] in out
    _, out, _ = esper("kernels", "ls")
    assert out.splitlines()[1].split()[:4] == [kernel.kernel_id[:12], "mine", VECTOR.key, "fast"]
    _, out, _ = esper("kernels", "show", kernel.kernel_id[:12])
    assert "batch_independent" in out
    hub.mark_kernel(kernel.kernel_id, KernelStatus.RETIRED, "replaced")
    assert "no kernel fits" in esper("kernels", "ls")[1]
    assert "RETIRED" in esper("kernels", "ls", "--status", "any")[1]
    assert "in Esper's library; not in this storage" in esper("blueprints", "show", "conv_light")[1]
    assert len(esper("blueprints", "ls", "--library")[1].splitlines()) >= 12


def test_a_kernel_and_a_design_are_taken_out_of_use(esper, answer, storage, file):
    submitted = answer("blueprints", "submit", file, "--target", VECTOR.key, "--pipeline", "fast")
    [kernel] = compile_all(storage).kernels()
    told = esper("kernels", "retire", kernel.kernel_id[:10], "--reason", "diverged twice")
    assert told == (0, f"kernel {kernel.kernel_id[:12]} of mine is RETIRED: diverged twice\n", "")
    entry = answer("kernels", "retire", kernel.kernel_id, "--reason", "said again")
    assert (entry["kernel"]["status"], entry["reason"]) == ("RETIRED", "diverged twice")
    assert "RETIRED: diverged twice" in esper("kernels", "show", kernel.kernel_id)[1]
    assert answer("kernels", "ls")["kernels"] == []
    again = answer("blueprints", "submit", file, "--name", "again", "--target", VECTOR.key, "--pipeline", "fast")
    compile_all(storage)
    assert "diverged twice" in answer("blueprints", "show", again["id"])["blueprint"]["reason"]

    told = esper("blueprints", "retire", "mine", "--reason", "a better one")
    assert told == (0, f"mine version 1 is RETIRED: a better one, id {submitted['id']}\n", "")
    retired = answer("blueprints", "retire", submitted["id"][:8], "--reason", "said again")
    assert (retired["status"], retired["reason"]) == ("RETIRED", "a better one")
    code, _, err = esper("blueprints", "submit", file, "--target", WIDE.key)
    assert (code, "mine is retired" in err) == (1, True), (code, err)


def test_a_lease_is_shown_with_its_end(esper, storage, file):
    esper("blueprints", "submit", file, "--target", VECTOR.key, "--pipeline", "fast")
    hub = Hub.open(storage)
    job = hub.claim("a-worker", fingerprint="build", lease_s=3600.0)
    head, line = next(
        part for part in esper("blueprints", "show", "mine")[1].split("\n\n") if "lease" in part
    ).splitlines()
    assert head.split()[-3:] == ["worker", "lease_ends_at", "reason"]
    assert f"a-worker  {time_of(job.deadline)}" in line
    hub.fail(job, "no")
    assert time_of(job.deadline) not in esper("blueprints", "show", "mine")[1]


def test_every_order_of_kernels_is_in_the_help():
    for command in ("ls", "search"):
        told = " ".join(CliRunner().invoke(kernels_app, [command, "--help"], terminal_width=400).stdout.split())
        assert [order.value for order in KernelOrder if order.value not in told.partition("--order")[2]] == []


def test_a_page_says_that_there_is_more(esper, storage, file):
    for name in ("a1", "b1", "c1"):
        esper("blueprints", "submit", file, "--name", name, "--target", VECTOR.key)
    _, out, _ = esper("blueprints", "ls", "--limit", 2, "--order", "name", "--desc")
    assert [line.split()[1] for line in out.splitlines()[1:3]] == ["c1", "b1"]
    assert "2 of 3; more with --offset" in out


def test_without_targets_it_is_for_what_runs_have_registered(esper, answer, storage, file):
    assert "no run has registered a site of kind vector" in answer("blueprints", "submit", file)["note"]
    Hub.open(storage).register_sites([WIDE, IMAGE], run_id="a-run")
    submitted = answer("blueprints", "submit", file)
    assert submitted["targets"] == [WIDE.model_dump(mode="json")]
    assert submitted["queue_position"] == 2  # both pipelines


def test_a_request_of_the_gateway_is_a_file_too(answer, storage, tmp_path):
    body = {"ir": design().model_dump(mode="json"), "name": "sent", "submitted_by": "me", "priority": 9}
    path = tmp_path / "body.json"
    path.write_text(json.dumps(body | {"targets": [VECTOR.model_dump(mode="json")]}))
    answer("blueprints", "submit", path)
    [listed] = answer("blueprints", "ls")["blueprints"]
    assert (listed["name"], listed["submitted_by"], listed["priority"]) == ("sent", "me", 9)


def test_a_family_is_shown_from_its_root(esper, answer, storage, file):
    parents = {"root": None, "left": "root", "right": "root", "leaf": "left", "stranger": None}
    for name, parent in parents.items():
        assert esper("blueprints", "submit", file, "--name", name, *(["--parent", parent] if parent else []))[0] == 0
    _, out, _ = esper("blueprints", "lineage", "root")
    names = [line.split("  ")[0].rstrip() for line in out.splitlines()]
    assert [line[: line.index(" v1")] for line in out.splitlines()] == ["root", "├─ left", "│  └─ leaf", "└─ right"]
    assert names[0] == "root v1"
    _, out, _ = esper("blueprints", "lineage", "left")
    assert [line[: line.index(" v1")] for line in out.splitlines()] == ["root", "└─ left", "   └─ leaf"]
    assert [line.endswith("<") for line in out.splitlines()] == [False, True, False]
    line = answer("blueprints", "lineage", "leaf")["lineage"]
    assert [one["name"] for one in line] == ["leaf", "left", "root"]
    assert len(list(tree(Hub.open(storage).lineage(line[0]["blueprint_id"]), ()))) == 3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("blueprints", "ls"), ("storage: no catalogue below", "esper train")),
        (("kernels", "ls"), ("storage: no catalogue below",)),
        (("blueprints", "show", "nothing"), ("no catalogue below",)),
        (("blueprints", "retire", "mine", "--reason", "x"), ("no catalogue below",)),
        (("kernels", "retire", "0123", "--reason", "x"), ("no catalogue below",)),
        (("kernels", "retire", "0123"), ("--reason",)),
        (("blueprints", "submit", "missing.yaml"), ("file: cannot read missing.yaml", "No such file")),
        (("blueprints", "submit", "mine.yaml", "--wait", 1), ("--wait needs a platform", "RAY_ADDRESS")),
        (("blueprints", "submit", "mine.yaml", "--target", "vector-0"), ("no site signature", "feature_map-16x8x8")),
        (("blueprints", "submit", "mine.yaml", "--pipeline", "slow"), ("mine.yaml: pipelines.0", "'optimized'")),
        (("blueprints", "submit", "mine.yaml", "--name", "no name"), ("mine.yaml: name",)),
        (("kernels", "fetch", "0123"), ("no signing key", "--public-key", "kasmina.public_key")),
        (("kernels", "fetch", "0123", "--public-key", "abc"), ("64 hexadecimal digits",)),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_made(esper, storage, file, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = esper(*arguments)
    assert (code, out, err.count("\n")) == (1 if "--wait" in arguments else 2, "", 1), err
    assert [word for word in words if word not in err] == [], err
    assert not (tmp_path / "store" / "events").exists()


@pytest.fixture(scope="module")
def submitted(tmp_path_factory):
    """A folder with a design, and a storage below that it was submitted to: for those who write nothing."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "mine.yaml").write_text(yaml.safe_dump(MINE))
    Hub.open(Storage.at(folder / "store")).submit_blueprint(design(), name="mine", targets=[VECTOR])
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("blueprints", "show", "nothing"), ("blueprint: no blueprint 'nothing'", "esper blueprints ls")),
        (("blueprints", "lineage", "nothing"), ("blueprint: no blueprint 'nothing' (see esper blueprints ls)",)),
        (("blueprints", "submit", "mine.yaml", "--parent", "x"), ("blueprint: no blueprint 'x'",)),
        (("blueprints", "ls", "--order", "size"), ("--order", "'created', 'name' or 'priority'", "'size'")),
        (("blueprints", "ls", "--status", "done"), ("--status", "'UNVALIDATED'", "'DONE'")),
        (("kernels", "ls", "--status", "done"), ("--status", "'VALIDATED'", "'DONE'")),
        (("kernels", "ls", "--signature", "x"), ("signature: 'x' is no site signature",)),
        (("kernels", "ls", "--blueprint", "nothing"), ("no blueprint 'nothing'",)),
        (("kernels", "show", "abcd"), ("kernel: no kernel 'abcd'", "esper kernels ls")),
        (("kernels", "show", "a"), ("kernel: no kernel 'a'",)),
        (("kernels", "retire", "abcd", "--reason", "x"), ("kernel: no kernel 'abcd'", "esper kernels ls")),
        (("blueprints", "retire", "nothing", "--reason", "x"), ("blueprint: no blueprint 'nothing'",)),
    ],
)
def test_what_is_not_there_is_one_line(esper, submitted, monkeypatch, arguments, words):
    monkeypatch.chdir(submitted)
    monkeypatch.setenv("ESPER_STORAGE", str(submitted / "store"))
    code, out, err = esper(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert [word for word in words if word not in err] == [], err
    code, out, _ = esper(*arguments, "--json")
    assert json.loads(out)["error"]["message"]


def test_a_beginning_that_many_share_is_refused_with_their_names(esper, storage):
    ids, pair = {}, None
    for number in range(5000):
        id_ = blueprint_id(f"d{number}", canonical_hash(design()))
        if (other := ids.setdefault(id_[:4], number)) != number:
            pair = (other, number)
            break
    hub = Hub.open(storage)
    one, two = (hub.submit_blueprint(design(), name=f"d{number}", targets=[]).blueprint_id for number in pair)
    code, _, err = esper("blueprints", "show", one[:4])
    assert code == 2
    assert f"could be any of {one[:16]}, {two[:16]}" in err


def test_nothing_is_written_that_does_not_verify(esper, storage, file, tmp_path):
    assert esper("blueprints", "submit", file, "--target", VECTOR.key, "--pipeline", "fast")[0] == 0
    [kernel] = compile_all(storage).kernels()
    out = tmp_path / "out.kernel"
    other = public_hex(Ed25519PrivateKey.generate())
    code, _, err = esper("kernels", "fetch", kernel.kernel_id, "--out", out, "--public-key", other)
    assert (code, "does not match the pinned public key" in err) == (1, True)
    out.write_text("mine")
    code, _, err = esper("kernels", "fetch", kernel.kernel_id, "--out", out)
    assert (code, out.read_text(), "--force" in err) == (2, "mine", True)
    code, _, err = esper("kernels", "fetch", kernel.kernel_id, "--out", tmp_path / "no" / "folder")
    assert (code, "cannot write" in err) == (2, True)
    blob = storage.local / "blobs" / kernel.kernel_id[:2] / kernel.kernel_id
    data = bytearray(blob.read_bytes())
    data[100] ^= 1
    blob.write_bytes(data)
    code, _, err = esper("kernels", "fetch", kernel.kernel_id, "--out", out, "--force")
    assert (code, out.read_text()) == (1, "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "out.kernel", "store"]


SERVING = """
import sys, time
from pathlib import Path
from esper.storage import Storage
from esper.urza.hub import Hub
from esper.urza.rules import blueprint_id
Hub.open(Storage.at(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_storage_that_is_served_is_only_read(esper, storage, file):
    assert esper("blueprints", "submit", file, "--target", VECTOR.key)[0] == 0
    # what Ray's process of an Urza is called begins so
    command = [sys.executable, "-c", SERVING, str(storage.local), "ray::UrzaActor"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout.readline() == "ready\n"
        before = last_epoch(storage)
        for writing in (["blueprints", "submit", file], ["urza", "maintain"]):
            code, _, err = esper(*writing)
            assert (code, f"is served by process {served.pid}" in err) == (2, True), err
        assert esper("blueprints", "ls")[0] == 0
        assert last_epoch(storage) == before
        served.stdin.close()
    assert esper("urza", "maintain")[0] == 0


def test_a_storage_of_another_machine_is_written_only_when_told(esper, storage, file, home, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    Hub.open(storage)
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, err = esper("blueprints", "submit", file, "--storage", storage.local)
    assert (code, "last served from elsewhere" in err, "--take-over" in err) == (2, True, True)
    assert esper("blueprints", "submit", file, "--storage", storage.local, "--take-over")[0] == 0


def last_epoch(storage):
    from esper.urza.events import read_events

    return max(event.epoch for event in read_events(storage))


def test_maintenance_without_a_platform(esper, answer, storage, file):
    for name in ("a1", "b1"):
        esper("blueprints", "submit", file, "--name", name, "--target", VECTOR.key)
    report = answer("urza", "maintain", "--kept-hours", 0)
    assert (report["files_after"], report["problems"]) == (1, [])
    assert report["files_removed"] > 0
    assert len(list((storage.local / "events").glob("*.parquet"))) == 1
    assert "events (schema" in esper("urza", "maintain")[1]


def test_the_tables_for_other_readers_follow_a_submission(esper, storage, file):
    from deltalake import DeltaTable

    esper("blueprints", "submit", file, "--target", VECTOR.key)
    assert DeltaTable(storage.child("blueprints")).to_pyarrow_table()["name"].to_pylist() == ["mine"]


def test_the_shell_completes_names_ids_and_signatures(storage, file, esper, monkeypatch):
    esper("blueprints", "submit", file, "--target", VECTOR.key, "--pipeline", "fast")
    [kernel] = compile_all(storage).kernels()

    monkeypatch.setenv("ESPER_STORAGE", str(storage.local))
    assert options.complete_blueprint("mi") == ["mine"]
    assert options.complete_blueprint("conv_l") == ["conv_light"]
    assert options.complete_kernel(kernel.kernel_id[:5]) == [kernel.kernel_id]
    assert options.complete_signature("vec") == [VECTOR.key]
    assert options.complete_tag("o") == ["own"]
    words = f"esper kernels fetch {kernel.kernel_id[:6]}"
    asked = {"_ESPER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    command = [sys.executable, "-c", "import sys; from jobs.cli import main; main(sys.argv[1:])"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [kernel.kernel_id]
    monkeypatch.setenv("ESPER_STORAGE", str(storage.local / "nothing"))
    assert options.complete_kernel("") == []


@pytest.mark.parametrize(
    ("level", "runs", "words"),
    [
        (0, "ir", "its IR; native code was not kept: 1.31 of eager's time"),
        (1, "native", "native code: 0.81 of eager's"),
    ],
)
def test_what_an_optimized_kernel_runs_from_is_told(esper, answer, storage, level: int, runs: str, words: str):
    hub = Hub.open(storage)
    hub.submit_blueprint(design(), name="mine", targets=[VECTOR], pipelines=[Pipeline.OPTIMIZED])
    record, container = artifact_of(hub.claim("w", fingerprint=BUILD), optimization_level=level)
    hub.complete(hub.claim("w", fingerprint=BUILD), record, container)
    ratio = 0.81 if level else 1.31
    timing = Timing(ratio=ratio, spread=0.1, num_pairs=15, batch=32, native_ms=ratio, eager_ms=1.0)
    hub.benchmark(benchmark(record, timing))
    for command in ("ls", "search"):
        [row] = answer("kernels", command, "--pipeline", "optimized")["kernels"]
        assert row["kernel"]["optimization_level"] == level
        heads, line = esper("kernels", command, "--pipeline", "optimized")[1].splitlines()[:2]
        assert line[heads.index("runs") :].split()[0] == runs
    assert words in esper("kernels", "show", record.kernel_id)[1]
