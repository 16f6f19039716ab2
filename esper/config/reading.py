"""Configuration from YAML and dotted overrides (`tolaria.epochs=2`); a complaint names the key and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from esper.config.run import RunConfig
from esper.leyline.errors import ConfigError


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Reads a YAML file and applies dotted overrides.

    Args:
        path: the file.
        overrides: such as `tolaria.epochs=2`; the value is parsed as YAML.

    Raises:
        ConfigError: if the file is missing or not YAML, or a key or value is wrong; names the key and the remedy.
    """
    try:
        text = Path(path).expanduser().read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", remedy="give a YAML file, see configs/") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not a mapping of keys")
    return parse_config(tree, overrides)


def parse_config(tree: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Validates a tree of plain values; see `load_config`."""
    merged = _copy(tree)
    for override in overrides:
        _apply(merged, override)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error) from error


def dump_config(config: RunConfig) -> str:
    """Returns the YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} has no value", remedy="write KEY=VALUE, such as tolaria.epochs=2")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value {text!r} is not YAML", field=key) from error
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{parent} is a value, not a section", field=key)
        node = child
    node[leaf] = value


def _explain(error: ValidationError) -> ConfigError:
    """Turns pydantic's first complaint into one line that names the key and the remedy."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    # a discriminated union puts the chosen type into the location; it is no key of the file
    tag = location.pop(1) if len(location) > 1 and location[0] in _UNIONS else None
    field = ".".join(location)
    rest = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(RunConfig, location[:-1], tag)
        close = difflib.get_close_matches(location[-1], known, n=1)
        here = f"with type {tag}" if tag else "here"
        remedy = f"did you mean {close[0]}?" if close else f"known keys {here}: {', '.join(known)}"
        return ConfigError(f"no such key{rest}", field=field, remedy=remedy)
    if first["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        tags = str(first.get("ctx", {}).get("expected_tags", "see the README"))
        return ConfigError(f"unknown or missing type{rest}", field=f"{field}.type", remedy=f"one of {tags}")
    message = first["msg"].removeprefix("Value error, ")
    got = f", got {first['input']!r}" if not isinstance(first["input"], dict) else ""
    return ConfigError(f"{message}{got}{rest}", field=field or None, remedy="see the comments in configs/digits.yaml")


_UNIONS = frozenset(key for key, field in RunConfig.model_fields.items() if field.discriminator is not None)


def _known_keys(model: type[BaseModel], location: list[str], tag: str | None) -> list[str]:
    sections = [model]
    for part in location:
        found: list[type[BaseModel]] = []
        for section in sections:
            field = section.model_fields.get(part)
            found.extend(_sections_of(field.annotation) if field else ())
        sections = found
    if tag is not None:
        sections = [section for section in sections if section.model_fields["type"].default == tag]
    return sorted({key for section in sections for key in section.model_fields})


def _sections_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in getattr(annotation, "__args__", ()) for section in _sections_of(part)]
