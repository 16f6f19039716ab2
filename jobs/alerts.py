"""`esper alerts`: what Nissa finds out of the ordinary, as it was told on the bus of a running platform."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.bus import Json, Storage

if TYPE_CHECKING:
    from esper.leyline.alerts import Alert
    from esper.leyline.ports import Bus
    from esper.oona.standing import StandingBus


def alerts(
    run: Annotated[str | None, typer.Option(help="Only those of this run, by its whole id.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those that are over, too.")] = False,
    storage: Storage = "~/.esper",
    as_json: Json = False,
) -> None:
    """List what is out of the ordinary: what, where, since when, the evidence, and what to do."""
    from jobs.bus import opened

    with opened(storage) as bus:
        found = [
            alert
            for alert in latest(bus)
            if (everything or alert.is_open) and (run is None or alert.run_id == run)
        ]  # fmt: skip
    if as_json:
        typer.echo(json.dumps([alert.model_dump(mode="json") for alert in found], indent=2))
    else:
        typer.echo("\n".join(lines(found)) if found else "no alert" + ("" if everything else " lasts"))


def latest(bus: Bus | StandingBus) -> list[Alert]:
    """The alerts that are kept, each as it was told last; oldest first."""
    from esper.leyline.alerts import Alert
    from esper.leyline.messages import Topic

    found: dict[str, Alert] = {}
    positions = None
    while True:
        page = bus.read((Topic.ALERTS,), positions=positions)
        for delivery in page.deliveries:
            alert = delivery.message.body()
            assert isinstance(alert, Alert)
            known = found.get(alert.alert_id)
            if known is None or (known.is_open and (known.count <= alert.count or not alert.is_open)):
                found[alert.alert_id] = alert
        if page.is_end:
            return sorted(found.values(), key=lambda alert: alert.since)
        positions = page.positions


def lines(found: Iterable[Alert]) -> Iterable[str]:
    """Two lines an alert, and a third for one that is over."""
    for alert in found:
        at = dt.datetime.fromtimestamp(alert.since, tz=dt.UTC).strftime("%Y-%m-%d %H:%M:%S")
        step = "" if alert.since_step is None else f", step {alert.since_step:,}"
        run = f" of {alert.run_id}" if alert.run_id and alert.place != alert.run_id else ""
        yield f"{alert.severity.value}: {alert.summary} ({alert.kind.value}) at {alert.place}{run} since {at}{step}"
        yield f"  {alert.evidence} (seen {alert.count} times, {alert.detector}); look: {alert.command}"
        if alert.ended_at is not None:
            ended = dt.datetime.fromtimestamp(alert.ended_at, tz=dt.UTC).strftime("%H:%M:%S")
            yield f"  over at {ended}: {alert.ending}"
