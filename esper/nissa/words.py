"""Figures as people read them: counts, durations, shares, evidence. No colours, no layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from esper.leyline.alerts import Alert
from esper.leyline.native import Rung
from esper.leyline.signals import CircuitState, EpochRecord, Evidence, EvidenceKind, Severity
from esper.leyline.summary import Circuit, Rollback, Start
from esper.leyline.trials import TrialResult

UNKNOWN = "—"
"""Stands for a figure that there is not."""

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """Three significant figures with an SI prefix: 41300 is `41.3k`."""
    for scale, prefix in _PREFIXES:
        if abs(value) >= scale * 0.9995:
            scaled = value / scale
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{prefix}"
    return f"{value:g}" if float(value).is_integer() else f"{value:.3g}"


def start(begun: Start) -> str:
    """What a trained model was worth before its first step: `87.2% validation, loss 0.3512, from small.safetensors`."""
    parts = [] if begun.val_metric is None else [f"{metric(begun.metric_name, begun.val_metric)} validation"]
    parts.append(f"loss {loss(begun.val_loss)}")
    if begun.weights:
        parts.append(f"from {begun.weights}")
    return ", ".join(parts)


def trials(asked: Sequence[TrialResult]) -> str:
    """`2 asked for, 6 kernels tried, 1 void: it had not ended 11 epochs later`."""
    tried = sum(outcome.evidence is not None for result in asked for outcome in result.outcomes)
    void = [result.failure for result in asked if result.failure]
    said = f", {len(void)} void: {'; '.join(dict.fromkeys(void))}" if void else ""
    return f"{len(asked)} asked for, {tried} kernels tried{said}"


def rollback(back: Rollback) -> str:
    """`set back at step 1,204 (epoch 7): the loss is nan`."""
    return f"set back at step {back.step:,} (epoch {back.epoch + 1}): {back.reason}"


def alert_since(alert: Alert) -> str:
    """`step 1,204, 21:03:11 UTC`."""
    clock = f"{datetime.fromtimestamp(alert.since, UTC):%H:%M:%S} UTC"
    return clock if alert.since_step is None else f"step {alert.since_step:,}, {clock}"


def alert_until(alert: Alert) -> str:
    """`step 1,300, 21:05:00 UTC: as before`, or that it lasts."""
    if alert.ended_at is None:
        return "the last that was heard of it"
    clock = f"{datetime.fromtimestamp(alert.ended_at, UTC):%H:%M:%S} UTC"
    when = clock if alert.ended_step is None else f"step {alert.ended_step:,}, {clock}"
    return f"{when}: {alert.ending}" if alert.ending else when


def gravest_first(alerts: Iterable[Alert]) -> list[Alert]:
    """Those that are critical, then by their begin."""
    return sorted(alerts, key=lambda alert: (alert.severity is not Severity.CRITICAL, alert.since))


CIRCUITS = {
    CircuitState.OPEN: "open: silent, and not asked for a while",
    CircuitState.HALF_OPEN: "half open: the next call tries it",
}
"""What a circuit breaker that is not closed says; a closed one says nothing."""


def circuits(last: EpochRecord | None) -> list[tuple[str, CircuitState]]:
    """The systems that a trainer does not ask at present, and how its breakers towards them stand."""
    if last is None:
        return []
    both = (("urza", last.urza), ("tamiyo", last.tamiyo))
    return [(name, state) for name, state in both if state is not CircuitState.CLOSED]


def circuit(of: Circuit) -> str:
    """`given up 2 times for a while, 14 calls not made; closed now`."""
    return (
        f"given up {of.opened} times for a while, {of.refused} calls not made; {of.state.value.replace('_', ' ')} now"
    )


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:41`; under ten seconds also tenths: `4.2 s`."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def milliseconds(value: float) -> str:
    """`0.42 ms`, `3.1 ms`, `128 ms`."""
    return f"{value:.{2 if value < 1 else 1 if value < 100 else 0}f} ms"


def factor(now: float, start: float) -> str:
    """`x1.43`; empty where there is nothing to compare with."""
    return f"x{now / start:.2f}" if start else ""


def metric(name: str | None, value: float | None) -> str:
    """The headline metric: a percentage for accuracy, plain otherwise, a dash if unknown."""
    if value is None:
        return UNKNOWN
    return f"{value:.1%}" if is_share(name) else f"{value:.4g}"


def is_share(name: str | None) -> bool:
    """Whether a metric of this name lies in [0, 1] and reads best as a percentage."""
    return name is not None and "accuracy" in name


def metric_name(name: str | None) -> str:
    """The metric's name in words."""
    return (name or "metric").replace("_", " ")


def loss(value: float | None) -> str:
    """A loss with as many digits as it deserves; a dash if unknown."""
    if value is None:
        return UNKNOWN
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.4g}"


RUNGS: dict[Rung, str] = {Rung.NATIVE: "native code", Rung.IR: "IR"}
"""What a kernel runs from."""

WORTH = frozenset({EvidenceKind.SHADOW, EvidenceKind.FORK})
"""The kinds of evidence that say what a kernel is worth; a harm check does not."""


def is_proven(evidence: Evidence | None) -> bool:
    """Whether the evidence is of worth and its gain exceeds two standard errors."""
    return evidence is not None and evidence.kind in WORTH and evidence.gain > 2 * evidence.stderr


def gain(evidence: Evidence) -> str:
    """The figure alone: `+0.0312 ± 0.0060`; a dash where none says what the kernel is worth."""
    if evidence.kind not in WORTH:
        return UNKNOWN
    return f"{evidence.gain:+.4f} ± {evidence.stderr:.4f}"


KINDS: dict[EvidenceKind, str] = {
    EvidenceKind.SHADOW: "paired shadow",
    EvidenceKind.HARM: "harm check",
    EvidenceKind.FORK: "paired fork",
    EvidenceKind.NONE: "no evidence",
}

KIND_MEANINGS: dict[EvidenceKind, str] = {
    EvidenceKind.SHADOW: "validation with the kernel, against the untouched host, on the same samples: worth",
    EvidenceKind.HARM: "validation against the level before the graft: harm only, says nothing of worth",
    EvidenceKind.FORK: "validation against a run that does not grow, on the same samples: worth",
    EvidenceKind.NONE: "none was taken",
}


def evidence(evidence: Evidence) -> str:
    """The figure, how it was obtained and over how many pairs."""
    if evidence.kind is EvidenceKind.NONE:
        return "evidence: none"
    pairs = f", {evidence.num_pairs} pairs" if evidence.num_pairs else ""
    if evidence.kind is EvidenceKind.HARM:
        return f"loss {loss(evidence.candidate)} against {loss(evidence.baseline)} before (harm check{pairs})"
    return f"gain {gain(evidence)} ({KINDS[evidence.kind]}{pairs})"
