"""What is exported follows from what Nissa knows; the dashboard and the alerts ask for nothing else."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from nissa_story import RUN, SITES, events, messages

from esper.leyline.bus import BusStats, GroupStats, TopicStats
from esper.leyline.catalogue import Backlog
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import CircuitState, HealthSignal, LayerHealthReport, Outcome
from esper.nissa.live import Live, fold
from esper.nissa.metrics import METRICS, Kind, Sample, Totals, of_backlog, of_bus, of_compiled, of_run, vanished
from esper.nissa.viewmodel import LiveView

CONFIGS = Path(__file__).parents[3] / "configs"
DASHBOARD, ALERTS = CONFIGS / "grafana" / "esper.json", CONFIGS / "prometheus" / "alerts.yml"
NAME = re.compile(r"ray_esper_[a-z_]+")


def heard():
    live = Live()
    for message in messages():
        live.apply(message)
    return live


def told():
    live = heard()
    [run_id] = live.run_ids()
    return live.view(run_id)


def by_key(samples):
    found = {}
    for sample in samples:
        assert sample.key not in found, f"two values for {sample}"
        found[sample.key] = sample.value
    return found


def value(found, name, /, **labels):
    return found[name, frozenset(labels.items()), ""]


def test_a_run_is_told_in_figures():
    view = told()
    found = by_key(of_run(view))
    run = view.run_id
    assert value(found, "esper_run_epochs", run=run) == view.epochs_done > 0
    assert value(found, "esper_run_loss", run=run, split="val") == view.last.val_loss
    assert value(found, "esper_run_score", run=run, split="val", metric=view.last.metric_name) == view.last.val_metric
    assert value(found, "esper_run_parameters", run=run) == view.params
    entered = Counter(event.to_stage for event in events() if not event.refused)
    for stage, number in entered.items():
        assert value(found, "esper_transitions", run=run, stage=stage.value) == number
    assert value(found, "esper_refused_transitions", run=run) == sum(event.refused for event in events())
    hits, misses = (value(found, "esper_run_cache_lookups", run=run, result=name) for name in ("hit", "miss"))
    assert (hits, misses) == (view.last.cache_hits, view.last.cache_misses)
    assert value(found, "esper_run_rollbacks", run=run) == view.last.rollbacks
    silent = replace(view, last=view.last.model_copy(update={"tamiyo": CircuitState.OPEN}))
    assert (value(found, "esper_run_tamiyo_circuit", run=run), value(found, "esper_run_urza_circuit", run=run)) == (
        0,
        0,
    )
    assert value(by_key(of_run(silent)), "esper_run_tamiyo_circuit", run=run) == 2
    for purpose, flops in view.last.flops_by_purpose.items():
        assert value(found, "esper_ledger_flops", run=run, purpose=purpose) == flops
    assert value(found, "esper_ledger_flops", run=run, purpose="host") > 0
    assert value(found, "esper_ledger_seconds", run=run, purpose="control") == view.last.seconds_by_purpose["control"]
    stages = [number for (metric, *_), number in found.items() if metric == "esper_seeds"]
    assert sum(stages) == len(view.seeds) > 0
    assert {
        site for metric, labels, _ in found if metric == "esper_seed_alpha" for key, site in labels if key == "site"
    } == {seed.site for seed in view.seeds.values()}


def test_runs_of_kernels_are_summed_over_epochs_and_their_latency_is_the_last():
    found = by_key(of_run(told()))
    told_of = [m.body() for m in messages() if m.topic is Topic.SEED_HEALTH]
    ran = [(report.layer_id, seed) for report in told_of for seed in report.seeds if seed.runs]
    [(site, design)] = {(site, seed.blueprint) for site, seed in ran}
    kernel = {"run": RUN, "site": site, "blueprint": design}
    assert value(found, "esper_kernel_runs", **kernel) == sum(seed.runs for _, seed in ran) > 0
    assert value(found, "esper_kernel_latency_seconds", **kernel) == pytest.approx(ran[-1][1].latency_ms / 1e3)
    assert len([key for key in found if key[0] == "esper_kernel_runs"]) == 1  # no kernel ran anywhere else


def test_a_site_whose_seed_lives_again_keeps_the_runs_of_its_first_design():
    live = Live()
    view = LiveView(run_id=RUN)
    for step, design, runs, latency in ((1, "a", 5, 0.5), (2, "a", 5, None), (3, "b", 2, 0.25), (4, None, 1, None)):
        signal = HealthSignal(layer_id="s", seed_id="s0", epoch=step, blueprint=design, runs=runs, latency_ms=latency)
        report = LayerHealthReport(
            run_id=RUN, layer_id="s", signature=SITES["stages.0"], epoch=step, step=step, seeds=(signal,)
        )
        view = fold(view, report, 0.0)
        live.apply(OonaMessage.of(Topic.SEED_HEALTH, report, sender_id="t", key=RUN))
    assert [(r.blueprint, r.num, r.latency_ms) for r in view.kernel_runs] == [("a", 10, 0.5), ("b", 3, 0.25)]
    assert live.view(RUN).kernel_runs == view.kernel_runs


def test_a_long_log_that_is_read_again_counts_nothing_twice():
    """Of telemetry there is more than is remembered; what is counted stands on topics of its own, or has a step."""
    live = Live(max_ids=40)
    assert len(messages()) > 3 * 40
    exported = []
    for _ in range(2):
        for message in messages():
            live.apply(message)
        view = live.view(RUN)
        counters = [s for s in (*of_run(view), *of_compiled(live.compiled())) if METRICS[s.metric].kind is Kind.COUNTER]
        exported.append({sample.key: sample.value for sample in counters})
    assert exported[0] == exported[1]
    assert {key[0] for key in exported[0]} >= {"esper_kernel_runs", "esper_transitions", "esper_compiled_kernels"}


def test_kernels_that_were_compiled_are_counted_with_their_seconds_once():
    live = heard()
    for message in messages():  # delivered again
        live.apply(message)
    kernels = [m.body() for m in messages() if m.topic is Topic.KERNEL_READY]
    found = by_key(of_compiled(live.compiled()))
    [pipeline] = {kernel.pipeline.value for kernel in kernels}
    assert value(found, "esper_compiled_kernels", pipeline=pipeline) == len(kernels) > 0
    assert value(found, "esper_compile_seconds", pipeline=pipeline) == pytest.approx(sum(k.compile_s for k in kernels))


def test_every_sample_is_of_the_table():
    stats = BusStats(
        num_shards=1,
        topics=(TopicStats(topic="t", published=3, kept_bytes=5),),
        groups=(GroupStats(group="g", topics=("t",), pending=2, delivered=1),),
    )
    backlog = Backlog(queued={"cpu": 2}, leased={"cpu": 1})
    samples = [*of_run(told()), *of_bus(stats), *of_backlog(backlog), *of_compiled(heard().compiled())]
    for sample in samples:
        assert set(sample.labels) == set(METRICS[sample.metric].labels), sample
        assert all(isinstance(label, str) for label in sample.labels.values())
        assert math.isfinite(sample.value)
    assert {sample.metric for sample in samples} >= set(METRICS) - {"esper_seed_train_loss"}


def test_what_lives_as_long_as_a_process_shares_a_label_and_its_counts_stay():
    """Listeners come and go without end, and Prometheus keeps every label for ever."""

    def stats(**delivered):
        groups = [
            GroupStats(group=f"{name[:-1]}-{name[-1] * 32}", topics=("t",), delivered=num, pending=num)
            for name, num in delivered.items()
        ]
        return [*of_bus(BusStats(num_shards=1, groups=(*groups, GroupStats(group="fixed-1", topics=("t",)))))]

    def delivered(totals, samples):
        steps = [totals.step(sample) for sample in samples if sample.metric == "esper_bus_delivered"]
        totals.forget(samples)
        return sum(steps)

    samples = stats(listenera=5, listenerb=2, nissac=1)
    assert {sample.labels["group"] for sample in samples} == {"listener", "nissa", "fixed-1"}
    lags = {s.labels["group"]: s.value for s in samples if s.metric == "esper_bus_lag_messages"}
    assert lags == {"listener": 7, "nissa": 1, "fixed-1": 0}
    totals = Totals()
    assert delivered(totals, samples) == 8
    assert delivered(totals, stats(listenera=6, listenerb=2, nissac=1)) == 1
    assert delivered(totals, stats(listenerb=3, listenerd=2)) == 3  # one went with what it had
    assert delivered(totals, []) == 0  # the bus did not answer
    assert delivered(totals, stats(listenerb=3, listenerd=2)) == 0
    assert len([key for key in totals._totals if key[0] == "esper_bus_delivered"]) == 2


def test_what_is_gone_is_none_of_what_is_counted_and_unknown_of_what_is_measured():
    counted = Sample("esper_seeds", 2.0, {"run": "r", "stage": "training"})
    measured = Sample("esper_run_loss", 0.5, {"run": "r", "split": "val"})
    total = Sample("esper_run_steps", 7.0, {"run": "r"})
    kept = Sample("esper_run_parameters", 9.0, {"run": "r"})
    gone = list(vanished([counted, measured, total, kept], [kept._replace(value=10.0)]))
    assert [(sample.metric, sample.key) for sample in gone] == [(s.metric, s.key) for s in (counted, measured)]
    assert gone[0].value == 0.0
    assert math.isnan(gone[1].value)


def test_names_are_as_prometheus_wants_them():
    for metric in METRICS.values():
        assert re.fullmatch(r"esper_[a-z_]+[a-z]", metric.name)
        assert not metric.name.endswith("_total")  # Ray adds it
        assert metric.help.endswith(".")
        assert (metric.kind is Kind.COUNTER) == metric.exported.endswith("_total")


def queries(dashboard):
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (annotation["expr"] for annotation in dashboard["annotations"]["list"])
    yield from (v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query")


def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it():
    exported = {metric.exported for metric in METRICS.values()}
    asked = {name for query in queries(json.loads(DASHBOARD.read_text())) for name in NAME.findall(query)}
    assert asked - exported == set()
    assert exported - asked <= {"ray_esper_bus_delivered_total"}


def test_the_alerts_ask_for_what_is_exported():
    asked = set(NAME.findall(ALERTS.read_text()))
    assert asked
    assert asked <= {metric.exported for metric in METRICS.values()}


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def asks(expr, at, labels, *, rises):
    """A question to promtool, and whether there is one answer, 1, or none."""
    return {"expr": expr, "eval_time": at, "exp_samples": [{"labels": labels, "value": 1}] if rises else []}


@needs_promtool
def test_the_first_of_its_kind_is_noticed_too(tmp_path):
    """A counter is not exported before its first count: `increase` would see nothing rise."""
    outcome = "ray_esper_adaptations_total{{run='r', outcome='{}'}}".format
    firsts = {
        "Grafted": f"ray_esper_transitions_total{{run='r', stage='{SeedStage.GRAFTING.value}'}}",
        "Fossilized": outcome(Outcome.FOSSILIZED.value),
        "Culled": outcome(Outcome.CULLED.value),
        "Rolled back": "ray_esper_run_rollbacks_total{run='r'}",
        "Alert": "ray_esper_alerts{run='r', kind='loss_spike'}",
    }
    drawn = json.loads(DASHBOARD.read_text())["annotations"]["list"]
    annotations = {annotation["name"]: annotation["expr"].replace("$run", "r") for annotation in drawn}
    assert annotations.keys() == firsts.keys()
    silent = {
        "ray_esper_run_updated_timestamp_seconds{run='r'}": "0x120",
        "ray_esper_run_planned_epochs{run='r'}": "3x120",
    }
    series = {**dict.fromkeys([*firsts.values(), "ray_esper_bus_dead_total{group='g'}"], "_x40 1x80"), **silent}
    series[firsts["Rolled back"]] = "_x40 1x10 2x70"
    questions = [
        asks(
            annotations[name],
            at,
            "{run='r', kind='loss_spike'}" if name == "Alert" else "{run='r'}",
            rises=at == "10m15s",
        )
        for name in firsts
        for at in ("9m", "10m15s", "11m")
    ]
    for alert, before, after in (
        ("EsperDeadLetters", "9m", "11m"),
        ("EsperRollbacks", "11m", "14m"),
        ("EsperRunSilent", "4m", "7m"),  # it hangs before its first epoch has ended
    ):
        firing = f"count(ALERTS{{alertname='{alert}', alertstate='firing'}})"
        questions += [asks(firing, before, "{}", rises=False), asks(firing, after, "{}", rises=True)]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    tests = [{"interval": "15s", "input_series": inputs, "promql_expr_test": questions}]
    (tmp_path / "tests.yml").write_text(
        json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "15s", "tests": tests})
    )
    command = ["promtool", "test", "rules", tmp_path / "tests.yml"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr + checked.stdout


@needs_promtool
def test_prometheus_takes_the_alert_rules():
    checked = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr + checked.stdout
