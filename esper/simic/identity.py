"""What makes two runs, or two trainings of a policy, the same: the settings that their outcome depends on. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from esper.config import RunConfig, TezzeretConfig
from esper.leyline import DataError
from esper.leyline.errors import excerpt
from esper.simic.settings import TrainTamiyoConfig

_COMPILED = {"blueprints", "limits"}
_NOT_OF_A_RUN: dict[str, Any] = {
    **dict.fromkeys(("storage", "storage_options", "urza", "oona", "nissa", "simic"), True),
    "tezzeret": set(TezzeretConfig.model_fields) - _COMPILED,
}
"""Where a run in one process is stored and shown, what is logged of it, and the pool that it does not have."""
_NOT_OF_A_TRAINING: dict[str, Any] = {
    **dict.fromkeys(("name", "storage", "storage_options", "judged"), True),
    "rollout": {"workers", "cpus_per_worker", "deadline_s"},
    "iterations": True,  # may be changed, and is not without consequence: see `check_iterations`
    **dict.fromkeys(("tasks", "overrides"), True),  # what they name counts, not where it stands
}
_SHOWN = 3

Stretch = tuple[int, int]
"""Updates done before it, and the `iterations` towards which the entropy's weight falls from there on."""


def settings_of_run(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that the outcome of a run in one process depends on, plain JSON."""
    return config.model_dump(mode="json", exclude=_NOT_OF_A_RUN)


def settings_of_training(config: TrainTamiyoConfig, tasks: Sequence[RunConfig]) -> dict[str, Any]:
    """Returns the settings that must stay as they are while a training goes on, plain JSON.

    Args:
        config: of the training.
        tasks: its runs, as they were read: a file that was edited is another task.
    """
    own = config.model_dump(mode="json", exclude=_NOT_OF_A_TRAINING)
    return own | {"tasks": [settings_of_run(task) for task in tasks]}


def digest_of(settings: Mapping[str, Any]) -> str:
    """Returns eight hexadecimal digits that stand for these settings."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check_same(began: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Compares the settings of a training with those that it began with.

    Args:
        began: see `settings_of_training`.
        now: likewise.
        where: the address of its state.

    Raises:
        DataError: names the first setting that differs, both values, and others that do.
    """
    old, new = dict(_flat(began)), dict(_flat(now))
    others = [key for key in {**new, **old} if old.get(key) != new.get(key) or (key in old) != (key in new)]
    if not others:
        return
    first, *rest = others
    more = ""
    if rest:
        named = ", ".join(rest[:_SHOWN]) + (", ..." if len(rest) > _SHOWN else "")
        more = f"; {len(rest)} more differ: {named}"
    differ = f"it began with {_said(old, first)}, not {_said(new, first)}"
    raise DataError(
        f"a training of other settings lies in {where}: {differ}{more}",
        field=first,
        remedy="with the settings that it began with it goes on; begin anew under another name (name=NAME), or remove"
        " that folder",
    )


def check_iterations(done: int, iterations: int, where: str) -> None:
    """Raises `DataError` if a training has done more updates than it shall do in all."""
    if done > iterations:
        raise DataError(
            f"the training in {where} has done {done} updates already, more than {iterations}",
            field="iterations",
            remedy=f"iterations={done} or more; fewer need a training of another name (name=NAME)",
        )


def change_in_words(done: int, before: int, iterations: int) -> str:
    """What another number of updates means for a training that goes on."""
    return (
        f"iterations was {before} and is {iterations}: from update {done + 1} on the entropy's weight falls as in a "
        f"training of {iterations}; the updates before stay as they are"
    )


def entropy_in_words(stretches: Sequence[Stretch], done: int) -> str:
    """How the entropy's weight fell, in brackets, where a training of `done` updates would have had it otherwise; else
    nothing.
    """
    if not stretches or list(stretches) == [(0, done)]:
        return ""
    parts = [f"{iterations}" + (f" after update {first}" if first else "") for first, iterations in stretches]
    return f" (the entropy's weight fell as for iterations={', as for iterations='.join(parts)})"


def _flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Keys such as `tasks[0].tolaria.epochs`, and what stands there."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{at}.{key}" if at else key)
    elif isinstance(tree, list) and tree and all(isinstance(one, Mapping) for one in tree):
        for i, one in enumerate(tree):
            yield from _flat(one, f"{at}[{i}]")
    else:
        yield at, tree


def _said(settings: Mapping[str, Any], key: str) -> str:
    return excerpt(settings[key]) if key in settings else "nothing"
