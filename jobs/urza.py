"""`esper urza`: the upkeep of a storage address."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.assets import is_joined, on_platform, own_hub
from jobs.options import DEFAULT_STORAGE, Json, Storage, TakeOver, print_json

if TYPE_CHECKING:
    from esper.leyline.catalogue import MaintenanceReport

urza_app = typer.Typer(help="The upkeep of a storage.", no_args_is_help=True)


@urza_app.command("maintain")
def maintain(
    kept_hours: Annotated[float | None, typer.Option(min=0.0, help="Keep replaced files so long.")] = None,
    grace_hours: Annotated[float | None, typer.Option(min=1.0, help="Keep blobs that no record names so long.")] = None,
    take_over: TakeOver = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Tidy a storage now: compact the log, remove what was replaced and blobs that nothing names, write the tables.

    A running platform does so by itself (urza.maintain_every_s). Without options its configuration holds; where none
    is joined, 24 hours for both.
    """
    from esper.storage import Storage as Place
    from esper.urza import upkeep

    if is_joined():
        with on_platform(storage) as urza:
            report = urza.maintain(kept_hours=kept_hours, grace_hours=grace_hours)
    else:
        kept = upkeep.KEPT_HOURS if kept_hours is None else kept_hours
        grace = upkeep.GRACE_HOURS if grace_hours is None else grace_hours
        with own_hub(storage, take_over=take_over) as hub:
            report = upkeep.maintain(hub, Place.at(storage), kept_hours=kept, grace_hours=grace)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        typer.echo(told(report))


def told(report: MaintenanceReport) -> str:
    """A round of maintenance in words."""
    files = f"{report.files_after} files, before in {report.files_before}; {report.files_removed} replaced ones removed"
    freed = (
        f"{report.blobs_set_aside} set aside, {report.blobs_removed} removed ({report.bytes_removed / 1024:.0f} KiB)"
    )
    words = [
        f"{report.num_events} events (schema {report.schema_version}) in {files}",
        f"{report.blobs_kept} blobs kept, {freed}; {report.uses_written} fetches written down; {report.seconds:.1f} s",
        *(f"not done: {problem}" for problem in report.problems),
    ]
    return "\n".join(words)
