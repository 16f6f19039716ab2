"""A run as its folder tells it: the same view as of a run that is followed, from `summary.json` and `history.json`.

Sites without an adaptation and the health of sites stand in neither; they come from `view.json`, the last picture that
Nissa had. Without it they are not known, and nothing is made up for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from esper.leyline.contract import Contract
from esper.leyline.errors import StorageError
from esper.leyline.summary import RunHistory, RunSummary
from esper.nissa.live import fold
from esper.nissa.viewmodel import NUM_POINTS, LiveView, Note, Point, SeedView

_VIEW = TypeAdapter(LiveView)
_LAST = 1 << 62
_MEASURED = ("health_score", "grow_potential", "train_loss", "gate", "health_step")


@dataclass(frozen=True)
class Told:
    """A run with its whole story, the oldest note first."""

    view: LiveView
    story: Sequence[Note]


def dump(view: LiveView) -> bytes:
    """The content of `view.json`."""
    return _VIEW.dump_json(view)


def load(data: bytes) -> LiveView:
    """Inverse of `dump`.

    Raises:
        StorageError: if the bytes are no view; one of another version may have another form.
    """
    try:
        return _VIEW.validate_json(data)
    except ValidationError as error:
        raise StorageError(f"view.json cannot be read: {error.error_count()} errors") from error


def with_alerts(summary: RunSummary, seen: LiveView | None) -> RunSummary:
    """The summary with the alerts of Nissa's last picture, where it has none of its own: a run that was interrupted, or
    killed, ended before they were counted in.
    """
    if summary.alerts or seen is None or not seen.alerts:
        return summary
    return summary.model_copy(update={"alerts": tuple(seen.alerts.values())})


def replay(summary: RunSummary, history: RunHistory, seen: LiveView | None = None) -> Told:
    """Tells a run from what it left behind.

    Args:
        summary: what it came to, or has come to so far.
        history: its epochs; all of them become points, also those that a followed view has let go.
        seen: the last picture that Nissa had of it; None where there is none.
    """
    sites = seen.sites if seen else {report.site: report.signature.key for report in summary.field_reports}
    view = LiveView(
        run_id=summary.run_id,
        task=summary.task,
        started_at=summary.started_at,
        num_epochs=summary.num_epochs,
        params_start=summary.params.start,
        sites=sites,
        seeds={f"{site}\n": SeedView(site) for site in sites},
    )
    story: list[Note] = []
    for at, body in _signals(summary, history):
        before, view = view.num_notes, fold(view, body, at)
        story += [note for note in view.notes if note.number > before]
    view = replace(
        view,
        points=_thinned(
            [Point(e.epoch, e.train_loss, e.val_loss, e.train_metric, e.val_metric, e.params) for e in history.epochs]
        ),
        decision=history.decisions[-1][1] if history.decisions else "",
        step_ms=summary.steps.median_ms if summary.steps.count else None,
        updated_at=summary.finished_at or view.updated_at or summary.started_at,
    )
    return Told(_measured(view, seen) if seen else view, story)


def _signals(summary: RunSummary, history: RunHistory) -> list[tuple[float, Contract]]:
    """In the order in which they were sent; at one step the transitions come after the epoch that led to them."""
    began = summary.started_at
    signals: list[tuple[int, int, float, Contract]] = []
    seconds = began
    for record in history.epochs:
        seconds += record.seconds
        signals.append((record.step, 0, seconds, record))
    signals += [(event.step, 1, event.timestamp, event) for event in summary.events]
    signals += [(change.step, 2, change.timestamp, change) for change in summary.rungs]
    signals += [(_LAST, 3, began, report) for report in summary.field_reports]
    return [(at, body) for _, _, at, body in sorted(signals, key=lambda signal: signal[:2])]


def _thinned(points: list[Point]) -> tuple[Point, ...]:
    """At most `NUM_POINTS`, evenly, the first and the last among them."""
    if len(points) <= NUM_POINTS:
        return tuple(points)
    last = len(points) - 1
    return tuple(points[round(i * last / (NUM_POINTS - 1))] for i in range(NUM_POINTS))


def _measured(view: LiveView, seen: LiveView) -> LiveView:
    """With what only telemetry tells: health of sites, and where a seed that waits for its gate stands."""
    seeds = dict(view.seeds)
    for key, old in seen.seeds.items():
        known: dict[str, Any] = {name: getattr(old, name) for name in _MEASURED}
        empty = seeds.pop(f"{old.site}\n", None) if old.seed_id else None
        mine = seeds.get(key) or empty
        seeds[key] = replace(mine, seed_id=old.seed_id, **known) if mine else replace(old)
    return replace(
        view,
        seeds=seeds,
        alerts=seen.alerts,
        num_alerts=seen.num_alerts,
        policy=seen.policy,
        kernel_runs=seen.kernel_runs,
        directory=seen.directory,
        page=seen.page,
        step=max(view.step, seen.step),
        steps_per_epoch=view.steps_per_epoch or seen.steps_per_epoch,
        step_ms=view.step_ms if view.step_ms is not None else seen.step_ms,
    )
