"""What every Delta table of Esper has in common: commits that a stale handle cannot make, and tidying.

Knows nothing of what the tables hold. deltalake refuses a commit from a stale handle (`UNREPEATED`), and from nothing
else: so a writer that holds its handle knows that whatever it commits was decided on all that is in the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

from esper.leyline import FaultPlan, NoFaults, StorageError
from esper.storage import Storage

UNREPEATED = CommitProperties(max_commit_retries=0)
"""A commit that is refused where anybody else has committed since the handle was refreshed: the fence."""


@dataclass(frozen=True, slots=True)
class Tidied:
    """What was done to a table.

    Attributes:
        files_before, files_after: data files that a reader has to open.
        files_removed: replaced ones that were old enough to go.
        problem: what could not be done, in words; nothing is lost by it.
    """

    files_before: int = 0
    files_after: int = 0
    files_removed: int = 0
    problem: str = ""


def tidy(
    storage: Storage,
    name: str,
    table: DeltaTable,
    kept_hours: float,
    *,
    full: bool = False,
    faults: FaultPlan | None = None,
) -> Tidied:
    """Compacts a table, writes a checkpoint, and removes data files and log entries that were replaced long ago.

    Killed at any point it leaves a table that reads the same: each step is one commit, or removes what no commit needs.
    Stalled at any point, for however long, it takes nothing away from whoever writes meanwhile: its commits are refused
    then, as all are that a stale handle makes (`UNREPEATED`); what it removes was sealed by such a commit. The files
    to go are listed first, as no commit up to the handle's names them, or not any more. Then an empty commit is made
    from the same handle: nobody has committed in between, or it is refused. So no commit names those files, and none
    can name them later: who has written one of them for a commit of his own has an older handle, which is stale now.

    deltalake's own compaction and vacuum commit from a stale handle whatever `max_commit_retries` says: of two
    compactions at a time both go through, and every row is there twice; a full vacuum removes what a successor wrote.

    Args:
        storage: the address below which the table lies.
        name: the table's folder there.
        table: its handle; afterwards it is at the version of the last commit made here.
        kept_hours: a replaced file stays so long; a begun hour counts as a whole one.
        full: whether files that no commit names, and that are as old, go too. deltalake writes a commit's data before
            the commit: what a killed writer left would stay for good.
        faults: a script of faults, for tests; the places are `tidying`, `compacted`, `checkpointed`, `listed`,
            `sealed`, `vacuumed`.
    """
    before, removed, problem = len(table.file_uris()), 0, ""
    faults = faults or NoFaults()
    try:
        faults.at("tidying", table.version())
        _compact(table)
        faults.at("compacted", table.version())
        table.create_checkpoint()
        faults.at("checkpointed", table.version())
        listed = table.vacuum(math.ceil(kept_hours), dry_run=True, enforce_retention_duration=False, full=full)
        there = {file for file, _, _ in storage.listing(name)}
        unneeded = [path for path in listed if path in there]  # deltalake lists what went long ago as well
        faults.at("listed", table.version())
        if unneeded:
            _seal(table)
            faults.at("sealed", table.version())
        for path in unneeded:
            storage.remove(f"{name}/{path}")
            removed += 1
        faults.at("vacuumed", table.version())
        table.cleanup_metadata()
    except (DeltaError, OSError, pa.ArrowException, StorageError) as error:
        problem = f"{table.table_uri} could not be tidied: {' '.join(str(error).split())}"
    return Tidied(before, len(table.file_uris()), removed, problem)


def _compact(table: DeltaTable) -> None:
    """Puts what many files hold into one."""
    if len(table.file_uris()) > 1:
        write_deltalake(table, table.to_pyarrow_table(), mode="overwrite", commit_properties=UNREPEATED)


def _seal(table: DeltaTable) -> None:
    """Makes an empty commit, which is refused if anybody has committed since the handle was refreshed."""
    version = table.version()
    table.create_write_transaction([], mode="append", schema=table.schema(), commit_properties=UNREPEATED)
    table.load_as_version(version + 1)  # it does not do so by itself; and no further
