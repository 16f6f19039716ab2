"""From messages to detectors to alerts. Pure: no clock, no bus; the same messages give the same alerts.

Knows runs, sites and groups up to a number each; of more, the ones not heard of for longest are forgotten.
"""

from __future__ import annotations

import math
import shlex
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.bus import BusStats
from esper.leyline.contract import Contract
from esper.leyline.policies import PolicyChange, PolicyEvent
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import (
    CircuitState,
    EpochRecord,
    HealthSignal,
    LayerHealthReport,
    LifecycleEvent,
    RunStarted,
    Severity,
    StepBatch,
)
from esper.nissa.anomalies.book import Book, Place
from esper.nissa.anomalies.cache import CacheStream
from esper.nissa.anomalies.findings import EVENTS, FOREST, Z_SCORE, Found, Over, Said
from esper.nissa.anomalies.forest import HealthForest, Odd
from esper.nissa.anomalies.health import TWICE, HealthStream
from esper.nissa.anomalies.lag import LagStream
from esper.nissa.anomalies.loss import LossStream
from esper.nissa.anomalies.pace import PaceStream

MAX_RUNS, MAX_SITES, MAX_GROUPS = 16, 256, 1024
SILENT_S = 900.0
"""A run that was not heard of for so long has no alerts any more: nobody can say whether they last."""
CALM_EPOCHS = 3
"""Epochs without another rollback after which those of a site are over."""
MISSED = 4
"""Steps that may lack between two batches for want of a finite loss; more were dropped on the way."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

Told = Iterator[tuple[Place, Said, int | None]]


class _Run:
    """The streams of one run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.place = Place(run_id)
        self.next_step: int | None = None
        self.heard_at = 0.0
        self.blended: OrderedDict[str, str] = OrderedDict()  # seed -> site: on the live path and not proven
        self.rolled_back: dict[Place, int] = {}  # -> epoch of the last
        self._begin()

    def _begin(self) -> None:
        self.loss, self.pace, self.cache = LossStream(), PaceStream(), CacheStream()
        self.forest = HealthForest()
        self.sites: OrderedDict[str, HealthStream] = OrderedDict()
        self._reports: dict[str, HealthSignal] = {}
        self._odd: dict[str, int] = {}

    # ---------------------------------------------------------------- one method a payload

    def started(self, body: RunStarted) -> Told:
        if body.resumed_from_epoch is not None:  # what is known belongs to steps that come again
            self._begin()
            self.next_step = None
        yield from ()

    def steps(self, body: StepBatch) -> Told:
        if self.next_step is not None and 0 < body.first_step - self.next_step <= MISSED:
            yield self.place, self.loss.missed(body.first_step - self.next_step), self.next_step
        if self.next_step is not None and body.first_step < self.next_step:  # set back, and not told so
            yield from self._all(self.loss.changed(), body.first_step)
        marks = set(body.marks)
        for step, loss, milliseconds in zip(
            range(body.first_step, body.first_step + len(body.losses)), body.losses, body.milliseconds, strict=False
        ):
            if step in marks:
                yield from self._all(self.loss.changed(), step)
                yield from self._all(self.pace.changed(), step)
            yield from self._all(self.loss.see(loss), step)
            yield from self._all(self.pace.see(milliseconds), step)
        if any(mark >= body.first_step + len(body.losses) for mark in marks):
            yield from self._path_changed(body.first_step + len(body.losses))
        self.next_step = body.first_step + len(body.losses)

    def health(self, body: LayerHealthReport) -> Told:
        signal = next((s for s in reversed(body.seeds) if s.activation_variance is not None), None)
        if signal is None:
            return
        stream = _recall(self.sites, body.layer_id, HealthStream, MAX_SITES)
        vector_is_next = body.layer_id in self._reports
        if vector_is_next:  # the epoch's record was lost
            yield from self._judge(body.step)
        self._reports[body.layer_id] = signal
        place = Place(self.run_id, body.layer_id)
        for said in stream.see(signal):
            yield place, said, body.step

    def epoch(self, body: EpochRecord) -> Told:
        yield from self._judge(body.step)
        yield from self._all(self.cache.see(body.cache_hits, body.cache_misses), body.step)
        yield self.place, _circuit(body), body.step
        for place, epoch in list(self.rolled_back.items()):
            if body.epoch - epoch >= CALM_EPOCHS:
                del self.rolled_back[place]
                yield place, Over(AlertKind.ROLLBACKS, f"{CALM_EPOCHS} epochs without another"), body.step

    def lifecycle(self, body: LifecycleEvent) -> Told:
        if body.refused:
            return
        if body.to_stage.is_blended and body.to_stage is not SeedStage.FOSSILIZED:
            self.blended[body.seed] = body.site
        else:
            self.blended.pop(body.seed, None)
        if body.to_stage is SeedStage.ROLLED_BACK:
            place = Place(self.run_id, body.site, body.seed)
            self.rolled_back[place] = body.epoch
            what = f"{body.blueprint} was rolled back" if body.blueprint else "a kernel was rolled back"
            yield place, Found(AlertKind.ROLLBACKS, what, body.reason, EVENTS, severity=Severity.WARNING), body.step
        yield from self._all(self.pace.changed(), body.step)  # a shadow costs time, too
        if body.from_stage.is_blended != body.to_stage.is_blended:
            yield from self._path_changed(body.step)

    # ---------------------------------------------------------------- within

    def command(self, said: Said, place: Place) -> str:
        """What to type to look into it, or to end it."""
        run = shlex.quote(self.run_id)
        suspect = place.site if place.site in self.blended.values() else next(reversed(self.blended.values()), None)
        if said.kind in {AlertKind.LOSS_SPIKE, AlertKind.LOSS_RISE, AlertKind.ODD_HEALTH} and suspect is not None:
            return f"esper runs veto {run} {shlex.quote(suspect)}"
        if said.kind in {AlertKind.SLOW_STEPS, AlertKind.TAMIYO_SILENT}:
            return "esper platform status"
        return f"esper runs report {run}" if said.kind is not AlertKind.LOSS_SPIKE else f"esper runs show {run}"

    def _all(self, found: Iterable[Said], step: int) -> Told:
        return ((self.place, said, step) for said in found)

    def _path_changed(self, step: int) -> Told:
        yield from self._all(self.loss.changed(), step)
        for site, stream in self.sites.items():
            for said in stream.changed():
                yield Place(self.run_id, site), said, step
            if self._odd.pop(site, 0) >= TWICE:
                why = "the live path changed: the layer is judged anew"
                yield Place(self.run_id, site), Over(AlertKind.ODD_HEALTH, why), step
        self._reports.clear()

    def _judge(self, step: int) -> Told:
        """The reports of one epoch together: a forest costs the same for one as for all."""
        reports, self._reports = self._reports, {}
        known: list[tuple[str, list[float]]] = []
        for site, signal in reports.items():
            vector = self.sites[site].features(signal)
            if vector is None or self.sites[site].is_told:
                self.sites[site].learn(signal)
            else:
                known.append((site, vector))
        found = self.forest.see([vector for _, vector in known])
        for (site, vector), odd in zip(known, found, strict=True):
            place = Place(self.run_id, site)
            if odd is None:
                self.sites[site].learn(reports[site])
                if self._odd.pop(site, 0) >= TWICE:
                    yield place, Over(AlertKind.ODD_HEALTH, "its figures go together again"), step
                continue
            self._odd[site] = self._odd.get(site, 0) + 1
            if self._odd[site] >= TWICE:
                yield place, _odd(vector, odd), step


def _circuit(body: EpochRecord) -> Said:
    """What the trainer's breaker towards Tamiyo says."""
    kind = AlertKind.TAMIYO_SILENT
    if body.tamiyo is CircuitState.CLOSED:
        return Over(kind, "Tamiyo answers again")
    evidence = f"the trainer's circuit breaker was {body.tamiyo.value.replace('_', ' ')} after epoch {body.epoch + 1}"
    return Found(kind, "the trainer decides without Tamiyo, who is silent", evidence, EVENTS)


def _odd(vector: Sequence[float], odd: Odd) -> Found:
    names = ("variance", "gradient_norm", "grow_potential", "dead", "correlation")
    factors = [f"{name.replace('_', ' ')} {math.exp(v):.2g} times" for name, v in zip(names[:3], vector, strict=False)]
    shares = [f"{name} {v:+.0%}" for name, v in zip(names[3:], vector[3:], strict=True)]
    why = [f"{odd.num_far} figures far out"] if odd.num_far > 1 else []
    why += [f"isolation {odd.score:.2f}"] if odd.score is not None else []
    evidence = f"against what is usual here: {', '.join([*factors, *shares])}; {', '.join(why)}"
    figures = {**({} if odd.score is None else {"score": odd.score}), **dict(zip(names, vector, strict=True))}
    detector = Z_SCORE if odd.num_far > 1 else FOREST
    return Found(AlertKind.ODD_HEALTH, "figures of a layer do not go together", evidence, detector, figures)


_FOLDS: Mapping[type, Callable[[_Run, Any], Told]] = {
    RunStarted: _Run.started,
    StepBatch: _Run.steps,
    LayerHealthReport: _Run.health,
    EpochRecord: _Run.epoch,
    LifecycleEvent: _Run.lifecycle,
}


_OF_RUNS = (RunStarted, StepBatch, LayerHealthReport, EpochRecord, LifecycleEvent)


class Watch:
    """Watches any number of runs, and the bus. Not thread-safe; its owner serialises calls."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._groups: OrderedDict[str, LagStream] = OrderedDict()
        self._book = Book()

    @property
    def open(self) -> tuple[Alert, ...]:
        """The alerts that last."""
        return self._book.open

    def apply(self, body: Contract, at: float) -> list[Alert]:
        """Takes in what a message says, of any topic, once; returns the alerts to tell: new, grown, or over.

        Args:
            body: its payload.
            at: its timestamp.
        """
        if isinstance(body, Alert):
            self._book.adopt(body)
            return []
        if isinstance(body, PolicyEvent):
            return self._of_policy(body, at)
        if not isinstance(body, _OF_RUNS):
            return []
        known = self._runs.get(body.run_id)
        run = known or _Run(body.run_id)
        told = self._forget_old(run) if known is None else []
        run.heard_at = max(run.heard_at, at)
        for place, said, step in _FOLDS[type(body)](run, body):
            told += self._tell(place, said, at, step, run.command(said, place))
        if isinstance(body, RunStarted) and body.resumed_from_epoch is not None:
            told += self._end_run(body.run_id, at, "the run was resumed: it is judged anew")
        if isinstance(body, EpochRecord) and body.epoch + 1 >= body.num_epochs:
            told += self._end_run(body.run_id, at, "the run ended")
        return told

    def _of_policy(self, event: PolicyEvent, at: float) -> list[Alert]:
        """One that is refused stands until a policy could be loaded, be it that one or another in its place."""
        kind = AlertKind.POLICY_REFUSED
        if event.change is PolicyChange.REFUSED:
            name = f"policy {event.version[:12]}" if event.version else "the note of a policy"
            what = "a policy cannot be loaded, and the one before goes on deciding"
            found = Found(kind, what, event.reason or "no reason was told", EVENTS)
            return self._tell(Place(site=name), found, at, None, "esper policy ls")
        if event.change not in {PolicyChange.LOADED, PolicyChange.PASSED}:
            return []
        why = f"policy {event.version[:12]} decides now"
        ended = [self._book.end(key, why=why, at=at, step=None) for key in self._book.of_kind(kind)]
        return [alert for alert in ended if alert is not None]

    def look(self, stats: BusStats, at: float) -> list[Alert]:
        """Takes in the figures of the bus, every few seconds; returns the alerts to tell."""
        told: list[Alert] = []
        for group in stats.groups:
            stream = _recall(self._groups, group.group, LagStream, MAX_GROUPS)
            place = Place(group=group.group)
            if (AlertKind.BUS_LAG, place) in self._book.of_groups():
                stream.is_told = True
            for said in stream.see(group):
                told += self._tell(place, said, at, None, "esper bus stats")
        there = {group.group for group in stats.groups}
        for key in self._book.of_groups():
            if key[1].group not in there:
                told += filter(None, [self._book.end(key, why="the group is gone", at=at, step=None)])
        for name in [name for name in self._groups if name not in there]:
            del self._groups[name]
        return told

    def tick(self, now: float) -> list[Alert]:
        """Ends the alerts of runs that nothing was heard of for long; returns them."""
        told: list[Alert] = []
        for run in self._runs.values():
            if now - run.heard_at > SILENT_S:
                told += self._end_run(run.run_id, now, f"the run was not heard of for {SILENT_S / 60:.0f} minutes")
        return told

    def _tell(self, place: Place, said: Said, at: float, step: int | None, command: str) -> list[Alert]:
        if isinstance(said, Found) and self._book.is_full:
            return []
        alert = self._book.tell(place, said, at=at, step=step, command=command)
        return [] if alert is None else [alert]

    def _end_run(self, run_id: str, at: float, why: str) -> list[Alert]:
        ended = [self._book.end(key, why=why, at=at, step=None) for key in self._book.of_run(run_id)]
        return [alert for alert in ended if alert is not None]

    def _forget_old(self, run: _Run) -> list[Alert]:
        self._runs[run.run_id] = run
        told: list[Alert] = []
        while len(self._runs) > MAX_RUNS:
            old_id, old = self._runs.popitem(last=False)
            told += self._end_run(old_id, old.heard_at, "the run is not watched any more: there are newer ones")
        return told


def _recall(memory: OrderedDict[_Key, _Value], key: _Key, make: Callable[[], _Value], limit: int) -> _Value:
    if key not in memory:
        memory[key] = make()
        while len(memory) > limit:
            memory.popitem(last=False)
    return memory[key]
