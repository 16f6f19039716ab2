"""`esper trace`: the whole way of one adaptation, with its times."""

from __future__ import annotations

import datetime as dt
import os
from typing import TYPE_CHECKING, Annotated

import typer

from esper.leyline.errors import EsperError, NotFoundError, UserError
from jobs.options import DEFAULT_STORAGE, Json, Storage, print_json

if TYPE_CHECKING:
    from esper.leyline.kernels import CompiledKernelArtifact
    from esper.nissa.runs import RunStore
    from esper.nissa.trace import Way


class UnknownTraceError(NotFoundError, UserError):
    """No adaptation, or more than one, goes by this id."""


def complete_trace(incomplete: str) -> list[str]:
    """Trace ids that begin so; none where the storage cannot be read."""
    from esper.nissa.runs import RunStore

    try:
        store = RunStore(os.environ.get("ESPER_STORAGE", DEFAULT_STORAGE))
        return [trace for trace, _ in _known(store) if trace.startswith(incomplete)]
    except EsperError:
        return []


TraceArg = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="A trace id, a beginning of one, or a run, whose traces are listed.",
        autocompletion=complete_trace,
    ),
]  # fmt: skip


def trace(what: TraceArg, storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Print the whole way of an adaptation, from what was seen of its site to its end, with times."""
    from esper.nissa.runs import RunStore

    store = RunStore(storage)
    found = sorted({(trace_id, run) for trace_id, run in _known(store) if trace_id.startswith(what)})
    if not found:
        found = _of_run(store, what)
    ways = [_way(store, trace_id, run, storage) for trace_id, run in found]
    if as_json:
        print_json([way.as_json() for way in ways])
    elif len(ways) == 1:
        typer.echo(told(ways[0]))
    else:
        typer.echo("\n".join(_line(way) for way in sorted(ways, key=lambda way: way.stops[0].at)))


def told(way: Way) -> str:
    """A way as people read it: clock, seconds since its beginning, step, system, what and why."""
    grown = f"{way.blueprint or 'a kernel'} at {way.site} ({way.seed}) in run {way.run_id}"
    lines = [f"trace {way.trace_id}: {grown}"]
    began = next((stop.at for stop in way.stops if stop.step is not None), way.stops[0].at)
    for stop in way.stops:
        clock = dt.datetime.fromtimestamp(stop.at, dt.UTC).strftime("%H:%M:%S.%f")[:-3]
        step = "" if stop.step is None else f"step {stop.step:,}"
        lines.append(f"  {clock}  {stop.at - began:+9.2f} s  {step:<12}  {stop.system:<8}  {stop.what}")
        if stop.why:
            lines.append(f"{'':16}{stop.why}")
    return "\n".join(lines)


def _line(way: Way) -> str:
    last = way.stops[-1]
    return f"{way.trace_id[:12]}  {way.run_id}  {way.site}  {way.blueprint or '-'}  {last.what}"


def _known(store: RunStore) -> list[tuple[str, str]]:
    """(trace id, run) of all adaptations below a storage; a run that never trained has none."""
    from pydantic import ValidationError

    from esper.nissa.trace import traces

    found: list[tuple[str, str]] = []
    for run in store.ids():
        try:
            found += [(trace_id, run) for trace_id in traces(store.summary(run))]
        except (NotFoundError, ValidationError):
            continue
    return found


def _of_run(store: RunStore, name: str) -> list[tuple[str, str]]:
    from esper.nissa.trace import traces

    try:
        run = store.resolve(name)
    except NotFoundError as error:
        raise UnknownTraceError(
            f"no adaptation has the trace id {name!r}, and no run is called so", field="ID", remedy="see esper runs ls"
        ) from error
    found = [(trace_id, run) for trace_id in traces(store.summary(run))]
    if not found:
        raise UnknownTraceError(f"run {run} tried no adaptation", field="ID")
    return found


def _way(store: RunStore, trace_id: str, run: str, storage: str) -> Way:
    from esper.nissa.trace import way_of

    summary = store.summary(run)
    events = (event for event in summary.events if event.trace_id == trace_id)
    kernel_id = next((event.kernel_id for event in events if event.kernel_id), None)
    kernel = None if kernel_id is None else _kernel(storage, kernel_id)
    return way_of(trace_id, summary, store.history(run), kernel)


def _kernel(storage: str, kernel_id: str) -> CompiledKernelArtifact | None:
    """The kernel's record; None where no catalogue has it (a run without Urza)."""
    from jobs.assets import reading

    try:
        with reading(storage) as hub:
            return hub.kernel(kernel_id)
    except NotFoundError:
        return None
