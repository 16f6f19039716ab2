"""`esper blueprints`: submit designs, look at them and at what they wait for, and check one of your own."""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper.leyline.errors import UnavailableError
from jobs.assets import NothingThereError, find_blueprint, is_joined, reading, writing
from jobs.options import (
    DEFAULT_STORAGE,
    Descending,
    Json,
    Limit,
    Offset,
    Reason,
    Storage,
    TakeOver,
    complete_blueprint,
    complete_signature,
    print_json,
)
from jobs.tables import fields, table, time_of

if TYPE_CHECKING:
    from esper.leyline import Blueprint
    from esper.urza.library import Design
    from esper.urza.submission import BlueprintView, Queries, Submitted

POLL_S = 0.2
"""Between two looks of `submit --wait`."""

blueprints_app = typer.Typer(help="Designs: what seeds may grow.", no_args_is_help=True)

NameArg = Annotated[
    str,
    typer.Argument(
        metavar="BLUEPRINT", help="Its name, its id, or a beginning of the id.", autocompletion=complete_blueprint
    ),
]


# ---------------------------------------------------------------- commands


@blueprints_app.command("submit")
def submit_command(
    file: Annotated[
        Path, typer.Argument(help="A design in the library's form (YAML), or a request in the gateway's (JSON).")
    ],
    name: Annotated[str | None, typer.Option(help="Instead of the file's.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIGNATURE",
            help="Compile for this site, such as feature_map-16x8x8-float32-cpu; may be repeated. "
            "Without: for every site that runs have registered.",
            autocompletion=complete_signature,
        ),
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Add a tag; may be repeated.")] = None,
    pipeline: Annotated[
        list[str] | None, typer.Option(help="fast or optimized; may be repeated. Without: both.")
    ] = None,
    priority: Annotated[int | None, typer.Option(min=0, max=9, help="9 is the most urgent (default 5).")] = None,
    parent: Annotated[
        str | None, typer.Option(help="The blueprint it was derived from.", autocompletion=complete_blueprint)
    ] = None,
    wait: Annotated[float | None, typer.Option(min=0.0, metavar="SECONDS", help="Wait until it is compiled.")] = None,
    take_over: TakeOver = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Submit a design for compilation. The same design under the same name is the same blueprint."""
    changes: dict[str, Any] = {}
    options = {"name": name, "tags": tag, "pipelines": pipeline, "priority": priority}
    changes |= {key: value for key, value in options.items() if value}
    if priority is not None:
        changes["priority"] = priority
    if target:
        from esper.leyline.catalogue import parse_signature

        changes["targets"] = [parse_signature(text).model_dump(mode="json") for text in target]
    from esper.urza.submission import submit
    from jobs.designs import parse_form, read_form

    body = parse_form({"submitted_by": _user()} | read_form(file), changes, source=str(file))
    if wait is not None and not is_joined():
        raise UnavailableError("--wait needs a platform that compiles", remedy="join one: RAY_ADDRESS=auto")
    with writing(storage, take_over=take_over) as hub:
        if parent is not None:
            body = body.model_copy(update={"parent_id": find_blueprint(hub, parent)})
        submitted = submit(hub, body)
        view = None if wait is None else _wait(hub, submitted.id, wait)
    note = "" if is_joined() else "; it is compiled as soon as a run or a platform serves this storage"
    if as_json:
        print_json(submitted.model_dump(mode="json") if view is None else view.model_dump(mode="json"))
        return
    typer.echo(told(submitted) + (note if submitted.queue_position else ""))
    if view is not None:
        typer.echo(_targets(view))


@blueprints_app.command("ls")
def ls(
    status: Annotated[str | None, typer.Option(help="Only those of this status.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Only those with this tag; of several, with each.")] = None,
    name: Annotated[str | None, typer.Option(help="Only versions of this name.")] = None,
    order: Annotated[str, typer.Option(help="created, name or priority.")] = "created",
    descending: Descending = False,
    limit: Limit = 100,
    offset: Offset = 0,
    library: Annotated[bool, typer.Option("--library", help="The designs that ship with Esper.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """List the designs in the catalogue, or with --library those that ship with Esper."""
    if library:
        _list_library(as_json=as_json)
        return
    from esper.leyline.catalogue import BlueprintQuery
    from jobs.options import parsed

    query = parsed(
        BlueprintQuery,
        status=None if status is None else status.upper(),
        tags_all=tuple(tag or ()),
        name=name,
        order=order,
        descending=descending,
        limit=limit,
        offset=offset,
    )
    with reading(storage) as hub:
        page = hub.search_blueprints(query)
    if as_json:
        print_json(page.model_dump(mode="json"))
        return
    typer.echo(table([_row(blueprint) for blueprint in page.blueprints], "no blueprint fits; see --help"))
    if page.total > len(page.blueprints):
        typer.echo(f"{len(page.blueprints)} of {page.total}; more with --offset and --limit")


@blueprints_app.command("show")
def show(name: NameArg, storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Show one design: its graph, its targets with their kernels, and what it waits for."""
    from esper.urza.library import load_library
    from esper.urza.submission import view_of

    try:
        with reading(storage) as hub:
            view = view_of(hub, find_blueprint(hub, name))
    except NothingThereError as error:
        if (design := load_library().get(name)) is None:
            remedy = "see esper blueprints ls, and ls --library"
            words = f"{error.message}; the library has no {name!r} either"
            raise NothingThereError(words, field=error.field, remedy=remedy) from error
        _show_design(design, as_json=as_json)
        return
    if as_json:
        print_json(view.model_dump(mode="json"))
    else:
        typer.echo(_shown(view))


@blueprints_app.command("lineage")
def lineage(name: NameArg, storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Show where a design comes from and what came of it, as a tree."""
    with reading(storage) as hub:
        id_ = find_blueprint(hub, name)
        line = hub.lineage(id_)
        if as_json:
            print_json({"lineage": [blueprint.model_dump(mode="json") for blueprint in line]})
            return
        below = hub.descendants(id_)
    typer.echo("\n".join(tree(line, below)))


@blueprints_app.command("retire")
def retire(
    name: NameArg,
    reason: Reason,
    take_over: TakeOver = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Take a design out of use, for good: what is queued of it is not compiled any more. Its kernels stay in use.

    A kernel is retired by itself: esper kernels retire.
    """
    with reading(storage) as there:  # where nothing lies nothing is made
        id_ = find_blueprint(there, name)
    with writing(storage, take_over=take_over) as hub:
        hub.retire_blueprint(id_, reason)
        blueprint = hub.blueprint(id_)
    if as_json:
        print_json(blueprint.model_dump(mode="json"))
    else:
        what = f"{blueprint.name} version {blueprint.version}"
        typer.echo(f"{what} is {blueprint.status.value}: {blueprint.reason}, id {id_}")


@blueprints_app.command("check")
def check(file: Path, as_json: Json = False) -> None:
    """Check a design of your own: one YAML file, in the library's form."""
    from jobs.designs import check_file

    result = check_file(file)
    if as_json:
        print_json(result)
        return
    typer.echo(f"{result['name']}: ok, hash {result['ir_hash'][:12]}")
    for row in result["examples"]:
        typer.echo(f"  {row['signature']:<28} {row['verdict']}")


# ---------------------------------------------------------------- submissions


def _wait(hub: Queries, blueprint_id: str, timeout_s: float) -> BlueprintView:
    """Returns once nothing of a blueprint waits any more.

    Raises:
        UnavailableError: after `timeout_s`.
    """
    from esper.urza.submission import view_of

    deadline = time.monotonic() + timeout_s
    while hub.outlook(blueprint_id).num_open:
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{blueprint_id} was not compiled within {timeout_s:g} s; it stays queued",
                remedy=f"esper blueprints show {blueprint_id[:12]}",
            )
        time.sleep(POLL_S)
    return view_of(hub, blueprint_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return "cli"


# ---------------------------------------------------------------- what is shown


def told(submitted: Submitted) -> str:
    """A submission's answer in words."""
    words = [f"{submitted.name} version {submitted.version} is {submitted.status.value}, id {submitted.id}"]
    if submitted.targets:
        words.append(f"targets: {', '.join(target.key for target in submitted.targets)}")
    words += [f"does not fit {misfit.signature.key}: {misfit.reason}" for misfit in submitted.misfits]
    if submitted.queue_position:
        when = f"about {submitted.estimated_s:.1f} s from now"
        words.append(f"{submitted.queue_position} to be compiled until it is done, {when}")
    if submitted.note:
        words.append(submitted.note)
    return "\n".join(words)


def _row(blueprint: Blueprint) -> dict[str, Any]:
    return {
        "id": blueprint.blueprint_id[:12],
        "name": blueprint.name,
        "version": blueprint.version,
        "status": blueprint.status.value,
        "targets": len(blueprint.targets),
        "priority": blueprint.priority,
        "created_at": blueprint.created_at,
        "submitted_by": blueprint.submitted_by,
        "tags": blueprint.tags,
    }


def _shown(view: BlueprintView) -> str:
    blueprint, outlook = view.blueprint, view.outlook
    waits = (
        f"{outlook.queue_position} to be compiled until it is done, about {outlook.estimated_s:.1f} s"
        if outlook.num_open
        else ""
    )
    facts = {
        "id": blueprint.blueprint_id,
        "status": blueprint.status.value,
        "reason": blueprint.reason,
        "waits": waits,
        "tags": blueprint.tags,
        "priority": blueprint.priority,
        "submitted_by": blueprint.submitted_by,
        "created_at": blueprint.created_at,
        "parent": blueprint.parent_id,
        "metadata": json.dumps(blueprint.metadata) if blueprint.metadata else "",
    }
    head = f"{blueprint.name} version {blueprint.version}"
    return "\n\n".join([f"{head}\n{fields(facts)}", "\n".join(_graph(blueprint.ir)), _targets(view)])


def _targets(view: BlueprintView) -> str:
    rows = [
        {
            "signature": target.signature.key,
            "pipeline": target.pipeline.value,
            "state": target.state.value,
            "kernel": target.kernel_ids[-1][:12] if target.kernel_ids else "",
            "worker": target.worker,
            "lease_ends_at": target.deadline if target.state == "leased" else None,
            "reason": target.reason,
        }
        for target in view.targets
    ]
    logs = [f"log of {one.signature.key}, {one.pipeline.value}:\n{one.log}" for one in view.targets if one.log]
    return "\n\n".join([table(rows, "no targets: submit it again with --target"), *logs])


def _graph(ir: Any) -> Iterator[str]:
    for node in ir.nodes:
        params = ", ".join(f"{key}={value}" for key, value in node.params.items())
        yield f"  {node.id} = {node.op}({', '.join(node.inputs)}{'; ' + params if params else ''})"
    yield f"  {'k' if ir.replaces else 'r'}(h) = {ir.output}"


def tree(line: Sequence[Blueprint], below: Sequence[Blueprint]) -> Iterator[str]:
    """A family as a tree from its root; the one that was asked for is marked.

    Args:
        line: the one that was asked for, its parent, and so on to the root.
        below: all that came of it.
    """
    asked = line[0]
    children: dict[str | None, list[Blueprint]] = {}
    for one in below:
        children.setdefault(one.parent_id, []).append(one)
    depth = 0
    for blueprint in reversed(line):
        yield _branch(blueprint, asked, "   " * (depth - 1) + "└─ " if depth else "")
        depth += 1
    yield from _below(asked, children, "   " * (depth - 1), asked)


def _below(
    blueprint: Blueprint, children: Mapping[str | None, Sequence[Blueprint]], indent: str, asked: Blueprint
) -> Iterator[str]:
    kin = children.get(blueprint.blueprint_id, ())
    for child in kin:
        is_last = child is kin[-1]
        yield _branch(child, asked, f"{indent}{'└─ ' if is_last else '├─ '}")
        yield from _below(child, children, f"{indent}{'   ' if is_last else '│  '}", asked)


def _branch(blueprint: Blueprint, asked: Blueprint, lead: str) -> str:
    mark = "  <" if blueprint.blueprint_id == asked.blueprint_id else ""
    words = f"{blueprint.name} v{blueprint.version}  {blueprint.blueprint_id[:12]}  {blueprint.status.value}"
    return f"{lead}{words}  {time_of(blueprint.created_at)}{mark}"


# ---------------------------------------------------------------- the library


def _list_library(*, as_json: bool) -> None:
    from esper.urza.library import load_library

    designs = load_library().values()
    if as_json:
        print_json(
            [
                {"name": d.name, "fit": list(d.ir.fit), "tags": list(d.tags), "description": d.description}
                for d in designs
            ]
        )
        return
    for design in designs:
        typer.echo(f"{design.name:<22} {', '.join(design.ir.fit):<24} {design.description}")


def _show_design(design: Design, *, as_json: bool) -> None:
    if as_json:
        print_json({"name": design.name, "description": design.description, "ir": design.ir.model_dump(mode="json")})
        return
    typer.echo(f"{design.name}: {design.description}\n(in Esper's library; not in this storage's catalogue)")
    typer.echo("\n".join(_graph(design.ir)))
