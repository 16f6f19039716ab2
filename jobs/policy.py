"""`esper policy`: the learned policies of a storage: trains one, lists them, shows one, promotes one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from esper.leyline.errors import EsperError
from jobs.options import DEFAULT_STORAGE, Json, Storage, print_json
from jobs.tables import fields, table

policy_app = typer.Typer(help="Learned policies: what Tamiyo may decide by.", no_args_is_help=True)


def _complete_policy(incomplete: str) -> list[str]:
    """Versions that begin so; none where the storage cannot be read: a shell has no use for an error."""
    try:
        cards = _store(os.environ.get("ESPER_STORAGE", DEFAULT_STORAGE)).ls()
    except (EsperError, OSError):
        return []
    return [card.version for card in cards if card.version.startswith(incomplete)]


PolicyArg = Annotated[
    str,
    typer.Argument(
        metavar="POLICY", help="Its version, or a beginning of it, or `promoted`.", autocompletion=_complete_policy
    ),
]


@policy_app.command("train")
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file, such as configs/tamiyo_ppo.yaml.")] = Path(
        "configs/tamiyo_ppo.yaml"
    ),
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, such as iterations=4.")
    ] = None,
    here: Annotated[bool, typer.Option("--here", help="Play the runs in this process, without Ray.")] = False,
    storage: Annotated[
        str | None, typer.Option("--storage", envvar="ESPER_STORAGE", help="Overrides `storage`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train a policy; goes on where it was killed."""
    from jobs import train_tamiyo

    settings = [*(overrides or []), *([] if storage is None else [f"storage={storage}"])]
    result = train_tamiyo.train(config, settings, say=lambda line: typer.echo(line, err=as_json), here=here)
    if as_json:
        print_json(result)
    else:
        typer.echo(f"use it: esper policy promote {result['version'][:12]}, then tamiyo.policy=gnn")


@policy_app.command("ls")
def ls(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """List policies, oldest first."""
    store = _store(storage)
    promoted = store.promoted()
    rows = [
        {
            "version": card.version if as_json else card.version[:12],
            "name": card.name,
            "kind": card.kind,
            "episodes": card.trained_on.episodes,
            "tasks": list(card.trained_on.tasks),
            "promoted": card.version == promoted,
            "created_at": card.created_at,
        }
        for card in store.ls()
    ]
    print_json(rows) if as_json else typer.echo(table(rows, "there are no policies: esper policy train"))


@policy_app.command("show")
def show(policy: PolicyArg = "promoted", storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Show a policy's card: what it was trained on, and what it came to."""
    from esper.leyline.policies import find_policy

    store = _store(storage)
    card, weights = store.get(find_policy(store, policy))
    if as_json:
        typer.echo(card.model_dump_json(indent=2))
        return
    trained = card.trained_on
    values: dict[str, Any] = {
        "version": card.version,
        "name": card.name,
        "kind": card.kind,
        "promoted": store.promoted() == card.version,
        "created_at": card.created_at,
        "observation version": card.observation_version,
        "weights": f"{len(weights) / 1024:.0f} KiB",
        "shape": ", ".join(f"{key} {value}" for key, value in card.shape.items()),
        "trained on": f"{trained.episodes} runs of {', '.join(trained.tasks)} ({', '.join(trained.hosts)})",
        "seeds": len(trained.seeds),
        "code": trained.code_digest,
        "parents": ", ".join(card.parents),
        "calibration": ", ".join(f"{key} {value}" for key, value in card.calibration.items()),
        "notes": card.notes,
    }
    typer.echo(fields(values))
    if card.results:
        typer.echo(f"\n{table(list(card.results), '')}")


@policy_app.command("promote")
def promote(policy: PolicyArg, storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Make a policy the one that `tamiyo.gnn.version=promoted` stands for."""
    from esper.leyline.policies import find_policy

    store = _store(storage)
    before = store.promoted()
    version = find_policy(store, policy)
    store.promote(version)
    if as_json:
        print_json({"promoted": version, "before": before})
    else:
        typer.echo(f"promoted {version}" + (f" in place of {before[:12]}" if before else ""))


def _store(storage: str) -> Any:
    from esper.storage import Storage as Place
    from esper.urza.policies import StoredPolicies

    return StoredPolicies(Place.at(storage))
