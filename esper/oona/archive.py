"""The archive: messages of some topics as rows of the Delta table `archive` below a storage address, the audit trail.

Each message is one row, however often it comes and whoever writes: a commit is made only from a handle that has seen
all commits before it (`UNREPEATED`), and what such a handle finds in the table is not written again. A message is known
by (shard, offset) and its own id: a log that was begun anew counts its offsets from 0 again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from esper.delta import UNREPEATED, Tidied, tidy
from esper.leyline.errors import NotFoundError, UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import Delivery
from esper.storage import Storage

TABLE = "archive"
TIDY_EVERY = 200
"""Commits from one tidying of the table to the next."""
KEPT_HOURS = 24
"""So long a replaced file stays, for whoever reads the table meanwhile."""
ATTEMPTS = 5
"""To commit while others commit too."""

SCHEMA = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("timestamp", pa.float64(), nullable=False),
        pa.field("sender_id", pa.string(), nullable=False),
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("payload", pa.string(), nullable=False),
    ]
)
"""One row a message: `seq` is the order of the archive, within (topic, key) that of the bus; `payload` is JSON."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Archived:
    """A message as it lies in the archive."""

    seq: int
    shard: int
    offset: int
    message: OonaMessage


class Archive:
    """Writes the archive of a storage address; it is made where there is none. Not safe for threads.

    Raises:
        StorageError: if the address cannot be read or written.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._num_commits = 0
        self._look()

    def append(self, deliveries: Sequence[Delivery]) -> int:
        """Makes messages durable, those that are in the table already not again; returns how many were new.

        Raises:
            UnavailableError: if the table cannot be written at present; what is given again later is written once.
        """
        failure: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                if failure is not None:
                    self._look()  # somebody else has committed, or this commit's answer was lost
                fresh = self._fresh(deliveries)
                if fresh:
                    self._commit(fresh)
            except (DeltaError, OSError) as error:
                failure = error
                continue
            return len(fresh)
        raise UnavailableError(f"cannot write {self._storage.child(TABLE)}: {failure}") from failure

    def tidy(self, *, kept_hours: float = KEPT_HOURS, full: bool = False) -> Tidied:
        """Makes the table quick to read again; see `esper.delta.tidy`."""
        tidied = tidy(self._storage, TABLE, self._table, kept_hours, full=full)
        if tidied.problem:
            logger.warning("oona.archive.untidy", extra={"reason": tidied.problem})
        self._look()
        return tidied

    # ---- within

    def _look(self) -> None:
        """A fresh handle, and the last offset of each shard as it sees them."""
        self._table = _open(self._storage)
        columns = self._table.to_pyarrow_table(columns=["seq", "shard", "offset"])
        self._next_seq = max(columns["seq"].to_pylist(), default=0) + 1
        last = columns.group_by("shard").aggregate([("offset", "max")])
        self._last: dict[int, int] = dict(zip(last["shard"].to_pylist(), last["offset_max"].to_pylist(), strict=True))

    def _fresh(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """What is not in the table, each once, in the order of the log."""
        unique = {(each.shard, each.offset): each for each in deliveries}
        maybe_old = [at for at in unique if at[1] <= self._last.get(at[0], -1)]
        known = self._known(maybe_old) if maybe_old else set()
        return [each for at, each in sorted(unique.items()) if (*at, each.message.event_id) not in known]

    def _known(self, positions: Sequence[tuple[int, int]]) -> set[tuple[int, int, str]]:
        """Rows of the table among which those of these positions are."""
        offsets = [offset for _, offset in positions]
        rows = self._table.to_pyarrow_table(
            columns=["shard", "offset", "event_id"],
            filters=[("offset", ">=", min(offsets)), ("offset", "<=", max(offsets))],
        )
        return set(zip(*(rows[name].to_pylist() for name in ("shard", "offset", "event_id")), strict=True))

    def _commit(self, deliveries: Sequence[Delivery]) -> None:
        rows = [_row(self._next_seq + index, each) for index, each in enumerate(deliveries)]
        data = pa.Table.from_pylist(rows, schema=SCHEMA)
        write_deltalake(self._table, data, mode="append", commit_properties=UNREPEATED)
        self._next_seq += len(rows)
        for each in deliveries:
            self._last[each.shard] = max(each.offset, self._last.get(each.shard, -1))
        self._num_commits += 1
        if self._num_commits >= TIDY_EVERY:
            self._num_commits = 0
            self.tidy()


def read_archive(storage: Storage, topics: Iterable[Topic] = (), *, key: str | None = None) -> list[Archived]:
    """Reads the archive as it is now, in its order; needs no bus and no Ray, and changes nothing.

    Args:
        storage: the address.
        topics: none means all.
        key: such as a run's id; None means all.

    Raises:
        NotFoundError: if there is none.
        StorageError: if it cannot be read.
    """
    names = [Topic(topic).value for topic in topics]
    filters: list[tuple[str, str, Any]] = [("topic", "in", names)] if names else []
    filters += [("key", "=", key)] if key is not None else []
    try:
        table = DeltaTable(storage.child(TABLE), storage_options=storage.delta_options)
        rows = table.to_pyarrow_table(filters=filters or None).sort_by("seq").to_pylist()
    except TableNotFoundError as error:
        raise NotFoundError(f"no archive below {storage.shown}") from error
    except (DeltaError, OSError) as error:
        raise storage.failure("read the archive of", error) from error
    return [_archived(row) for row in rows]


def _open(storage: Storage) -> DeltaTable:
    uri, options = storage.child(TABLE), storage.delta_options
    try:
        # "ignore": whoever comes second opens what the first has made
        return DeltaTable.create(uri, SCHEMA, mode="ignore", storage_options=options)
    except (DeltaError, OSError) as error:
        raise storage.failure("open the archive of", error) from error


def _row(seq: int, delivery: Delivery) -> dict[str, Any]:
    message = delivery.message
    return {
        "seq": seq,
        "topic": message.topic.value,
        "key": message.key,
        "shard": delivery.shard,
        "offset": delivery.offset,
        "timestamp": message.timestamp,
        "sender_id": message.sender_id,
        "trace_id": message.trace_id,
        "event_id": message.event_id,
        "payload": json.dumps(message.payload, separators=(",", ":")),
    }


def _archived(row: dict[str, Any]) -> Archived:
    envelope = {name: row[name] for name in ("topic", "key", "timestamp", "sender_id", "trace_id", "event_id")}
    message = OonaMessage.model_validate({**envelope, "payload": json.loads(row["payload"])})
    return Archived(row["seq"], row["shard"], row["offset"], message)
