"""One round of maintenance of a storage address: the log, the blobs, and the tables for other readers."""

from __future__ import annotations

import logging

from esper.leyline.catalogue import MaintenanceReport
from esper.storage import Storage
from esper.urza.hub import Hub

KEPT_HOURS = 24.0
"""So long a replaced file of a table stays, for whoever reads it meanwhile."""
GRACE_HOURS = 24.0
"""So long a blob that no event names stays: longer than any upload, lease or clock is late."""

_LOG = logging.getLogger(__name__)


def maintain(
    hub: Hub, storage: Storage, *, kept_hours: float = KEPT_HOURS, grace_hours: float = GRACE_HOURS
) -> MaintenanceReport:
    """Does everything that keeps an address quick and small. Killed at any point it leaves the address readable.

    Args:
        hub: the address's one writer.
        storage: the address.
        kept_hours: see `KEPT_HOURS`.
        grace_hours: see `GRACE_HOURS`.

    Raises:
        FencedError: if another Urza has taken over.
        UnavailableError: if that is not known; take over again.
        StorageError: if a table or the blobs cannot be read or written.
    """
    report = hub.maintain(kept_hours=kept_hours, grace_hours=grace_hours)
    hub.project(storage)
    tables = hub.tidy_projections(storage, kept_hours)
    problems = (*report.problems, *(table.problem for table in tables if table.problem))
    files_removed = report.files_removed + sum(table.files_removed for table in tables)
    report = report.model_copy(update={"files_removed": files_removed, "problems": problems})
    _LOG.info("urza.maintained", extra=report.model_dump())
    return report
