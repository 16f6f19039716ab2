"""Tables for other readers (DuckDB, Polars, pandas): the state with one row an id. The truth is the log of events.

A writer that was taken over from must not put its older state into them. So each is opened first, then the writer makes
sure that it is the one, and then it is replaced from the handle as it was opened: deltalake refuses that if anybody has
written in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from esper import delta
from esper.delta import UNREPEATED, Tidied
from esper.leyline import Blueprint, CompiledKernelArtifact, Contract, Outcome
from esper.leyline.catalogue import KernelEntry
from esper.storage import Storage

BLUEPRINTS = pa.schema(
    {
        "blueprint_id": pa.string(),
        "name": pa.string(),
        "version": pa.int64(),
        "parent_id": pa.string(),
        "ir_hash": pa.string(),
        "status": pa.string(),
        "reason": pa.string(),
        "priority": pa.int64(),
        "tags": pa.list_(pa.string()),
        "targets": pa.list_(pa.string()),
        "submitted_by": pa.string(),
        "created_at": pa.float64(),
        "record": pa.string(),
    }
)
"""`record` is the whole contract as JSON; `targets` are signature keys."""

KERNELS = pa.schema(
    {
        "kernel_id": pa.string(),
        "compile_key": pa.string(),
        "blueprint_id": pa.string(),
        "blueprint_name": pa.string(),
        "signature": pa.string(),
        "pipeline": pa.string(),
        "optimization_level": pa.int64(),
        "fingerprint": pa.string(),
        "num_parameters": pa.int64(),
        "flops_per_sample": pa.int64(),
        "memory_bytes": pa.int64(),
        "size_bytes": pa.int64(),
        "zero_at_birth": pa.bool_(),
        "status": pa.string(),
        "tags": pa.list_(pa.string()),
        "risk_score": pa.float64(),
        "compile_s": pa.float64(),
        "performance": pa.float64(),
        "num_fetches": pa.int64(),
        "mean_gain": pa.float64(),
        "created_at": pa.float64(),
        **{outcome.value: pa.int64() for outcome in Outcome},
        "record": pa.string(),
    }
)
"""One column an outcome counts the adaptations that ended so."""


_ATTEMPTS = 5
"""To write a table while a writer that was taken over from writes it too."""

Confirm = Callable[[], None]
"""Raises where another writer has taken over."""


def write_blueprints(storage: Storage, blueprints: Sequence[Blueprint], confirm: Confirm) -> None:
    """Replaces the table `blueprints` below a storage address.

    Raises:
        StorageError: if that fails; and what `confirm` raises.
    """
    _replace(storage, "blueprints", BLUEPRINTS, map(_blueprint_row, blueprints), confirm)


def write_kernels(storage: Storage, kernels: Sequence[KernelEntry], confirm: Confirm) -> None:
    """Replaces the table `kernels` below a storage address; after `blueprints`, so that a kernel's blueprint is there.

    Raises:
        StorageError: if that fails; and what `confirm` raises.
    """
    _replace(storage, "kernels", KERNELS, map(_kernel_row, kernels), confirm)


def tidy(storage: Storage, kept_hours: float) -> list[Tidied]:
    """Removes what replaced versions of both tables left, `kept_hours` after it was replaced, and what crashes left.

    Whoever writes the tables meanwhile loses nothing: see `delta.tidy`.

    Raises:
        StorageError: if a table cannot be opened.
    """
    tidied = []
    for name in ("blueprints", "kernels"):
        try:
            table = DeltaTable(storage.child(name), storage_options=storage.delta_options)
        except (DeltaError, OSError) as error:
            raise storage.failure(f"open the table {name} of", error) from error
        tidied.append(delta.tidy(storage, name, table, kept_hours, full=True))
    return tidied


def _replace(storage: Storage, name: str, schema: pa.Schema, rows: Iterable[dict[str, Any]], confirm: Confirm) -> None:
    data = pa.Table.from_pylist(list(rows), schema=schema)
    uri, options = storage.child(name), storage.delta_options
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            # "ignore": whoever comes second opens what the first has made
            table = DeltaTable.create(uri, schema, mode="ignore", storage_options=options)
            confirm()
            write_deltalake(
                table,
                data,
                mode="overwrite",
                schema_mode="overwrite",
                commit_properties=UNREPEATED,
            )
        except (DeltaError, OSError) as error:
            if attempt == _ATTEMPTS:
                raise storage.failure(f"write the table {name} of", error) from error
            continue
        return


def _blueprint_row(blueprint: Blueprint) -> dict[str, Any]:
    own = {"targets": [target.key for target in blueprint.targets], "record": blueprint.model_dump_json()}
    return _plain(blueprint, _PLAIN_OF_BLUEPRINTS) | own


def _kernel_row(entry: KernelEntry) -> dict[str, Any]:
    kernel, statistics = entry.kernel, entry.statistics
    own = {
        "signature": kernel.signature.key,
        "performance": entry.performance,
        "num_fetches": statistics.num_fetches,
        "mean_gain": statistics.mean_gain,
        "record": kernel.model_dump_json(),
    }
    ended = {outcome.value: statistics.outcomes.get(outcome, 0) for outcome in Outcome}
    return _plain(kernel, _PLAIN_OF_KERNELS) | own | ended


_PLAIN_OF_BLUEPRINTS = [name for name in BLUEPRINTS.names if name in Blueprint.model_fields and name != "targets"]
_PLAIN_OF_KERNELS = [
    name for name in KERNELS.names if name in CompiledKernelArtifact.model_fields and name != "signature"
]
"""Columns that hold a field as it is; `model_dump` of a hundred thousand records would take most of the time."""


def _plain(record: Contract, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}
