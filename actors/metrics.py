"""Nissa's metrics in Ray, whose agent on every node exports them to Prometheus. Needs a process that is a Ray worker.

What is measured, and how it follows, is in `esper.nissa.metrics`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from esper.leyline import Alert, AssetHub, Bus, EsperError
from esper.leyline.kernels import Pipeline
from esper.nissa.live import Compiled
from esper.nissa.metrics import (
    METRICS,
    Kind,
    Sample,
    Totals,
    of_alerts,
    of_backlog,
    of_bus,
    of_compiled,
    of_run,
    vanished,
)
from esper.nissa.viewmodel import LiveView

_LOG = logging.getLogger(__name__)


class Exporter:
    """Remembers what it has exported, as Ray takes steps of counters and keeps gauges until they are set again.

    See `Totals` for a counter that goes back.
    """

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}
        self._totals = Totals()
        self._gauges: tuple[Sample, ...] = ()

    def export(self, samples: Iterable[Sample]) -> None:
        """Sets gauges and moves counters on; see `vanished` for gauges that are not among the samples any more."""
        now = tuple(samples)
        for sample in (*now, *vanished(self._gauges, now)):
            if METRICS[sample.metric].kind is Kind.GAUGE:
                self._instrument(sample.metric).set(sample.value, tags=dict(sample.labels))
            elif (step := self._totals.step(sample)) > 0:
                self._instrument(sample.metric).inc(step, tags=dict(sample.labels))
        self._totals.forget(now)
        self._gauges = tuple(sample for sample in now if METRICS[sample.metric].kind is Kind.GAUGE)

    def _instrument(self, name: str) -> Any:
        if name not in self._instruments:
            from ray.util import metrics

            metric = METRICS[name]
            make = metrics.Gauge if metric.kind is Kind.GAUGE else metrics.Counter
            self._instruments[name] = make(name, description=metric.help, tag_keys=metric.labels)
        return self._instruments[name]


class Reporter:
    """Exports the metrics every few seconds, in a thread of its own, until `stop`.

    A source that does not answer is left out, which is logged once until it answers again; nothing else waits for it.

    Args:
        views: gives the runs as Nissa has them.
        bus: connects to the bus.
        hub: connects to Urza, for the compile queue; None leaves it out.
        every_s: from one export to the next.
        alerts: gives the alerts of the platform as a whole.
        compiled: gives what came from the compilers.
    """

    def __init__(
        self,
        views: Callable[[], Sequence[LiveView]],
        *,
        bus: Callable[[], Bus],
        hub: Callable[[], AssetHub] | None,
        every_s: float,
        alerts: Callable[[], Sequence[Alert]] = tuple,
        compiled: Callable[[], Mapping[Pipeline, Compiled]] = dict,
    ) -> None:
        self._views, self._alerts, self._compiled = views, alerts, compiled
        self._connect_bus, self._connect_hub = bus, hub
        self._bus: Bus | None = None
        self._hub: AssetHub | None = None
        self._silent: set[str] = set()
        self._exporter = Exporter()
        self._every_s = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nissa-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._stopped.set()
        self._thread.join()
        if self._bus is not None:
            self._bus.close()

    def samples(self) -> list[Sample]:
        """All there is to export now."""
        found = [sample for view in self._views() for sample in of_run(view)]
        found += of_alerts("", self._alerts())
        found += of_compiled(self._compiled())
        found += self._ask("bus", self._of_bus)
        if self._connect_hub is not None:
            found += self._ask("urza", self._of_backlog)
        return found

    def _run(self) -> None:
        while not self._stopped.wait(self._every_s):
            self._exporter.export(self.samples())

    def _ask(self, source: str, ask: Callable[[], Iterable[Sample]]) -> list[Sample]:
        try:
            found = list(ask())
        except EsperError as error:
            if source not in self._silent:
                _LOG.warning("metrics.source.silent", extra={"source": source, "reason": str(error)})
                self._silent.add(source)
            self._bus = None if source == "bus" else self._bus
            self._hub = None if source == "urza" else self._hub
            return []
        self._silent.discard(source)
        return found

    def _of_bus(self) -> Iterable[Sample]:
        if self._bus is None:
            self._bus = self._connect_bus()
        return of_bus(self._bus.stats())

    def _of_backlog(self) -> Iterable[Sample]:
        if self._hub is None:
            assert self._connect_hub is not None
            self._hub = self._connect_hub()
        return of_backlog(self._hub.backlog())
