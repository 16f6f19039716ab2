"""Options that several commands have, and what the shell completes them with."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, TypeVar

import typer

from esper.leyline.errors import ConfigError, EsperError

Query = TypeVar("Query")
_OPTIONS = {
    "tags_all": "tag",
    "tags_any": "tag",
    "min_performance": "min-performance",
    "max_risk": "max-risk",
    "blueprint_id": "blueprint",
}
"""What an option is called where the query calls it otherwise."""
DEFAULT_STORAGE = "~/.esper"

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Storage = Annotated[
    str,
    typer.Option("--storage", envvar="ESPER_STORAGE", help="Directory, file:// or s3:// address of all that lasts."),
]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="Rows, at most.")]
Offset = Annotated[int, typer.Option(min=0, help="Rows to skip.")]
Descending = Annotated[bool, typer.Option("--desc", help="The other way round.")]
TakeOver = Annotated[
    bool,
    typer.Option(
        "--take-over", help="Write though the storage was last served from another machine, where nothing is up now."
    ),
]
Reason = Annotated[str, typer.Option(help="Why, in words: whoever asks for it later is told.")]


def print_json(value: Any) -> None:
    """Plain values as JSON."""
    typer.echo(json.dumps(value, indent=2, default=str))


def parsed(form: type[Query], **fields: Any) -> Query:
    """Options as a query.

    Raises:
        ConfigError: names the option.
    """
    from pydantic import ValidationError

    try:
        return form(**fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = str(first["loc"][0])
        raise ConfigError(
            f"{first['msg']}, got {first['input']!r}", field=f"--{_OPTIONS.get(option, option)}"
        ) from error


# ---------------------------------------------------------------- completion: from the tables, without Urza


def complete_blueprint(incomplete: str) -> list[str]:
    """Names in the catalogue and in the library."""
    from esper.urza.library import load_library

    names = dict.fromkeys([*_column("blueprints", "name"), *load_library()])
    return [name for name in names if name.startswith(incomplete)]


def complete_kernel(incomplete: str) -> list[str]:
    """Ids of kernels in the catalogue."""
    return [one for one in _column("kernels", "kernel_id") if one.startswith(incomplete)]


def complete_signature(incomplete: str) -> list[str]:
    """Site signatures for which there are kernels."""
    return [one for one in dict.fromkeys(_column("kernels", "signature")) if one.startswith(incomplete)]


def complete_tag(incomplete: str) -> list[str]:
    """Tags that kernels have."""
    tags = dict.fromkeys(tag for row in _column("kernels", "tags") for tag in row)
    return [tag for tag in tags if tag.startswith(incomplete)]


def _column(table: str, column: str) -> list[Any]:
    """A column of a table for other readers; empty where there is none: a shell has no use for an error."""
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    from esper.storage import Storage as Place

    try:
        place = Place.at(os.environ.get("ESPER_STORAGE", DEFAULT_STORAGE))
        opened = DeltaTable(place.child(table), storage_options=place.delta_options)
        return opened.to_pyarrow_table(columns=[column])[column].to_pylist()
    except (EsperError, DeltaError, OSError):
        return []


def complete_run(incomplete: str) -> list[str]:
    """Ids of runs that begin so; none where the storage cannot be read."""
    from jobs.runs import RunStore

    try:
        return [
            run
            for run in RunStore(os.environ.get("ESPER_STORAGE", DEFAULT_STORAGE)).ids()
            if run.startswith(incomplete)
        ]
    except EsperError:
        return []


RunArg = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Run id, a unique beginning of one, or `latest`.", autocompletion=complete_run),
]
