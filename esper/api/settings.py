"""A configuration with the arguments of a call over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from esper.config import RunConfig, parse_config
from esper.leyline.errors import ConfigError


def resolve(config: RunConfig, settings: Mapping[str, Any], overrides: Iterable[str]) -> RunConfig:
    """The configuration with dotted settings over it; None leaves what is there."""
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        if value is None:
            continue
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return parse_config(tree, overrides)


def refuse(overrides: Iterable[str], settings: Mapping[str, str], *, words: str) -> None:
    """Refuses overrides that nobody would read.

    Args:
        overrides: dotted settings with their values.
        settings: what is refused, with what lies in it; the remedy of each.
        words: why.

    Raises:
        ConfigError: for the first of them.
    """
    for override in overrides:
        name = override.partition("=")[0].strip()
        for setting, remedy in settings.items():
            if name == setting or name.startswith(f"{setting}."):
                raise ConfigError(words, field=name, remedy=remedy)
