"""What is measured for Prometheus: one table of metrics, and how their values follow from what Nissa and the bus know.

Pure: `actors/metrics.py` hands the samples to Ray, whose agents on every node export them with the prefix `ray_`.
Counters end in `_total` there. Values are taken every few seconds from what is folded already: no signal pays for it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.bus import BusStats
from esper.leyline.catalogue import Backlog
from esper.leyline.kernels import Pipeline
from esper.leyline.signals import CircuitState
from esper.nissa.live import Compiled
from esper.nissa.viewmodel import LiveView, SeedView


class Kind(StrEnum):
    """How a metric behaves: a counter only rises, a gauge is what it is now."""

    GAUGE = "gauge"
    COUNTER = "counter"


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: as Ray is told; a base unit or what is counted comes last, as Prometheus recommends.
        help: what it says, with its unit.
        labels: that every sample has.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """Its name on Ray's endpoint."""
        return f"ray_{self.name}" + ("_total" if self.kind is Kind.COUNTER else "")


class Sample(NamedTuple):
    """A value of a metric. That of a counter is its total so far, not what was added.

    Attributes:
        part: of several things under the same labels, which; only counters have such, and their sum is exported.
    """

    metric: str
    value: float
    labels: Mapping[str, str]
    part: str = ""

    @property
    def key(self) -> tuple[str, frozenset[tuple[str, str]], str]:
        """What is the same at the next sample of the same thing."""
        return self.metric, frozenset(self.labels.items()), self.part


_RANDOM = re.compile(r"-[0-9a-f]{12,32}$")  # see `esper.leyline.contract.new_id`

_RUN, _SITE, _KERNEL = ("run",), ("run", "site"), ("run", "site", "blueprint")

METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("esper_run_loss", Kind.GAUGE, "Mean loss of the last epoch, by split.", ("run", "split")),
            Metric(
                "esper_run_score",
                Kind.GAUGE,
                "The task's headline metric at the last epoch, by split; accuracy as a share.",
                ("run", "split", "metric"),
            ),
            Metric("esper_run_epochs", Kind.COUNTER, "Epochs that have ended.", _RUN),
            Metric("esper_run_planned_epochs", Kind.GAUGE, "Epochs the run was asked for.", _RUN),
            Metric("esper_run_steps", Kind.COUNTER, "Optimizer steps done.", _RUN),
            Metric("esper_run_step_seconds", Kind.GAUGE, "Median seconds of a recent optimizer step.", _RUN),
            Metric("esper_run_updated_timestamp_seconds", Kind.GAUGE, "When the run was last heard of.", _RUN),
            Metric("esper_run_parameters", Kind.GAUGE, "Trainable parameters on the live path.", _RUN),
            Metric("esper_run_sample_flops", Kind.GAUGE, "Forward FLOPs of the live path for one sample.", _RUN),
            Metric("esper_run_flops", Kind.COUNTER, "FLOPs of everything so far: the ledger's total.", _RUN),
            Metric("esper_ledger_flops", Kind.COUNTER, "FLOPs so far, by purpose of the ledger.", ("run", "purpose")),
            Metric(
                "esper_ledger_seconds",
                Kind.COUNTER,
                "Seconds of the trainer so far, by purpose of the ledger.",
                ("run", "purpose"),
            ),
            Metric("esper_run_rollbacks", Kind.COUNTER, "Returns of a run to its last good state.", _RUN),
            Metric(
                "esper_run_kernels",
                Kind.GAUGE,
                "Kernels for the run's sites: ready, or on their way.",
                ("run", "state"),
            ),
            Metric(
                "esper_run_urza_circuit",
                Kind.GAUGE,
                "The trainer's circuit breaker towards Urza: 0 closed, 1 half open, 2 open.",
                _RUN,
            ),
            Metric(
                "esper_run_tamiyo_circuit",
                Kind.GAUGE,
                "The trainer's circuit breaker towards Tamiyo: 0 closed, 1 half open, 2 open.",
                _RUN,
            ),
            Metric("esper_seeds", Kind.GAUGE, "Seeds by stage.", ("run", "stage")),
            Metric("esper_adaptations", Kind.COUNTER, "Adaptations that ended, by outcome.", ("run", "outcome")),
            Metric(
                "esper_transitions",
                Kind.COUNTER,
                "Seeds that entered a stage, by stage; GRAFTING is a graft, CULLED a cull.",
                ("run", "stage"),
            ),
            Metric("esper_refused_transitions", Kind.COUNTER, "Transitions that a gate refused.", _RUN),
            Metric(
                "esper_run_cache_lookups",
                Kind.COUNTER,
                "Look-ups in the trainer's kernel cache, by result: hit or miss.",
                ("run", "result"),
            ),
            Metric(
                "esper_kernel_runs",
                Kind.COUNTER,
                "Forwards of kernels on the live path, by site and design.",
                _KERNEL,
            ),
            Metric(
                "esper_kernel_latency_seconds",
                Kind.GAUGE,
                "Mean seconds of such a forward on the sampled steps of the last epoch that had any.",
                _KERNEL,
            ),
            Metric("esper_seed_alpha", Kind.GAUGE, "How far a site's seed is blended in, 0 to 1.", _SITE),
            Metric("esper_seed_train_loss", Kind.GAUGE, "Loss of a seed's own training.", _SITE),
            Metric("esper_site_health", Kind.GAUGE, "Health score of a site, 0 to 1.", _SITE),
            Metric(
                "esper_site_grow_potential",
                Kind.GAUGE,
                "Norm of the loss gradient at a zero-initialised layer placed there.",
                _SITE,
            ),
            Metric(
                "esper_alerts",
                Kind.GAUGE,
                "Alerts that last, by kind; those of no run under platform.",
                ("run", "kind"),
            ),
            Metric("esper_compile_jobs", Kind.GAUGE, "Kernels to be compiled, by device.", ("device", "state")),
            Metric("esper_compiled_kernels", Kind.COUNTER, "Kernels that were compiled, by pipeline.", ("pipeline",)),
            Metric("esper_compile_seconds", Kind.COUNTER, "Seconds that they took, by pipeline.", ("pipeline",)),
            Metric("esper_bus_published", Kind.COUNTER, "Messages published, by topic.", ("topic",)),
            Metric("esper_bus_kept_bytes", Kind.GAUGE, "Bytes of messages that can still be read.", ("topic",)),
            Metric("esper_bus_delivered", Kind.COUNTER, "Deliveries to a group.", ("group",)),
            Metric("esper_bus_redelivered", Kind.COUNTER, "Deliveries that were repeated.", ("group",)),
            Metric("esper_bus_dropped", Kind.COUNTER, "Messages that gave way to newer ones.", ("group",)),
            Metric("esper_bus_dead", Kind.COUNTER, "Messages that a group gave up.", ("group",)),
            Metric("esper_bus_lag_messages", Kind.GAUGE, "Messages that a group has not acknowledged.", ("group",)),
        )
    }
)
"""Every metric, by name."""

_CIRCUIT = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}

COUNTED = frozenset(
    {"esper_seeds", "esper_run_kernels", "esper_alerts", "esper_compile_jobs", "esper_bus_lag_messages"}
)
"""Gauges that count: absent is none."""


def of_run(view: LiveView) -> Iterator[Sample]:
    """The samples of one run; what was not heard of yet is left out."""
    run = {"run": view.run_id}
    yield Sample("esper_run_planned_epochs", view.num_epochs, run)
    yield Sample("esper_run_epochs", view.epochs_done, run)
    yield Sample("esper_run_steps", view.step, run)
    yield Sample("esper_run_updated_timestamp_seconds", view.updated_at, run)
    yield Sample("esper_run_parameters", view.params, run)
    yield Sample("esper_run_kernels", view.kernels_ready, {**run, "state": "ready"})
    yield Sample("esper_run_kernels", view.kernels_pending, {**run, "state": "pending"})
    if view.step_ms is not None:
        yield Sample("esper_run_step_seconds", view.step_ms / 1e3, run)
    yield from _of_last_epoch(view, run)
    yield from of_alerts(view.run_id, view.alerts.values())
    for stage, num in Counter(seed.stage for seed in view.seeds.values()).items():
        yield Sample("esper_seeds", num, {**run, "stage": stage.value})
    for stage, num in view.entered.items():
        yield Sample("esper_transitions", num, {**run, "stage": stage.value})
    yield Sample("esper_refused_transitions", view.num_refused, run)
    for outcome, num in view.outcomes.items():
        yield Sample("esper_adaptations", num, {**run, "outcome": outcome.value})
    for runs in view.kernel_runs:
        kernel = {**run, "site": runs.site, "blueprint": runs.blueprint}
        yield Sample("esper_kernel_runs", runs.num, kernel)
        if runs.latency_ms is not None:
            yield Sample("esper_kernel_latency_seconds", runs.latency_ms / 1e3, kernel)
    for seed in _latest_by_site(view.seeds.values()):
        place = {**run, "site": seed.site}
        yield Sample("esper_seed_alpha", seed.alpha, place)
        figures = {
            "esper_seed_train_loss": seed.train_loss,
            "esper_site_health": seed.health_score,
            "esper_site_grow_potential": seed.grow_potential,
        }
        yield from (Sample(name, value, place) for name, value in figures.items() if value is not None)


def of_alerts(run_id: str, alerts: Iterable[Alert]) -> Iterator[Sample]:
    """The alerts of one run that last, or with an empty id those of none; 0 of a kind that there is none of."""
    counts = Counter(alert.kind for alert in alerts if alert.is_open and alert.run_id == run_id)
    for kind in AlertKind:
        yield Sample("esper_alerts", counts[kind], {"run": run_id or "platform", "kind": kind.value})


def _latest_by_site(seeds: Iterable[SeedView]) -> Iterable[SeedView]:
    """A site may have had several seeds; the one last heard of speaks for it."""
    latest: dict[str, SeedView] = {}
    for seed in seeds:
        known = latest.setdefault(seed.site, seed)
        if (seed.health_step, seed.stage_step) > (known.health_step, known.stage_step):
            latest[seed.site] = seed
    return latest.values()


def _of_last_epoch(view: LiveView, run: Mapping[str, str]) -> Iterator[Sample]:
    last = view.last
    if last is None:
        return
    yield Sample("esper_run_flops", last.total_flops, run)
    yield Sample("esper_run_rollbacks", last.rollbacks, run)
    for purpose, flops in last.flops_by_purpose.items():
        yield Sample("esper_ledger_flops", flops, {**run, "purpose": purpose})
    for purpose, seconds in last.seconds_by_purpose.items():
        yield Sample("esper_ledger_seconds", seconds, {**run, "purpose": purpose})
    yield Sample("esper_run_urza_circuit", _CIRCUIT[last.urza], run)
    yield Sample("esper_run_tamiyo_circuit", _CIRCUIT[last.tamiyo], run)
    yield Sample("esper_run_sample_flops", last.flops_per_sample, run)
    yield Sample("esper_run_cache_lookups", last.cache_hits, {**run, "result": "hit"})
    yield Sample("esper_run_cache_lookups", last.cache_misses, {**run, "result": "miss"})
    for split, loss in (("train", last.train_loss), ("val", last.val_loss)):
        if loss is not None:
            yield Sample("esper_run_loss", loss, {**run, "split": split})
    for split, score in (("train", last.train_metric), ("val", last.val_metric)):
        if score is not None and last.metric_name is not None:
            yield Sample("esper_run_score", score, {**run, "split": split, "metric": last.metric_name})


def of_bus(stats: BusStats) -> Iterator[Sample]:
    """The samples of the bus."""
    for topic in stats.topics:
        labels = {"topic": topic.topic}
        yield Sample("esper_bus_published", topic.published, labels)
        yield Sample("esper_bus_kept_bytes", topic.kept_bytes, labels)
    lag: Counter[str] = Counter()
    for group in stats.groups:
        name = kind_of(group.group)
        labels = {"group": name}
        yield Sample("esper_bus_delivered", group.delivered, labels, group.group)
        yield Sample("esper_bus_redelivered", group.redelivered, labels, group.group)
        yield Sample("esper_bus_dropped", group.dropped, labels, group.group)
        yield Sample("esper_bus_dead", group.dead, labels, group.group)
        lag[name] += group.pending
    for name, pending in lag.items():
        yield Sample("esper_bus_lag_messages", pending, {"group": name})


def kind_of(group: str) -> str:
    """A group's label: its name without the random identifier of those that live as long as one process, of which
    Prometheus would keep a series each.
    """
    return _RANDOM.sub("", group)


def of_backlog(backlog: Backlog) -> Iterator[Sample]:
    """The samples of the compile queue."""
    for state, jobs in (("queued", backlog.queued), ("leased", backlog.leased)):
        for device, num in jobs.items():
            yield Sample("esper_compile_jobs", num, {"device": device, "state": state})


def of_compiled(compiled: Mapping[Pipeline, Compiled]) -> Iterator[Sample]:
    """The samples of what came from the compilers."""
    for pipeline, done in compiled.items():
        yield Sample("esper_compiled_kernels", done.kernels, {"pipeline": pipeline.value})
        yield Sample("esper_compile_seconds", done.seconds, {"pipeline": pipeline.value})


class Totals:
    """What counters came to, as steps for an exporter that only adds.

    A counter that goes back, as steps do when a run is resumed, stands still until it is beyond where it was.
    """

    def __init__(self) -> None:
        self._totals: dict[tuple[str, frozenset[tuple[str, str]], str], float] = {}

    def step(self, sample: Sample) -> float:
        """By how much a counter has risen."""
        before = self._totals.get(sample.key, 0.0)
        if sample.value > before:
            self._totals[sample.key] = sample.value
        return max(0.0, sample.value - before)

    def forget(self, now: Sequence[Sample]) -> None:
        """Forgets parts of counters that are gone for good; what they came to stays in the sum. A source that does not
        answer has no part at all, and nothing of it is forgotten.
        """
        parts = {(sample.metric, sample.part) for sample in now if sample.part}
        answered = {metric for metric, _ in parts}
        gone = [key for key in self._totals if key[2] and key[0] in answered and (key[0], key[2]) not in parts]
        for key in gone:
            del self._totals[key]


def vanished(before: Iterable[Sample], after: Iterable[Sample]) -> Iterator[Sample]:
    """Samples for gauges that had a value and have none now: 0 for what is counted (the last seed of a stage, a queue
    that ran dry), NaN for what is measured (a run that is not remembered any more).
    """
    still = {sample.key for sample in after}
    for sample in before:
        if METRICS[sample.metric].kind is Kind.GAUGE and sample.key not in still:
            yield sample._replace(value=0.0 if sample.metric in COUNTED else math.nan)
