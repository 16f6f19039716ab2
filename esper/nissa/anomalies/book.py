"""From what detectors say to alerts: one a kind and place while it lasts, counted, and ended."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.signals import Severity
from esper.nissa.anomalies.findings import Found, Over, Said

MAX_OPEN = 256
_GRAVITY = (Severity.INFO, Severity.WARNING, Severity.CRITICAL)


class Place(NamedTuple):
    """What an alert is about; empty is none."""

    run_id: str = ""
    site: str = ""
    seed_id: str = ""
    group: str = ""


class Book:
    """The alerts that last. What it returns is new to the world: begins, ends, and counts that have doubled."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[AlertKind, Place], Alert] = OrderedDict()

    def tell(self, place: Place, said: Said, *, at: float, step: int | None, command: str) -> Alert | None:
        """Takes in what a detector says of a place at a moment; returns the alert to tell, if there is one."""
        key = (said.kind, place)
        if isinstance(said, Over):
            return self.end(key, why=said.why, at=at, step=step)
        known = self._open.get(key)
        if known is None:
            alert = self._open[key] = _begun(place, said, at=at, step=step, command=command)
            return alert
        severity = max(known.severity, said.severity, key=_GRAVITY.index)
        changes = {"evidence": said.evidence, "figures": dict(said.figures), "severity": severity}
        alert = known.model_copy(update={**changes, "count": known.count + 1, "updated_at": max(at, known.updated_at)})
        self._open[key] = alert
        return alert if alert.count & (alert.count - 1) == 0 or alert.severity is not known.severity else None

    def end(self, key: tuple[AlertKind, Place], *, why: str, at: float, step: int | None) -> Alert | None:
        """Ends an alert; returns it, or None if there is none."""
        known = self._open.pop(key, None)
        if known is None:
            return None
        at = max(at, known.since)
        return known.model_copy(
            update={"ended_at": at, "ended_step": step, "ending": why, "updated_at": max(at, known.updated_at)}
        )

    def adopt(self, alert: Alert) -> None:
        """Takes over an alert that an earlier Nissa told and that does not follow from the log again, so that it can
        end: what the bus was like, and what followed from signals that are not kept any more.
        """
        place = Place(alert.run_id, alert.site or "", alert.seed_id or "", alert.group or "")
        key = (alert.kind, place)
        if alert.is_open:
            self._open.setdefault(key, alert)
        elif (known := self._open.get(key)) is not None and known.alert_id == alert.alert_id:
            del self._open[key]

    def of_run(self, run_id: str) -> list[tuple[AlertKind, Place]]:
        """The alerts of one run that last."""
        return [key for key in self._open if key[1].run_id == run_id]

    def of_kind(self, kind: AlertKind) -> list[tuple[AlertKind, Place]]:
        """The alerts of one kind that last."""
        return [key for key in self._open if key[0] is kind]

    def of_groups(self) -> list[tuple[AlertKind, Place]]:
        """Those of consumer groups."""
        return [key for key in self._open if key[1].group]

    @property
    def open(self) -> tuple[Alert, ...]:
        """The alerts that last."""
        return tuple(self._open.values())

    @property
    def is_full(self) -> bool:
        """Whether no other alert may begin: so many at once tell nobody anything."""
        return len(self._open) >= MAX_OPEN


def _begun(place: Place, found: Found, *, at: float, step: int | None, command: str) -> Alert:
    since, since_step = at - found.seconds_ago, None if step is None else max(step - found.steps_ago, 0)
    identity = "\n".join((found.kind, *place, f"{since:.6f}", str(since_step)))
    return Alert(
        alert_id=hashlib.sha256(identity.encode()).hexdigest()[:16],
        kind=found.kind,
        severity=found.severity,
        run_id=place.run_id,
        site=place.site or None,
        seed_id=place.seed_id or None,
        group=place.group or None,
        since=since,
        since_step=since_step,
        updated_at=at,
        summary=found.summary,
        evidence=found.evidence,
        figures=dict(found.figures),
        detector=found.detector,
        command=command,
    )
