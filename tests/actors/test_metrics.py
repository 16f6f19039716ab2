"""Nissa's metrics on Ray's own endpoint, read by a real Prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from functools import partial
from http.client import HTTPException
from pathlib import Path

import pytest
import ray
from nissa_story import artifact
from ports import free_ports
from test_nissa_metrics import DASHBOARD, queries
from urza_samples import design

from actors import nissa, oona, urza
from actors.cluster import disconnect
from esper.config import OonaConfig
from esper.leyline import EpochRecord, FieldReport, LifecycleEvent, OonaMessage, Outcome, SeedStage, Topic
from esper.leyline.kernels import SiteKind, SiteSignature
from esper.leyline.signals import HealthSignal, LayerHealthReport, StepBatch
from esper.nissa.metrics import METRICS

pytestmark = pytest.mark.ray

RUN = "run-metrics"
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=4)
WAIT_S = 240.0
BACKLOG = 100


def published():
    for epoch in range(3):
        yield Topic.EPOCH, EpochRecord(
            run_id=RUN, epoch=epoch, num_epochs=3, step=10 * (epoch + 1), train_loss=0.5, val_loss=0.25, params=77,
            val_metric=0.75, metric_name="accuracy", total_flops=1000 * (epoch + 1), rollbacks=1,
            flops_by_purpose={"host": 900 * (epoch + 1), "shadow": 100 * (epoch + 1)},
            seconds_by_purpose={"host": 0.5 * (epoch + 1)}, cache_hits=2, cache_misses=1, flops_per_sample=12,
        )  # fmt: skip
        signal = HealthSignal(
            layer_id="a", seed_id="s", epoch=epoch, stage=SeedStage.GRAFTING, alpha=0.5, blueprint="b", runs=11,
            latency_ms=0.25, health_score=0.5, grow_potential=0.125, train_loss=0.75,
        )  # fmt: skip
        step = 10 * (epoch + 1)
        yield (
            Topic.SEED_HEALTH,
            LayerHealthReport(run_id=RUN, layer_id="a", signature=SITE, epoch=epoch, step=step, seeds=(signal,)),
        )
        yield Topic.STEPS, StepBatch(run_id=RUN, first_step=step - 10, losses=(0.5,) * 10, milliseconds=(4.0,) * 10)
    yield Topic.KERNEL_READY, artifact("b", SITE).model_copy(update={"compile_s": 2.5})
    yield Topic.LIFECYCLE, LifecycleEvent(
        run_id=RUN, step=5, epoch=0, site="a", seed="s", from_stage=SeedStage.TRAINING, to_stage=SeedStage.GRAFTING,
        reason="no", refused=True,
    )  # fmt: skip
    yield Topic.LIFECYCLE, LifecycleEvent(
        run_id=RUN, step=10, epoch=1, site="a", seed="s", from_stage=SeedStage.FINE_TUNING,
        to_stage=SeedStage.FOSSILIZED, reason="proven",
    )  # fmt: skip
    yield Topic.FIELD_REPORTS, FieldReport(
        run_id=RUN, site="a", seed_id="s", signature=SITE, blueprint_id="b", blueprint="b", kernel_id="k",
        outcome=Outcome.FOSSILIZED,
    )  # fmt: skip


def trouble(bus):
    """One message is given up, one comes again, and some give way to newer ones."""
    picky = bus.subscribe([Topic.EPOCH], group="picky", from_start=True)
    picky.reject(picky.poll(max_messages=1, timeout_s=WAIT_S), reason="no")
    gone = bus.subscribe([Topic.LIFECYCLE], group="gone", from_start=True)
    assert gone.poll(timeout_s=WAIT_S)
    gone.close()  # without a word
    again = bus.subscribe([Topic.LIFECYCLE], group="gone")
    again.ack(again.poll(timeout_s=WAIT_S))
    slow = bus.subscribe([Topic.STEPS], group="slow", from_start=True)
    for first in range(0, 4 * BACKLOG, BACKLOG // 2):
        late = [
            StepBatch(run_id="run-other", first_step=i, losses=(1.0,), milliseconds=(1.0,))
            for i in range(first, first + BACKLOG // 2)
        ]
        bus.publish([OonaMessage.of(Topic.STEPS, body, sender_id="t", key="run-other") for body in late])
        bus.flush(timeout_s=WAIT_S)
    for subscription in (picky, again, slow):
        subscription.close()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The address of Ray's metrics on this node, where a Nissa exports what is on a bus."""
    context = ray.init(
        "local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False, namespace="esper"
    )
    try:
        handle = oona.spawn(OonaConfig(backlog=BACKLOG), tmp_path_factory.mktemp("oona"), prefix="oona-metrics")
        address = str(tmp_path_factory.mktemp("urza"))
        hub = urza.spawn(address)
        view = nissa.spawn(handle.bus, partial(urza.connect, address), metrics_every_s=0.5)
        bus = handle.bus()
        bus.publish([OonaMessage.of(topic, body, sender_id="t", key=RUN) for topic, body in published()])
        bus.flush(timeout_s=WAIT_S)
        trouble(bus)
        # no compiler runs here, so it stays in the queue
        urza.connect(address).submit_blueprint(design(), name="queued", targets=[SITE])
        assert view.drain(RUN, timeout_s=WAIT_S) is not None
        [node] = ray.nodes()
        yield f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        bus.close()
        del hub, context
    finally:
        disconnect()


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read().decode()


def until(condition, what):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except (OSError, HTTPException):  # it does not listen yet, or is too busy to answer
            pass
        time.sleep(0.5)
    raise AssertionError(f"not within {WAIT_S:.0f} s, or not that: {what}")


def test_ray_exports_what_nissa_knows(endpoint):
    expected = {
        "ray_esper_run_lossval": 0.25,
        "ray_esper_run_scoreval": 0.75,
        "ray_esper_run_parameters": 77,
        "ray_esper_run_epochs_total": 3,
        "ray_esper_run_flops_total": 3000,
        "ray_esper_adaptations_total": 1,
    }
    seen = []

    def exported():
        """All of them: they come one by one, and a first export may lie in the middle of the run."""
        lines = get(f"http://{endpoint}/metrics").splitlines()
        mine = [line for line in lines if line.startswith("ray_esper_") and f'run="{RUN}"' in line]
        values = {line.split("{")[0] + ("val" if 'split="val"' in line else ""): line.split()[-1] for line in mine}
        seen[:] = [{name: float(values[name]) for name in expected if name in values}]
        return seen == [expected]

    until(exported, seen)


def test_ray_exports_cpu_and_memory_of_the_actors(endpoint):
    """By what the dashboard's panels ask for: Ray names a process after its actor."""
    actors = ("Nissa", "OonaShard", "UrzaActor")

    def exported():
        lines = get(f"http://{endpoint}/metrics").splitlines()
        return all(
            any(line.startswith(f"ray_component_{figure}{{") and f'Component="ray::{actor}' in line for line in lines)
            for figure in ("cpu_percentage", "uss_bytes")
            for actor in actors
        )

    until(exported, "figures of the actors' processes")


def test_every_metric_reaches_the_endpoint(endpoint):
    missing = []

    def exported():
        lines = get(f"http://{endpoint}/metrics").splitlines()
        names = {line.split("{")[0] for line in lines if line.startswith("ray_esper_")}
        missing[:] = sorted({metric.exported for metric in METRICS.values()} - names)
        return not missing

    until(exported, missing)


@pytest.fixture
def prometheus(endpoint, tmp_path):
    """The address of a Prometheus that scrapes the node."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    port = free_ports(1)[0]
    rules = Path(DASHBOARD).parents[1] / "prometheus" / "alerts.yml"
    (tmp_path / "prometheus.yml").write_text(
        json.dumps(
            {
                # a scrape may take no longer than the interval: what was seen before is gone where one does
                "global": {"scrape_interval": "3s", "evaluation_interval": "1s"},
                "rule_files": [str(rules)],
                "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [endpoint]}]}],
            }
        )
    )
    settings = {
        "config.file": tmp_path / "prometheus.yml",
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    with (tmp_path / "log").open("w") as log:
        command = ["prometheus", *(f"--{name}={value}" for name, value in settings.items())]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(120)


def test_prometheus_answers_every_query_of_the_dashboard(prometheus):
    def ask(query):
        return json.loads(get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))["data"][
            "result"
        ]

    def value(query):
        """None where there is none yet."""
        found = ask(query)
        assert len(found) < 2
        return float(found[0]["value"][1]) if found else None

    loss = f'ray_esper_run_loss{{run="{RUN}", split="val"}}'
    assert until(lambda: value(loss), "a scrape") == 0.25
    for query in queries(json.loads(DASHBOARD.read_text())):
        if not query.startswith("label_values("):  # Grafana's own
            ask(query.replace("$run", ".*"))  # a query that does not parse is an HTTP error
    progress = (f'ray_esper_run_epochs_total{{run="{RUN}"}} / on (run) group_left () '
                f'max by (run) (ray_esper_run_planned_epochs{{run="{RUN}"}})')  # fmt: skip
    until(lambda: value(progress) == 1.0, "the last epoch")
    kernel = f'{{run="{RUN}", site="a", blueprint="b"}}'
    expected = {
        f"ray_esper_kernel_runs_total{kernel}": 33,
        f"ray_esper_kernel_latency_seconds{kernel}": 0.00025,
        f'ray_esper_site_grow_potential{{run="{RUN}", site="a"}}': 0.125,
        f'ray_esper_run_step_seconds{{run="{RUN}"}}': 0.004,
        f'ray_esper_ledger_flops_total{{run="{RUN}", purpose="shadow"}}': 300,
        f'ray_esper_ledger_seconds_total{{run="{RUN}", purpose="host"}}': 1.5,
        f'ray_esper_run_rollbacks_total{{run="{RUN}"}}': 1,
        f'ray_esper_transitions_total{{run="{RUN}", stage="{SeedStage.FOSSILIZED.value}"}}': 1,
        f'ray_esper_run_cache_lookups_total{{run="{RUN}", result="hit"}}': 2,
        'sum(ray_esper_compile_jobs{state="queued"})': 1,
        "sum(ray_esper_compiled_kernels_total)": 1,
        "sum(ray_esper_compile_seconds_total)": 2.5,
        'ray_esper_bus_lag_messages{group="slow"} > bool 0': 1,
        'ray_esper_bus_dropped_total{group="slow"} > bool 0': 1,
        'sum(ray_esper_bus_redelivered_total{group="gone"}) > bool 0': 1,
        'ray_esper_bus_dead_total{group="picky"}': 1,
    }
    found = {}

    def as_expected():
        found.update({query: value(query) for query in expected})
        return found == expected

    until(as_expected, found)
    states = {
        rule["name"]: rule["health"]
        for group in json.loads(get(f"{prometheus}/api/v1/rules"))["data"]["groups"]
        for rule in group["rules"]
    }
    assert len(states) == 6
    assert set(states.values()) <= {"ok", "unknown"}
