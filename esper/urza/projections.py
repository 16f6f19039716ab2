"""Tables for other readers (DuckDB, Polars, pandas): the state with one row an id. The truth is the log of events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake
from deltalake.exceptions import DeltaError

from esper.leyline import Blueprint, CompiledKernelArtifact, Outcome
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
        "compile_s": pa.float64(),
        "created_at": pa.float64(),
        **{outcome.value: pa.int64() for outcome in Outcome},
        "record": pa.string(),
    }
)
"""One column an outcome counts the adaptations that ended so."""


def write(
    storage: Storage,
    blueprints: Sequence[Blueprint],
    kernels: Sequence[tuple[CompiledKernelArtifact, Mapping[Outcome, int]]],
) -> None:
    """Replaces the tables `blueprints` and `kernels` below a storage address.

    Raises:
        StorageError: if that fails.
    """
    _replace(storage, "blueprints", BLUEPRINTS, map(_blueprint_row, blueprints))
    _replace(storage, "kernels", KERNELS, (_kernel_row(kernel, counts) for kernel, counts in kernels))


def _replace(storage: Storage, name: str, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(list(rows), schema=schema)
    try:
        write_deltalake(
            storage.child(name),
            table,
            mode="overwrite",
            schema_mode="overwrite",
            storage_options=storage.delta_options,
        )
    except (DeltaError, OSError) as error:
        raise storage.failure(f"write the table {name} of", error) from error


def _blueprint_row(blueprint: Blueprint) -> dict[str, Any]:
    own = {"targets": [target.key for target in blueprint.targets], "record": blueprint.model_dump_json()}
    return blueprint.model_dump(mode="json", include=set(BLUEPRINTS.names)) | own


def _kernel_row(kernel: CompiledKernelArtifact, counts: Mapping[Outcome, int]) -> dict[str, Any]:
    own = {"signature": kernel.signature.key, "record": kernel.model_dump_json()}
    ended = {outcome.value: counts.get(outcome, 0) for outcome in Outcome}
    return kernel.model_dump(mode="json", include=set(KERNELS.names)) | own | ended
