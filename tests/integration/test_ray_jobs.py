"""The main job as `ray job submit` against a head of its own with token authentication: the README's way on a cluster.

The tests share one head, one storage and so one platform. The first job brings it up, `esper platform down` ends it.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ports import free_ports
from ray_head import REPOSITORY, Head, head, wait_for

from esper.leyline import RunStatus, RunSummary

pytestmark = pytest.mark.ray

CONFIG = """
name: job
seed: 3
data: {type: digits, layout: image}
host: {type: cnn, channels: [4], blocks_per_stage: 1}
budget: {params: 20.0, flops: 20.0}
kasmina: {sites: [stages.0.0], evidence_z: 0.0, min_training_epochs: 1, harm_tolerance: 5.0}
tamiyo: {policy: schedule, schedule: [{epoch: 0, site: stages.0.0, blueprint: residual_conv}], startup_s: 300.0}
tezzeret: {blueprints: [residual_conv], max_workers: 1, optimize: never}
nissa: {view: plain}
"""


@pytest.fixture(scope="module")
def cluster():
    with head() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("jobs")
    (path / "job.yaml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def entrypoint(folder):
    """The command of a job, as the README gives it."""
    store, key = folder / "store", folder / "key.pem"
    return [
        "python", "-m", "jobs.train", "--config", str(folder / "job.yaml"), f"storage={store}",
        f"tezzeret.key_file={key}", f"urza.http.port={free_ports(1)[0]}",
    ]  # fmt: skip


def submit(cluster: Head, name: str, command: list[str], *, wait: bool = True):
    flags = [] if wait else ["--no-wait"]
    return cluster.run(
        "ray", "job", "submit", "--address", cluster.dashboard, "--submission-id", name, *flags,
        "--working-dir", str(REPOSITORY), "--", *command,
    )  # fmt: skip


def ask(cluster: Head, path: str):
    """An answer of the dashboard's HTTP interface."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(cluster.dashboard + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def actors(cluster: Head) -> dict[str, dict]:
    """Living named actors of Esper and of Serve, as the State API tells of them."""
    listed = ask(cluster, "/api/v0/actors?detail=1&limit=1000")["data"]["result"]["result"]
    ours = [each for each in listed if each["ray_namespace"] in {"esper", "serve"}]
    return {each["name"]: each for each in ours if each["state"] == "ALIVE" and each["name"]}


def summary_of(folder: Path, run_id: str) -> RunSummary:
    return RunSummary.model_validate_json((folder / "store" / "runs" / run_id / "summary.json").read_text())


def run_of(cluster: Head, name: str) -> str:
    """The run's id, from the metadata of its job."""
    job = next(job for job in ask(cluster, "/api/jobs/") if job["submission_id"] == name)
    return job["metadata"]["esper_run_id"]


def test_nobody_gets_in_without_the_token(cluster):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.dashboard}/api/jobs/", timeout=60)


@pytest.fixture(scope="module")
def first_run(cluster, entrypoint, folder):
    """The id of the run of the first job. When all is done the platform goes, and must be gone."""
    # its kernel may come late: an epoch takes a tenth of a second, and all stages of a seed take seven
    submitted = submit(cluster, "first", [*entrypoint, "tolaria.epochs=40"])
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    yield run_of(cluster, "first")
    answer = cluster.run("esper", "platform", "down", "--storage", folder / "store")
    assert answer.returncode == 0, answer.stderr
    wait_for(lambda: not actors(cluster), f"the end of {sorted(actors(cluster))}")


def test_a_job_trains_and_leaves_its_platform_up(cluster, first_run, folder):
    summary = summary_of(folder, first_run)
    assert summary.status is RunStatus.FINISHED
    assert summary.events[-1].to_stage == "FOSSILIZED"
    kinds = {name.split("-")[0]: actor["class_name"] for name, actor in actors(cluster).items()}
    assert {kind: kinds.get(kind) for kind in ("oona", "urza", "tezzeret", "nissa")} == {
        "oona": "OonaShard", "urza": "UrzaActor", "tezzeret": "CompileWorker", "nissa": "Nissa",
    }  # fmt: skip


def test_the_platform_says_that_it_lives(cluster, first_run, folder):
    def healthy():
        answer = cluster.run("esper", "platform", "status", "--storage", folder / "store", "--json")
        assert answer.returncode == 0, answer.stderr
        states = json.loads(answer.stdout)
        # the gateway may be on its way still, an actor busy for a moment
        return states if {state["state"] for state in states} == {"alive", "running"} else None

    states = wait_for(healthy, "a platform of which all is well")
    assert {state["name"].split("-")[0] for state in states} >= {"oona", "urza", "tezzeret", "nissa", "tamiyo"}
    assert all(state["detail"] for state in states)


def test_serve_shows_tamiyo(cluster, first_run):
    def running():
        # it may be on its way still
        application = _try(lambda: ask(cluster, "/api/serve/applications/")["applications"]["tamiyo"])
        return application if application is not None and application["status"] == "RUNNING" else None

    application = wait_for(running, "Tamiyo's application")
    assert list(application["deployments"]) == ["Tamiyo"]


def test_a_second_job_shares_the_platform_and_shows_on_the_train_page(cluster, first_run, entrypoint):
    def pids():
        return {name: actor["pid"] for name, actor in actors(cluster).items() if not name.startswith("stop-")}

    def whole():
        found = pids()  # Serve may be on its way still
        return found if any(name.startswith("SERVE") for name in found) else None

    before = wait_for(whole, "Ray Serve")
    submitted = submit(cluster, "second", [*entrypoint, "tolaria.epochs=2", "tolaria.num_workers=1"])
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    after = pids()
    platform = [name for name in before if name.startswith(("oona", "urza", "tezzeret", "nissa", "SERVE"))]
    assert len(platform) >= 5
    assert {name: after.get(name) for name in platform} == {name: before[name] for name in platform}
    run_id = run_of(cluster, "second")

    def shown():
        runs = ask(cluster, "/api/train/v2/runs/v1")["train_runs"]
        return [run["status"] for run in runs if run["name"] == run_id] == ["FINISHED"]

    wait_for(shown, "the run on the Train page")


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_stopped_job_ends_cleanly(cluster, first_run, entrypoint, folder, num_workers):
    name = f"stopped-{num_workers}"
    submit(cluster, name, [*entrypoint, "tolaria.epochs=5000", f"tolaria.num_workers={num_workers}"], wait=False)
    run_id = wait_for(lambda: _try(lambda: run_of(cluster, name)), f"the id of {name}")
    running = wait_for(lambda: _saved(folder, run_id), f"the first checkpoint of {run_id}")
    assert running.status is RunStatus.RUNNING
    alone = cluster.run(*entrypoint, RAY_ADDRESS="")  # it would start a Ray of its own
    assert alone.returncode == 2
    assert "is served by another Ray" in alone.stderr
    stopped = cluster.run("ray", "job", "stop", name, "--address", cluster.dashboard)
    assert stopped.returncode == 0, stopped.stderr
    summary = summary_of(folder, run_id)
    assert summary.status is RunStatus.INTERRUPTED
    assert summary.last_checkpoint is not None
    assert (folder / "store" / "runs" / run_id / summary.last_checkpoint / "manifest.json").exists()
    # its last words: it ended by itself
    assert f"esper train --resume {run_id}" in ask(cluster, f"/api/jobs/{name}/logs")["logs"]


def _saved(folder: Path, run_id: str) -> RunSummary | None:
    path = folder / "store" / "runs" / run_id / "summary.json"
    summary = RunSummary.model_validate_json(path.read_text()) if path.exists() else None
    return summary if summary is not None and summary.last_checkpoint is not None else None


def _try(question):
    try:
        return question()
    except (KeyError, StopIteration, OSError):  # not listed yet, or the dashboard is busy
        return None
