"""A configuration with the arguments of a call over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from esper.config import RunConfig, parse_config


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
