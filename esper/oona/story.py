"""A run's story from the archive alone: what its summary tells of growth, without the run's own files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from esper.leyline.errors import NotFoundError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.native import RungChange
from esper.leyline.signals import AdaptationSignal, EpochRecord, FieldReport, LifecycleEvent, RunStarted


@dataclass(frozen=True, slots=True)
class Story:
    """What is known of a run.

    Attributes:
        starts: its beginning, and each time that it began again after a crash.
        epochs: the last record of each.
        events: as the summary lists them: what a crash undid is not among them.
        undone: events after the checkpoint from which the run began again.
        decisions, rungs, reports: all that were told.
    """

    starts: tuple[RunStarted, ...]
    epochs: tuple[EpochRecord, ...]
    events: tuple[LifecycleEvent, ...]
    undone: tuple[LifecycleEvent, ...]
    decisions: tuple[AdaptationSignal, ...]
    rungs: tuple[RungChange, ...]
    reports: tuple[FieldReport, ...]


def story_of(run_id: str, messages: Iterable[OonaMessage]) -> Story:
    """Tells the story of one run.

    Args:
        run_id: the run.
        messages: in the order of each topic; those of other runs are passed over.

    Raises:
        NotFoundError: if nothing is told of its beginning.
    """
    bodies: dict[Topic, list[object]] = {}
    for message in messages:
        if message.key == run_id:
            bodies.setdefault(message.topic, []).append(message.body())
    starts = cast("list[RunStarted]", bodies.get(Topic.RUN_STARTED, []))
    if not starts:
        raise NotFoundError(f"nothing is told of the beginning of run {run_id}")
    told = cast("list[LifecycleEvent]", bodies.get(Topic.LIFECYCLE, []))
    events: list[LifecycleEvent] = []
    undone: list[LifecycleEvent] = []
    for index, start in enumerate(starts):
        undone += events[start.num_events :]
        del events[start.num_events :]
        ends = starts[index + 1].started_at if index + 1 < len(starts) else float("inf")
        began = start.started_at if index else 0.0
        events += [event for event in told if began <= event.timestamp < ends]
    epochs = {record.epoch: record for record in cast("list[EpochRecord]", bodies.get(Topic.EPOCH, []))}
    return Story(
        starts=tuple(starts),
        epochs=tuple(record for _, record in sorted(epochs.items())),
        events=tuple(events),
        undone=tuple(undone),
        # with a memory it is on its way to a run that listens, which tells what it obeys
        decisions=tuple(
            one for one in cast("list[AdaptationSignal]", bodies.get(Topic.KASMINA_COMMANDS, [])) if one.memory is None
        ),
        rungs=tuple(cast("list[RungChange]", bodies.get(Topic.RUNGS, []))),
        reports=tuple(cast("list[FieldReport]", bodies.get(Topic.FIELD_REPORTS, []))),
    )
