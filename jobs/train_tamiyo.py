"""Trains a policy for Tamiyo: `python -m jobs.train_tamiyo --config configs/tamiyo_ppo.yaml [KEY=VALUE...]`, which is
`esper policy train`. Goes on where it was killed; shows what it does while it does it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from esper.leyline.errors import ConfigError, EsperError, UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from esper.simic.settings import TrainTamiyoConfig

Say = Callable[[str], None]
Form = TypeVar("Form", bound="BaseModel")


def load(path: Path, overrides: Sequence[str]) -> TrainTamiyoConfig:
    """Reads a training's configuration.

    Raises:
        ConfigError: names the file, or the key and what is wrong with it.
    """
    import yaml

    from esper.simic.settings import TrainTamiyoConfig

    try:
        values = yaml.safe_load(path.read_text()) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no settings", field="--config")
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="--config") from error
    return parsed(TrainTamiyoConfig, values, overrides)


def parsed(form: type[Form], values: dict[str, Any], overrides: Sequence[str]) -> Form:
    """Returns a configuration of this form, from a file's values and settings that go before them.

    Raises:
        ConfigError: names the key and what is wrong with it.
    """
    from pydantic import ValidationError

    for text in overrides:
        _set(values, text)
    try:
        return form.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(first["msg"], field=".".join(map(str, first["loc"]))) from error


def _set(values: dict[str, Any], text: str) -> None:
    """Puts one KEY=VALUE into the settings."""
    import yaml

    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{text!r} is no KEY=VALUE", remedy="such as iterations=4")
    *folders, last = name.split(".")
    place: Any = values
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise ConfigError(f"{folder} holds no settings of its own", field=name)
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{value!r} is no value: {error}", field=name) from error


def train(path: Path, overrides: Sequence[str], *, say: Say, here: bool = False) -> dict[str, Any]:
    """Trains to the end.

    Args:
        path: the configuration.
        overrides: settings that go before those of the file.
        say: takes a line for each step.
        here: play the rollouts in this process, without Ray.

    Returns:
        The policy's version, and the rows of the training.

    Raises:
        UserError: if the configuration, or what it names, cannot be used.
        EsperError: if the training fails.
    """
    from esper.simic.rollouts import Player, load_tasks
    from esper.simic.training import Training
    from esper.storage import Storage
    from esper.urza.policies import StoredPolicies

    config = load(path, overrides)
    tasks = load_tasks(config, path.parent)
    storage = Storage.at(config.storage, config.storage_options)
    storage.check_writable()
    store = StoredPolicies(storage)

    def told(row: dict[str, Any]) -> None:
        if (line := in_words(row)) is not None:
            say(line)

    if here:
        training = Training(config, tasks, Player(tasks), storage=storage, store=store, told=told)
        return {"version": training.run(), "history": training.history}
    from actors.cluster import connected
    from actors.simic import RayRollouts

    with connected(dashboard=False, metadata={"esper_training": config.name}):
        rollouts = RayRollouts(tasks, config.rollout)
        try:
            training = Training(config, tasks, rollouts, storage=storage, store=store, told=told)
            return {"version": training.run(), "history": training.history}
        finally:
            rollouts.close()


def in_words(row: dict[str, Any]) -> str | None:
    """A step of a training as a line; None for what need not be said."""
    match row["stage"]:
        case "rollout":
            problem = f" (one failed: {row['problem']})" if row["problem"] else ""
            return f"{row['of']}: {row['done']} of {row['all']} runs{problem}"
        case "resumed":
            return f"going on after update {row['iteration']}" if row["iteration"] >= 0 else "going on with the warm-up"
        case "imitation" | "iterations" if "words" in row:
            return row["words"]
        case "imitation":
            judged = row["held_out"] or row["learned"]
            return (
                f"imitated {row['episodes']} runs ({row['logged']} of them logged): the same choice in "
                f"{judged['same']:.0%} of {judged['num']} {'held out' if row['held_out'] else 'that it learned from'}"
            )
        case "ppo":
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.3f}"
            return (
                f"update {row['iteration']}: return {row['mean_return']:+.3f}{error} of {row['episodes']} runs, "
                f"KL {row['kl']:.4f}, entropy {row['entropy']:.2f}, value loss {row['value']:.4f}, "
                f"{row['replayed']} older episodes again ({row['too_old']} too old)"
            )
        case _:
            results = "".join(
                f"\n  {one['task']}: {one['gnn']:+.3f}, drawing {one['drawn']:+.3f}, the heuristic "
                f"{one['heuristic']:+.3f}, on {one['seeds']} seeds"
                for one in row["results"]
                if one["seeds"]
            )
            return f"policy {row['version']}{results}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; returns an exit code as `esper` does."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.train_tamiyo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="such as configs/tamiyo_ppo.yaml")
    parser.add_argument("--here", action="store_true", help="play the runs in this process, without Ray")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as iterations=4")
    options = parser.parse_args(arguments)
    try:
        train(options.config, options.overrides, say=lambda line: print(line, flush=True), here=options.here)
    except EsperError as error:
        print(f"train_tamiyo: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("train_tamiyo: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
