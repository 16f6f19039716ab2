"""Versions of the events: what an older one needs to be read as today's, and the refusal of a newer one.

Every take-over writes the version that its events have. Old events are never rewritten: they are brought forward as
they are read, so that an upgrade that is killed half-way has changed nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from esper.leyline import StorageError
from esper.urza.records import SCHEMA_VERSION

Migration = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Turns the body of an event of a kind into that of the next version."""

MIGRATIONS: dict[int, Migration | None] = {
    1: None,  # version 2 brought `kernel.benchmarked` and `kernels.used`; what there was is the same
    # version 3 brought `target.renewed`, `target.released` and `sites.registered`; an expired lease is a death since
    2: None,
    3: None,  # version 4 brought figures, scores and tags to `kernel.stored`; an older report has none of them
}
"""By the version that they start from; None where no body changes."""


def upgrades(epochs: Mapping[int, str], *, where: str) -> dict[int, Callable[[str, str], str]]:
    """What the bodies of each epoch's events must go through; epochs whose events need nothing are left out.

    Args:
        epochs: the raw bodies of the take-overs: events of a newer schema may not parse.
        where: the address, for errors.

    Returns:
        By epoch, a function of kind and raw body to the raw body of today.

    Raises:
        StorageError: if an epoch is of a newer schema.
    """
    versions = {epoch: json.loads(body)["schema_version"] for epoch, body in epochs.items()}
    newest = max(versions.values(), default=SCHEMA_VERSION)
    if newest > SCHEMA_VERSION:
        raise StorageError(
            f"{where} was written by a newer Esper (schema {newest}, this one reads {SCHEMA_VERSION})",
            field="storage",
            remedy="upgrade Esper or choose another storage",
        )
    steps = {epoch: _steps(version) for epoch, version in versions.items()}
    return {epoch: partial(_upgrade, needed) for epoch, needed in steps.items() if needed}


def _steps(version: int) -> list[Migration]:
    found = (MIGRATIONS[older] for older in range(version, SCHEMA_VERSION))
    return [step for step in found if step is not None]


def _upgrade(steps: list[Migration], kind: str, body: str) -> str:
    value = json.loads(body)
    for step in steps:
        value = step(kind, value)
    return json.dumps(value)
