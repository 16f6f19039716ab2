"""`esper runs gains`: what growth was worth in the runs of a storage."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.options import DEFAULT_STORAGE, Json, Storage, print_json


def gains(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs, or all of them.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Show what designs came to, and which figures of a site's health told it beforehand."""
    from pydantic import ValidationError

    from esper.leyline.errors import NotFoundError
    from esper.leyline.foresight import foresights
    from esper.leyline.signals import FieldReport, HealthSignal
    from esper.nissa.gains import chosen, designs
    from esper.nissa.runs import RunStore
    from jobs.tables import table

    store = RunStore(storage)
    reports: list[FieldReport] = []
    pairs: list[tuple[HealthSignal, float]] = []
    skipped: list[str] = []
    for run in [store.resolve(name) for name in names] if names else store.ids():
        try:
            summary, history = store.summary(run), store.history(run)
        except (NotFoundError, ValidationError):
            skipped.append(run)  # it never trained, or another version wrote it
            continue
        reports += summary.field_reports
        pairs += chosen(summary, history)
    by_design = [
        {
            "site": one.kind, "design": one.blueprint, "tried": one.tried, "kept": one.kept, "measured": one.record.num,
            "value": one.record.in_words if one.record.num else None,
        }
        for one in designs(reports)
    ]  # fmt: skip
    by_figure = [
        {"figure": one.figure, "pairs": one.num, "rho": one.rho, "low": one.low, "high": one.high}
        for one in foresights(pairs)
    ]
    if as_json:
        print_json({"designs": by_design, "foresights": by_figure, "unread": skipped})
        return
    typer.echo("What designs came to: paired gain as a share of the loss, mean ± standard error of so many\n")
    typer.echo(table(by_design, "no adaptation has ended yet"))
    if reports:
        typer.echo("\nWhich figures of a site's health told it beforehand: rank correlation, 95% interval\n")
        typer.echo(table(by_figure, ""))
    if skipped:
        typer.echo(f"\nnot read: {', '.join(skipped)}")
