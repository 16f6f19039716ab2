"""`esper policy`: the learned policies of a storage: trains one, lists them, shows one, nominates or promotes one."""

from __future__ import annotations

import os
from collections.abc import Callable
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
        typer.echo(f"use it: esper policy nominate {result['version'][:12]}, or promote, then tamiyo.policy=gnn")


@policy_app.command("ls")
def ls(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """List policies, oldest first."""
    store = _store(storage)
    promoted, nominated = _noted(store.promoted), _noted(store.nominated)
    rows = [
        {
            "version": card.version if as_json else card.version[:12],
            "name": card.name,
            "kind": card.kind,
            "episodes": card.trained_on.episodes,
            "tasks": list(card.trained_on.tasks),
            "promoted": card.version == promoted,
            "nominated": card.version == nominated,
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
        "promoted": _noted(store.promoted) == card.version,
        "nominated": _noted(store.nominated) == card.version,
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


@policy_app.command("nominate")
def nominate(
    policy: Annotated[
        str | None,
        typer.Argument(
            metavar="POLICY",
            help="Its version, or a beginning of it.",
            autocompletion=_complete_policy,
            show_default=False,
        ),
    ] = None,
    nobody: Annotated[bool, typer.Option("--nobody", help="Take the nomination back.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Have Tamiyo try a policy in shadow, and promote it if it passes `tamiyo.canary`."""
    from esper.leyline.errors import ConfigError
    from esper.leyline.policies import find_policy

    if (policy is None) != nobody:
        raise ConfigError("name a policy, or say --nobody", field="POLICY")
    store = _store(storage)
    version = None if policy is None else find_policy(store, policy)
    if version is not None and version == _noted(store.promoted):
        raise ConfigError(f"policy {version[:12]} is promoted already", field="POLICY")
    before = _noted(store.nominated)
    store.nominate(version)
    if as_json:
        print_json({"nominated": version, "before": before})
    elif version is None:
        typer.echo("nobody is nominated" + (f"; {before[:12]} was" if before else ""))
    else:
        typer.echo(
            f"nominated {version}" + (f" in place of {before[:12]}" if before and before != version else "") + "\n"
            "A running platform tries it beside the one that decides, and promotes it if it agrees with that one often "
            "enough\nand expects no less: esper bus tail --topic system.events.policy, or GET /api/v1/policies"
        )


@policy_app.command("promote")
def promote(policy: PolicyArg, storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Make a policy the one that `tamiyo.gnn.version=promoted` stands for, now, without a trial in shadow."""
    from esper.leyline.policies import find_policy

    store = _store(storage)
    before = _noted(store.promoted)
    version = find_policy(store, policy)
    store.promote(version)
    if as_json:
        print_json({"promoted": version, "before": before, "tried_in_shadow": False})
        return
    typer.echo(f"promoted {version}" + (f" in place of {before[:12]}" if before else ""))
    typer.echo(f"It was not tried in shadow first; that is: esper policy nominate {version[:12]}")


def _noted(read: Callable[[], str | None]) -> str | None:
    """What a note names; None, and a line for people, for one that is damaged: naming another policy mends it."""
    from esper.leyline.errors import TamperedError

    try:
        return read()
    except TamperedError as error:
        typer.echo(f"esper: {error}", err=True)
        return None


def _store(storage: str) -> Any:
    from esper.storage import Storage as Place
    from esper.urza.policies import StoredPolicies

    return StoredPolicies(Place.at(storage))
