"""The main job from outside: one run of `esper train configs/digits.yaml`, and all that must be true of what it left.

The run is the newcomer's: a process of its own, a Ray of its own, a fresh storage. The tests only read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from deltalake import DeltaTable

from esper import kasmina
from esper.api import checkpoint_host
from esper.config import parse_config
from esper.leyline import RunHistory, RunStatus, RunSummary, SeedStage, container, now
from esper.leyline.keys import load, public_hex
from esper.leyline.lower import lower
from esper.oona.archive import read_archive
from esper.oona.story import story_of
from esper.storage import Storage
from esper.tolaria.workload import Workload
from jobs import cli
from jobs.workload import ConfiguredWorkload

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
ESPER = Path(sys.executable).parent / "esper"
LIFE = ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZING", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]


@dataclass(frozen=True)
class Job:
    """What the process did and left."""

    storage: Path
    key_file: Path
    folder: Path
    began: float
    stdout: str
    stderr: str

    @property
    def summary(self) -> RunSummary:
        return RunSummary.model_validate_json((self.folder / "summary.json").read_text())

    @property
    def public_key(self) -> str:
        pinned = yaml.safe_load((self.folder / "config.yaml").read_text())["kasmina"]["public_key"]
        assert isinstance(pinned, str)
        return pinned

    def seeds(self, stage: SeedStage = SeedStage.FOSSILIZED):
        """The last events of the seeds that reached a stage, in order."""
        return [event for event in self.summary.events if event.to_stage is stage and not event.refused]

    def workload(self) -> Workload:
        return ConfiguredWorkload(parse_config(yaml.safe_load((self.folder / "config.yaml").read_text())))()

    def grown(self) -> torch.nn.Module:
        """The plain grown model, in eval mode."""
        config = parse_config(yaml.safe_load((self.folder / "config.yaml").read_text()))
        return kasmina.export(checkpoint_host(self.workload(), config, directory=str(self.folder))).eval()

    def kernel(self, kernel_id: str) -> container.Kernel:
        """The artifact as it lies in the storage, verified with the pinned key."""
        blob = self.storage / "blobs" / kernel_id[:2] / kernel_id
        assert container.kernel_id_of(blob.read_bytes()) == kernel_id
        return container.unpack(blob.read_bytes(), self.public_key)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    storage = tmp_path_factory.mktemp("main-job")
    key_file = storage / "key.pem"
    began = now()
    patient = "tamiyo.startup_s=300"  # a machine that is busy has few kernels after a minute
    command = [ESPER, "train", "configs/digits.yaml", f"storage={storage}", f"tezzeret.key_file={key_file}", patient]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    (folder,) = (storage / "runs").iterdir()
    return Job(storage, key_file, folder, began, done.stdout, done.stderr)


def test_it_ends_with_a_table_and_the_path_of_the_report(job):
    assert job.folder.name in job.stdout
    assert f"report  {job.folder}/report.html" in " ".join(job.stdout.split("\n")[-6:])
    assert "fossilized" in job.stdout
    assert "Traceback" not in job.stdout + job.stderr
    assert " serve " not in job.stdout + job.stderr  # a line of Ray Serve's log


def test_the_summary_is_what_it_is_documented_to_be(job):
    raw, summary = json.loads((job.folder / "summary.json").read_text()), job.summary
    documented = {
        *("run_id", "task", "seed", "metrics", "params", "events", "ledger", "steps", "compiler_in_trainer"),
        *("bus", "versions"),
    }
    assert documented <= set(raw)
    assert (summary.run_id, summary.task, summary.status) == (job.folder.name, "classification", RunStatus.FINISHED)
    assert job.began <= summary.started_at < summary.finished_at <= now()
    assert 0 < summary.metrics.val_accuracy <= 1
    assert 0 < summary.metrics.test_accuracy <= 1
    flops = summary.ledger.flops
    assert flops.total == flops.host + flops.shadow + flops.telemetry + flops.validation
    assert min(flops.host, flops.shadow, flops.telemetry, flops.validation) > 0
    assert 0 < summary.steps.median_ms <= summary.steps.p99_ms
    assert summary.steps.worst_in_graft_ms is not None
    assert summary.versions["torch"] == torch.__version__


def test_no_compiler_ran_in_the_trainer(job):
    assert job.summary.compiler_in_trainer.model_dump() == {"dynamo_frames": 0, "inductor_compiles": 0}


def test_the_bus_carried_the_signals_to_who_reads_them(job):
    bus = job.summary.bus
    assert 0 < bus.published <= bus.delivered


def test_the_archive_alone_tells_the_story_of_the_run(job):
    """Read without Esper's files of the run and without a bus: only the Delta table of the audit trail."""
    archived = read_archive(Storage.at(job.storage), key=job.folder.name)
    story = story_of(job.folder.name, (row.message for row in archived))
    summary = job.summary
    assert story.events == summary.events
    assert story.rungs == summary.rungs
    assert story.reports == summary.field_reports
    assert [record.epoch for record in story.epochs] == list(range(summary.num_epochs))
    assert story.epochs[-1].val_metric == summary.metrics.val_accuracy
    commanded = {command.seed_id for decision in story.decisions for command in decision.commands}
    assert {event.seed for event in summary.events} <= commanded
    assert len({(row.shard, row.offset) for row in archived}) == len(archived)


def test_a_seed_goes_from_dormant_to_fossilized_with_evidence_and_reasons(job):
    assert job.seeds()
    for last in job.seeds():
        life = [e for e in job.summary.events if (e.site, e.seed) == (last.site, last.seed) and not e.refused]
        life = life[-len(LIFE) :]
        assert [event.to_stage.value for event in life] == LIFE
        assert life[0].from_stage is SeedStage.DORMANT
        assert [event.step for event in life] == sorted(event.step for event in life)
        assert all(event.reason for event in life)
        grafted = life[LIFE.index("GRAFTING")]
        assert grafted.evidence.num_pairs > 0
        assert {event.kernel_id for event in life if event.kernel_id} == {last.kernel_id}
    grown = sum(job.kernel(event.kernel_id).manifest.num_parameters for event in job.seeds())
    assert job.summary.params.final == job.summary.params.start + grown


def test_the_fossil_grew_on_a_kernel_that_tezzeret_signed_and_urza_kept(job):
    assert public_hex(load(job.key_file)) == job.public_key
    assert job.key_file.stat().st_mode & 0o077 == 0
    rows = {row["kernel_id"]: row for row in DeltaTable(job.storage / "kernels").to_pyarrow_table().to_pylist()}
    for event in job.seeds():
        row, kernel = rows[event.kernel_id], job.kernel(event.kernel_id)
        assert row["blueprint_name"] == kernel.manifest.blueprint_name == event.blueprint
        assert row["size_bytes"] == (job.storage / "blobs" / event.kernel_id[:2] / event.kernel_id).stat().st_size
        assert row["fossilized"] >= 1
        assert kernel.manifest.report.passed
        assert job.began <= row["created_at"] <= now()  # built for this run: the storage was empty


def test_the_fossil_has_learned(job):
    plain = job.grown()
    for event in job.seeds():
        weights = plain.get_submodule(f"{event.site}.grown.{event.seed}").state_dict()
        born = job.kernel(event.kernel_id).weights
        assert weights.keys() == born.keys()
        assert not all(torch.equal(weights[name], torch.from_numpy(born[name].copy())) for name in born)


def test_the_exported_site_is_h_plus_r_of_h_by_its_own_weights(job):
    plain, workload = job.grown(), job.workload()
    host = workload.model.eval()
    host.load_state_dict({name: value for name, value in plain.state_dict().items() if ".grown." not in name})
    inputs, _ = workload.test
    for site in dict.fromkeys(event.site for event in job.seeds()):
        seen = {}
        handle = plain.get_submodule(site).register_forward_hook(
            lambda _, args, output, seen=seen: seen.update(x=args[0], y=output)
        )
        with torch.no_grad():
            plain(inputs)
            h = host.get_submodule(site)(seen["x"])
            for event in (event for event in job.seeds(SeedStage.FOSSILIZED) if event.site == site):
                manifest = job.kernel(event.kernel_id).manifest
                r = lower(manifest.ir, manifest.signature).eval()
                r.load_state_dict(plain.get_submodule(f"{site}.grown.{event.seed}").state_dict())
                assert not torch.equal(r(h), torch.zeros_like(h))
                h = r(h) if manifest.replaces else h + r(h)
        handle.remove()
        assert torch.equal(seen["y"], h)


def test_without_r_the_test_accuracy_falls_by_a_point(job):
    plain, (inputs, targets) = job.grown(), job.workload().test

    def accuracy() -> float:
        with torch.no_grad():
            return (plain(inputs).argmax(dim=1) == targets).float().mean().item()

    grown = accuracy()
    assert grown == pytest.approx(job.summary.metrics.test_accuracy)
    for event in job.seeds():
        kernel = plain.get_submodule(f"{event.site}.grown.{event.seed}")
        with torch.no_grad():
            for parameter in kernel.parameters():
                parameter.zero_()
    assert grown - accuracy() >= 0.01


def test_the_report_opens_offline(job):
    page = (job.folder / "report.html").read_text()
    assert page.startswith("<!")
    assert job.folder.name in page
    loads = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc\s*=\s*[\"']?([^\"' >]+)", page, re.IGNORECASE)
    loads += re.findall(r"<link[^>]*\shref\s*=\s*[\"']?([^\"' >]+)", page, re.IGNORECASE)
    loads += re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", page)
    assert [address for address in loads if not address.startswith("data:")] == []
    for event in job.seeds():
        assert event.blueprint in page
    history = RunHistory.model_validate_json((job.folder / "history.json").read_text())
    assert [record.epoch for record in history.epochs] == list(range(job.summary.num_epochs))
    assert len(history.step_ms) == job.summary.steps.count
    assert history.graft_steps


def esper(capsys, *arguments):
    """The command line in this process: what it printed as JSON."""
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments), "--json"])
    assert end.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_runs_can_be_looked_at(job, capsys, tmp_path):
    (row,) = esper(capsys, "runs", "ls", "--storage", job.storage)
    assert (row["run_id"], row["status"], row["fossils"]) == (job.folder.name, "finished", len(job.seeds()))
    shown = esper(capsys, "runs", "show", "latest", "--storage", job.storage)
    assert RunSummary.model_validate(shown) == job.summary
    copy = tmp_path / "again.html"
    assert esper(capsys, "runs", "report", "--storage", job.storage, "--out", copy) == {"report": str(copy)}
    assert copy.read_text().startswith("<!")


WITHOUT_ESPER = """
import sys, importlib.abc, torch
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"esper", "actors", "jobs"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
try:
    import esper
except ModuleNotFoundError:
    model = torch.export.load(sys.argv[1]).module()
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
    print("without esper" if "esper" not in sys.modules else "with esper")
"""


def test_the_exported_file_runs_where_esper_is_not(job, capsys, tmp_path):
    told = esper(capsys, "export", "latest", "--storage", job.storage, "--out", tmp_path / "model.pt2")
    assert told["parameters"] == job.summary.params.final
    inputs, _ = job.workload().test
    torch.save(inputs, tmp_path / "in.pt")
    arguments = [str(tmp_path / name) for name in ("model.pt2", "in.pt", "out.pt")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ESPER, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout == "without esper\n", done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), job.grown()(inputs))
