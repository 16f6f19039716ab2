"""Adaptations as spans: a root from germination to its end, and a child for each stage. Pure: no clock, no network.

Knows nothing of OpenTelemetry but its ids: a trace id of 32 hexadecimal digits, which Esper's own are (the id of the
GERMINATE command), a span id of 16. Both follow from what is told, so a span that is made again, by a Nissa that was
restarted or a run that was resumed, is the same span.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from esper.leyline.alerts import Alert
from esper.leyline.contract import Contract
from esper.leyline.native import Rung, RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Evidence, FieldReport, LifecycleEvent, Outcome, RunStarted

MAX_WAYS = 1024
"""Adaptations that are remembered; the one that began first is forgotten first."""
_HEX = re.compile(r"[0-9a-f]{32}")
_RUNGS = {Rung.NATIVE: "native_code", Rung.IR: "back_to_ir"}

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened at a moment, seconds since the epoch."""

    at: float
    name: str
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of time that is over; times are seconds since the epoch.

    Attributes:
        trace_id, span_id: hexadecimal digits.
        parent_id: span id of the root; None for a root.
        error: what went wrong; None where nothing did.
    """

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start: float
    end: float
    attributes: Mapping[str, Value]
    events: Sequence[SpanEvent] = ()
    error: str | None = None


@dataclass
class _Way:
    """One adaptation, as far as it has come."""

    trace_id: str
    start: float
    attributes: dict[str, Value]
    stage: SeedStage = SeedStage.DORMANT
    since: float = 0.0
    entered: dict[str, Value] = field(default_factory=dict)
    in_stage: list[SpanEvent] = field(default_factory=list)
    in_all: list[SpanEvent] = field(default_factory=list)
    is_over: bool = False
    has_begun: bool = False  # whether the beginning of its stage is known

    @property
    def run_id(self) -> str:
        return str(self.attributes["esper.run_id"])

    @property
    def root_id(self) -> str:
        return _digits(16, self.trace_id, "root")

    def enter(self, event: LifecycleEvent) -> None:
        self.stage, self.since, self.in_stage, self.has_begun = event.to_stage, event.timestamp, [], True
        self.entered = {"esper.step": event.step, "esper.epoch": event.epoch, "esper.begun_because": event.reason}

    def child(self, at: float, why: Mapping[str, Value], error: str | None = None) -> Span:
        """The span of the stage that it leaves."""
        name, attributes = _word(self.stage), {**self.attributes, **self.entered, **why}
        span_id = _digits(16, self.trace_id, name)
        return Span(
            self.trace_id, span_id, self.root_id, name, self.since, max(at, self.since), attributes,
            tuple(self.in_stage), error,
        )  # fmt: skip

    def root(self, at: float, outcome: str, why: str, error: str | None = None) -> Span:
        self.is_over = True
        attributes = self.attributes | {"esper.outcome": outcome, "esper.reason": why}
        return Span(
            self.trace_id, self.root_id, None, "adaptation", self.start, max(at, self.start), attributes,
            tuple(self.in_all), error,
        )  # fmt: skip


class Spans:
    """Makes spans of what is told, in any order between topics. Not thread-safe; its owner serialises calls."""

    def __init__(self) -> None:
        self._ways: OrderedDict[str, _Way] = OrderedDict()

    def take(self, body: Contract, at: float) -> list[Span]:
        """Takes in what a message says, of any topic, once; returns the spans that ended by it.

        Args:
            body: its payload.
            at: its timestamp.
        """
        if isinstance(body, LifecycleEvent):
            return self._moved(body) if body.trace_id else []
        if isinstance(body, RungChange):
            return self._rung(body)
        if isinstance(body, FieldReport):
            return self._reported(body, at)
        if isinstance(body, Alert):
            self._alert(body)
        if isinstance(body, RunStarted) and body.resumed_from_epoch is not None:
            resumed = SpanEvent(at, "run_resumed", {"esper.epoch": body.resumed_from_epoch})
            for way in self._open(body.run_id):
                way.in_all.append(resumed)
        return []

    def _moved(self, event: LifecycleEvent) -> list[Span]:
        way = self._ways.get(event.trace_id)
        if event.refused:
            if way is not None:
                why: dict[str, Value] = {"esper.to_stage": event.to_stage.value, "esper.reason": event.reason}
                refused = SpanEvent(event.timestamp, "refused", why | _evidence(event.evidence))
                way.in_stage.append(refused)
                way.in_all.append(refused)
            return []
        if event.to_stage is SeedStage.DORMANT:
            return []  # its embargo is over, and it was long before
        if way is None:
            way = self._begin(event)
        way.is_over = False  # a run that was resumed goes through its last epochs again
        _name(way, event.blueprint, event.kernel_id)
        is_error = event.to_stage is SeedStage.ROLLED_BACK
        error = event.reason if is_error else None
        spans = []
        if way.stage is event.from_stage and way.has_begun:
            why = {"esper.ended_because": event.reason, "esper.to_stage": event.to_stage.value}
            spans.append(way.child(event.timestamp, why | _evidence(event.evidence), error))
        way.enter(event)
        if event.to_stage.is_active:
            return spans
        if is_error:
            way.in_all.append(SpanEvent(event.timestamp, "rolled_back", {"esper.reason": event.reason}))
        return [*spans, way.root(event.timestamp, event.to_stage.value.lower(), event.reason, error)]

    def _begin(self, event: LifecycleEvent) -> _Way:
        known = event.trace_id
        trace_id = known if _HEX.fullmatch(known) and known.strip("0") else _digits(32, known)
        attributes: dict[str, Value] = {
            "esper.run_id": event.run_id,
            "esper.site": event.site,
            "esper.seed": event.seed,
            "esper.trace_id": known,
        }
        way = self._ways[known] = _Way(trace_id, event.timestamp, attributes, stage=event.from_stage)
        if event.from_stage is not SeedStage.DORMANT:  # what is kept of the log begins amid it
            way.attributes["esper.beginning_lost"] = True
        if len(self._ways) > MAX_WAYS:
            self._ways.popitem(last=False)
        return way

    def _rung(self, body: RungChange) -> list[Span]:
        """An event of an adaptation under way. Native code often comes after a kernel became permanent: its trace has
        ended, and it gets a span of no length in it.
        """
        way = self._ways.get(body.trace_id)
        if way is None:
            return []
        name = _RUNGS[body.rung]
        what: dict[str, Value] = {"esper.step": body.step, "esper.epoch": body.epoch, "esper.reason": body.reason}
        if not way.is_over:
            way.in_all.append(SpanEvent(body.timestamp, name, what))
            return []
        span_id = _digits(16, way.trace_id, name, str(body.step))
        return [
            Span(way.trace_id, span_id, way.root_id, name, body.timestamp, body.timestamp, way.attributes | what),
        ]  # fmt: skip

    def _reported(self, body: FieldReport, at: float) -> list[Span]:
        """Ends what its run's end left unfinished; the end of all others is among their transitions."""
        way = self._ways.get(body.trace_id)
        if way is None or way.is_over or body.outcome is not Outcome.UNFINISHED:
            return []
        why: dict[str, Value] = {"esper.ended_because": body.failure_reason}
        return [way.child(at, why), way.root(at, body.outcome.value, body.failure_reason)]

    def _alert(self, alert: Alert) -> None:
        """An event of what is under way at its place: at its site, or in its run where it names none."""
        name = f"alert.{alert.kind.value}" if alert.is_open else f"alert.{alert.kind.value}.over"
        at = alert.since if alert.ended_at is None else alert.ended_at
        what: dict[str, Value] = {
            "esper.alert_id": alert.alert_id,
            "esper.severity": alert.severity.value,
            "esper.summary": alert.summary,
            "esper.evidence": alert.evidence,
            "esper.command": alert.command,
        }
        if alert.ending:
            what["esper.ending"] = alert.ending
        for way in self._open(alert.run_id):
            is_told = any(e.name == name and e.attributes["esper.alert_id"] == alert.alert_id for e in way.in_all)
            if alert.site in {None, way.attributes["esper.site"]} and not is_told:
                way.in_all.append(SpanEvent(at, name, what))

    def _open(self, run_id: str) -> Iterable[_Way]:
        return [way for way in self._ways.values() if way.run_id == run_id and not way.is_over]


def _name(way: _Way, blueprint: str | None, kernel_id: str | None) -> None:
    if blueprint:
        way.attributes["esper.blueprint"] = blueprint
    if kernel_id:
        way.attributes["esper.kernel_id"] = kernel_id


def _evidence(evidence: Evidence | None) -> dict[str, Value]:
    if evidence is None:
        return {}
    return {
        "esper.evidence.kind": evidence.kind.value,
        "esper.evidence.gain": evidence.gain,
        "esper.evidence.stderr": evidence.stderr,
        "esper.evidence.num_pairs": evidence.num_pairs,
    }


def _word(stage: SeedStage) -> str:
    return stage.value.lower()


def _digits(count: int, *parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:count]
