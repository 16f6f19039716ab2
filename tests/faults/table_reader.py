"""A program that reads Urza's storage while Urza is killed, as any tool of the ecosystem would: it knows no Esper.

`table_reader.py PLACES STOP RESULT`: PLACES is JSON (`events`, `blueprints`, `kernels`: addresses of Delta tables;
`blobs`: a path; `delta_options`, `fsspec_options`). It reads until the file STOP exists, then writes to RESULT what
it saw.
It ends with an error at the first thing that is not whole:

- the log is a prefix of every later one: its numbers have no gaps, its epochs never fall, no row changes or vanishes;
- what belongs to one request is there together: a blueprint with its targets, a kernel with the target it settles;
- every kernel that the log names has its bytes, and they hash to its name;
- the tables have one row an id, agree with the record in the row, and name nothing that the log does not hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

Row = dict[str, Any]
PAUSE_S = 0.1
MAX_MISSES = 50


class NotWholeError(AssertionError):
    """Something half-written, lost or changed was seen."""


class Log:
    """Checks one state of the log after the other."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.jobs_of: dict[str, set[str]] = {}
        self.ids: dict[str, set[str]] = {}

    def take(self, rows: Sequence[Row]) -> list[Row]:
        """Checks a later state, sorted by `seq`; returns the rows that are new.

        Raises:
            NotWholeError: see the module.
        """
        seqs = [row["seq"] for row in rows]
        _demand(seqs == list(range(1, len(rows) + 1)), f"the log's numbers have gaps: {len(rows)} rows")
        epochs = [row["epoch"] for row in rows]
        _demand(epochs == sorted(epochs), "an epoch wrote after its successor")
        _demand(len(rows) >= len(self.rows), f"the log shrank from {len(self.rows)} to {len(rows)} rows")
        for old, new in zip(self.rows, rows, strict=False):
            _demand(old == new, f"a row changed: {old} -> {new}")
        fresh = list(rows[len(self.rows) :])
        self.rows = list(rows)
        self._check_whole(fresh)
        return fresh

    def _check_whole(self, fresh: Sequence[Row]) -> None:
        settled = {json.loads(row["body"])["kernel_id"] for row in fresh if row["kind"] == "target.compiled"}
        for row in fresh:
            self.ids.setdefault(row["kind"], set()).add(row["id"])
            if row["kind"] in {"target.queued", "target.unfit"}:
                self.jobs_of.setdefault(json.loads(row["body"])["blueprint_id"], set()).add(row["id"])
        for row in fresh:
            if row["kind"] == "blueprint.submitted":
                wanted = json.loads(row["body"])["metadata"]["num_targets"]
                _demand(len(self.jobs_of.get(row["id"], ())) >= wanted, f"blueprint {row['id']} lacks targets")
            if row["kind"] == "kernel.stored":
                _demand(row["id"] in settled, f"kernel {row['id']} without the target it settles")


def read_rows(address: str, options: dict[str, str]) -> list[Row]:
    """The rows of a Delta table as it is now."""
    return DeltaTable(address, storage_options=options).to_pyarrow_table().to_pylist()


def files(address: str, options: dict[str, str]) -> list[str]:
    """The data files that a table reads now."""
    return DeltaTable(address, storage_options=options).file_uris()


def check_blob(fs: Any, folder: str, digest: str) -> None:
    """Raises `NotWholeError` unless the blob is there and is what its name says."""
    try:
        data = fs.cat_file(f"{folder}/{digest[:2]}/{digest}")
    except FileNotFoundError as error:
        raise NotWholeError(f"blob {digest} is missing") from error
    _demand(hashlib.sha256(data).hexdigest() == digest, f"blob {digest} holds other bytes")


def check_table(rows: Sequence[Row], key: str) -> set[str]:
    """Checks a table of one row an id; returns the ids."""
    ids = [row[key] for row in rows]
    _demand(len(ids) == len(set(ids)), f"an id has two rows in the table of {key}")
    for row in rows:
        record = json.loads(row["record"])
        _demand(
            (record[key], record["status"]) == (row[key], row["status"]), f"{key} {row[key]} is at odds with itself"
        )
    return set(ids)


def main() -> None:
    places, stop, result = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    options = places["delta_options"]
    fs = fsspec.filesystem("s3" if options else "file", **places["fsspec_options"])
    log, num_kernels, misses = Log(), 0, 0
    counts: Counter[str] = Counter()
    parent = os.getppid()
    while not stop.exists() and os.getppid() == parent:  # nobody is left to tell it where the soak was killed
        try:
            # in the reverse order of writing: what a table names must be in what is read after it
            kernels = check_table(read_rows(places["kernels"], options), "kernel_id")
            blueprints = read_rows(places["blueprints"], options)
            rows = sorted(read_rows(places["events"], options), key=lambda row: row["seq"])
        except TableNotFoundError:
            _demand(not counts["tables"], "a table is gone")
            counts["early"] += 1  # Urza has not made them yet
        except (DeltaError, OSError) as error:
            # a version whose files maintenance has removed, which it keeps for no time at all here: ask for the newest
            misses += 1
            counts["misses"] += 1
            _demand("not found" in str(error).lower() or "no such" in str(error).lower(), f"cannot read: {error}")
            _demand(misses < MAX_MISSES, f"{misses} times in a row: {error}")
            continue
        else:
            misses = 0
            counts["tables"] += 1
            names = check_table(blueprints, "blueprint_id")
            fresh = log.take(rows)
            _demand(len(kernels) >= num_kernels, "the table of kernels shrank")
            num_kernels = len(kernels)
            _demand(kernels <= log.ids.get("kernel.stored", set()), "a kernel that the log does not hold")
            _demand(names <= log.ids.get("blueprint.submitted", set()), "a blueprint that the log does not hold")
            for row in fresh:
                if row["kind"] == "kernel.stored":
                    check_blob(fs, places["blobs"], row["id"])
                    counts["blobs"] += 1
        time.sleep(PAUSE_S)
    result.write_text(json.dumps({"events": len(log.rows), **counts}))


def _demand(holds: bool, what: str) -> None:
    if not holds:
        raise NotWholeError(what)


if __name__ == "__main__":
    main()
