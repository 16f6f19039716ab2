"""Designs by name: shipped ones, and those that somebody submitted. A shipped name means the shipped design."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from esper.leyline import AssetHub, Blueprint, BlueprintIR, BlueprintStatus, NotFoundError
from esper.leyline.catalogue import BlueprintOrder, BlueprintQuery
from esper.storage import Storage
from esper.urza.library import load_library
from esper.urza.reading import Reader

Lookup = Callable[[str], Blueprint | None]
"""A submitted blueprint by its name; None if there is none."""


class NamedDesign(NamedTuple):
    """What a name stands for."""

    name: str
    ir: BlueprintIR
    tags: tuple[str, ...]


def find(name: str, submitted: Lookup) -> NamedDesign | None:
    """What a name stands for; None if it stands for nothing.

    Raises:
        StorageError: if the catalogue cannot be read.
        UnavailableError: if the hub does not answer.
    """
    if (shipped := load_library().get(name)) is not None:
        return NamedDesign(name, shipped.ir, shipped.tags)
    blueprint = submitted(name)
    return None if blueprint is None else NamedDesign(name, blueprint.ir, blueprint.tags)


def in_storage(storage: Storage) -> Lookup:
    """Looks at a storage address, whoever serves it; it is read at the first question."""
    readers: list[Reader] = []

    def look(name: str) -> Blueprint | None:
        try:
            if not readers:
                readers.append(Reader.of(storage))
        except NotFoundError:
            return None  # nothing was ever stored there
        query = BlueprintQuery(name=name, order=BlueprintOrder.NAME)
        return _newest(list(readers[0].search_blueprints(query).blueprints))

    return look


def in_hub(hub: AssetHub) -> Lookup:
    """Asks a hub."""
    return lambda name: _newest(hub.blueprints(name=name))


def _newest(versions: list[Blueprint]) -> Blueprint | None:
    """The last version that was not retired."""
    return next((one for one in reversed(versions) if one.status is not BlueprintStatus.RETIRED), None)
