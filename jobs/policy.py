"""`esper policy`: the learned policies of a storage: gathers experience, trains, lists, shows, copies, chooses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esper.leyline.errors import EsperError
from jobs.options import DEFAULT_STORAGE, Json, Storage, print_json
from jobs.tables import fields, table

if TYPE_CHECKING:
    from esper.urza.policies import StoredPolicies

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


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """Says what Ctrl-C leaves. The edge of the command line does not hear of it: Typer makes an exit code of it."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("esper: interrupted; the same command goes on", err=True)
        raise typer.Exit(130) from None


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
    with _going_on():
        result = train_tamiyo.train(config, settings, say=lambda line: typer.echo(line, err=as_json), here=here)
    if as_json:
        print_json(result)
    else:
        typer.echo(f"use it: esper policy nominate {result['version'][:12]}, or promote, then tamiyo.policy=gnn")


@policy_app.command("gather")
def gather(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, such as configs/digits_mlp.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings of the runs, such as tolaria.epochs=20."),
    ] = None,
    policies: Annotated[
        str, typer.Option("--policies", help="Who decides; one named twice plays twice.")
    ] = "none,random,random,heuristic,bandit",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each policy.")] = 4,
    first: Annotated[int, typer.Option("--first", min=0, help="The first seed.")] = 0,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Play runs here, without Ray, and log their decisions: experience to train a policy from.

    Those that are logged already are not played again.
    """
    from esper.config import load_config
    from jobs.gather import gather as play

    settings = ["deterministic=true", "simic.experience=true", *(overrides or []), f"storage={storage}"]
    loaded = load_config(config, settings)
    whole = range(first, first + seeds)
    with _going_on():
        num = play(loaded, policies.split(","), whole, say=lambda line: typer.echo(line, err=as_json))
    print_json({"played": num}) if as_json else typer.echo(f"{num} runs are logged in {storage}")


@policy_app.command("offline")
def offline(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings, such as weighting=none updates=8; see OfflineConfig."),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Train a policy from the logged runs of a storage alone: it plays none."""
    from esper.simic.experience import Experience
    from esper.simic.offline import OfflineConfig, train_offline
    from esper.storage import Storage as Place
    from jobs.train_tamiyo import parsed

    config = parsed(OfflineConfig, {}, overrides or [])
    history: list[dict[str, Any]] = []

    def told(row: dict[str, Any]) -> None:
        history.append(row)
        typer.echo(_in_words(row), err=as_json)

    episodes = [*Experience(Place.at(storage)).episodes(policies=config.policies or None)]
    card, weights = train_offline(episodes, config, told=told)
    version = _store(storage).put(card, weights)
    if as_json:
        print_json({"version": version, "history": history})
    else:
        typer.echo(f"policy {version}")


def _in_words(row: dict[str, Any]) -> str:
    """A step of a training from logged runs."""
    match row["stage"]:
        case "judged":
            totals = ", ".join(f"{policy} {own['mean']:+.3f} ({own['runs']})" for policy, own in row["totals"].items())
            return f"{row['runs']} of {row['of']} logged runs can be compared; what they came to: {totals}"
        case "cloned":
            judged = row["held_out"] or row["learned"]
            whose = "held out" if row["held_out"] else "that it learned from"
            return f"cloned: the same choice in {judged['same']:.0%} of {judged['num']} {whose}"
        case "weighted":
            return f"imitated by advantage: the runs count as {row['effective']:.0%} of their number"
        case _ if not row["runs"]:
            return row["words"]
        case _:
            return (
                f"update {row['update']}: {row['runs']} runs, worth {row['effective']:.0%} of fresh ones, "
                f"KL {row['kl']:.4f}, entropy {row['entropy']:.2f}, value loss {row['value']:.4f}"
            )


@policy_app.command("ls")
def ls(storage: Storage = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """List policies, oldest first. All are read, to mark those that are damaged."""
    store = _store(storage)
    promoted, nominated = _noted(store.promoted), _noted(store.nominated)
    cards = {card.version: card for card in store.ls()}
    damaged = store.damaged()
    for reason in damaged.values():
        typer.echo(f"esper: {reason}", err=True)
    rows = [
        {
            "version": version if as_json else version[:12],
            "name": card and card.name,
            "kind": card and card.kind,
            "episodes": card and card.trained_on.episodes,
            "tasks": list(card.trained_on.tasks) if card else [],
            "promoted": version == promoted,
            "nominated": version == nominated,
            "damaged": version in damaged,
            "created_at": card and card.created_at,
        }
        for version, card in {**cards, **{version: cards.get(version) for version in damaged}}.items()
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
    for rows in _alike(card.results):
        typer.echo(f"\n{table(rows, '')}")


@policy_app.command("copy")
def copy(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="Its version there, a beginning of it, or `promoted`.")
    ],
    source: Annotated[str, typer.Option("--from", help="The storage that holds it, such as configs.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Copy a policy from another storage into this one; nothing uses it until it is nominated, promoted or named."""
    from esper.leyline.policies import find_policy

    there = _store(source)
    card, weights = there.get(find_policy(there, policy))
    version = _store(storage).put(card, weights)
    if as_json:
        print_json({"version": version, "from": source})
    else:
        typer.echo(f"policy {version}\nuse it: tamiyo.policy=gnn tamiyo.gnn.version={version[:12]}")


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


def _alike(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows by the exam that they are of: those of one table have the same keys."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return list(found.values())


def _store(storage: str) -> StoredPolicies:
    from esper.storage import Storage as Place
    from esper.urza.policies import StoredPolicies

    return StoredPolicies(Place.at(storage))
