"""The log of events: the truth. One Delta table, one writer, one commit for all that arrives together.

The writer holds its table handle and refreshes it only when it takes over: deltalake refuses a commit from a stale
handle (`max_commit_retries=0`), and from nothing else. So whoever commits the next epoch first has taken over, and
every later commit of the old writer is refused. Knows nothing of what the events mean.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from esper.delta import UNREPEATED, Tidied, tidy
from esper.leyline import (
    EsperError,
    FaultPlan,
    FencedError,
    NoFaults,
    NotFoundError,
    StorageError,
    UnavailableError,
    new_id,
)
from esper.storage import Storage
from esper.urza import schema
from esper.urza.records import BODIES, SCHEMA_VERSION, EpochTaken, Event, EventKind

TABLE = "events"
TIDY_EVERY = 200
"""Commits from one tidying of the table to the next."""
KEPT_HOURS = 24
"""So long a replaced file stays, for whoever reads the table meanwhile."""
_TAKE_OVERS = 5
"""Attempts to take over while another writer starts at the same moment."""

_LOG = logging.getLogger(__name__)


class EventLog(Protocol):
    """An append-only log with one writer."""

    @property
    def epoch(self) -> int:
        """The epoch of this writer."""
        ...

    def replay(self) -> list[Event]:
        """All events up to this writer's take-over, in order."""
        ...

    def append(self, events: Sequence[Event]) -> None:
        """Makes the events durable, all or none.

        Raises:
            FencedError: if another writer has taken over; this one must stop.
            UnavailableError: if it is not known whether they are durable; take over again and look.
        """
        ...

    def confirm(self) -> None:
        """Makes sure that this writer is still the one.

        Raises:
            FencedError: if another writer has taken over; this one must stop.
            StorageError: if that cannot be read.
        """
        ...

    def maintain(self, *, kept_hours: float) -> Tidied:
        """Makes the log quick to read again, and removes what was replaced more than `kept_hours` ago.

        Raises:
            FencedError: if another writer has taken over; this one must stop.
            UnavailableError: if it is not known who writes.
        """
        ...


class MemoryLog:
    """A log in a list."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.epoch = 1
        self._events = [_taking_over(seq=1, epoch=1, time=clock(), writer="memory")]

    def replay(self) -> list[Event]:
        return list(self._events)

    def append(self, events: Sequence[Event]) -> None:
        self._events += events

    def confirm(self) -> None:
        """Nobody else can write."""

    def maintain(self, *, kept_hours: float) -> Tidied:
        del kept_hours
        return Tidied()


class DeltaLog:
    """A log in the Delta table `<storage>/events`. Open it with `take_over`.

    The places of a `FaultPlan` are `taking_over` (the log was read), and those of `tidy`.
    """

    def __init__(
        self, storage: Storage, table: DeltaTable, events: list[Event], faults: FaultPlan | None = None
    ) -> None:
        self._storage = storage
        self._table = table
        self._start = events
        self._num_commits = table.version()  # a table that was left untidy is tidied soon
        self._ended: EsperError | None = None
        self._faults = faults or NoFaults()
        self.epoch = events[-1].epoch

    @classmethod
    def take_over(
        cls,
        storage: Storage,
        clock: Callable[[], float],
        *,
        after_epoch: int | None = None,
        faults: FaultPlan | None = None,
    ) -> DeltaLog:
        """Opens the log as its only writer; makes the table where there is none.

        Args:
            storage: where the table lies.
            clock: seconds since the epoch.
            after_epoch: take over only from this epoch: for a writer that comes back after its own failure.
            faults: a script of faults, for tests.

        Raises:
            FencedError: if the log's epoch is another than `after_epoch`.
            StorageError: if the address cannot be read or written, or the log is of a newer schema.
        """
        writer = f"{socket.gethostname()}:{os.getpid()}:{new_id()[:8]}"
        for attempt in range(1, _TAKE_OVERS + 1):
            table = _open(storage)
            events = _read(storage, table)
            last = max((event.epoch for event in events), default=0)
            if events and _writer_of(events, last) == writer:
                return cls(storage, table, events, faults)  # the commit was accepted and its reply was lost
            if after_epoch is not None and last != after_epoch:
                raise _fenced(storage, after_epoch)
            (faults or NoFaults()).at("taking_over", last)
            taking = _taking_over(seq=events[-1].seq + 1 if events else 1, epoch=last + 1, time=clock(), writer=writer)
            try:
                _commit(table, [taking])
            except (DeltaError, OSError) as error:
                # another writer may have started at the same moment: the later one wins
                if attempt == _TAKE_OVERS:
                    raise storage.failure("write the events of", error) from error
                continue
            return cls(storage, table, [*events, taking], faults)
        raise AssertionError("unreachable")

    def replay(self) -> list[Event]:
        return list(self._start)

    def append(self, events: Sequence[Event]) -> None:
        if self._ended is not None:
            raise self._ended
        try:
            _commit(self._table, events)
        except (DeltaError, OSError) as error:
            if self._someone_took_over():
                raise _fenced(self._storage, self.epoch) from error
            raise UnavailableError(f"commit to {self._storage.child(TABLE)} failed: {error}") from error
        self._num_commits += 1
        if self._num_commits >= TIDY_EVERY:
            self._num_commits = 0
            self._tidy()

    def confirm(self) -> None:
        if _last_epoch(self._storage) > self.epoch:
            raise _fenced(self._storage, self.epoch)

    def maintain(self, *, kept_hours: float = KEPT_HOURS) -> Tidied:
        if self._ended is not None:
            raise self._ended
        tidied = self._tidy(kept_hours, full=True)
        if self._ended is not None:
            raise self._ended
        return tidied

    def _tidy(self, kept_hours: float = KEPT_HOURS, *, full: bool = False) -> Tidied:
        """Puts the files of many commits into one and writes a checkpoint; removes files that were replaced long ago.

        `full` removes what no commit names as well: files of a writer that was killed before its commit.

        A commit takes longer with every file that the table has, by about 0.1 ms. A failure loses nothing: the events
        are durable before. It looks afterwards who writes, because a commit of `tidy` may have been refused, and
        because the blobs are swept next; and before, because what was taken over from needs no tidying.
        """
        self._look_who_writes()
        if self._ended is not None:
            return Tidied(problem=str(self._ended))
        tidied = tidy(self._storage, TABLE, self._table, kept_hours, full=full, faults=self._faults)
        if tidied.problem:
            _LOG.warning("urza.events_untidy", extra={"reason": tidied.problem})
        self._look_who_writes()
        return tidied

    def _look_who_writes(self) -> None:
        """Ends this writer if another has taken over, or if that cannot be seen."""
        try:
            if _last_epoch(self._storage) > self.epoch:
                self._ended = _fenced(self._storage, self.epoch)
        except EsperError as error:
            self._ended = UnavailableError(f"it is not known who writes {self._storage.child(TABLE)}: {error}")

    def _someone_took_over(self) -> bool:
        """Looks with a handle of its own: this writer's must stay as it is."""
        try:
            return _last_epoch(self._storage) > self.epoch
        except StorageError:
            return False  # not known; taking over again will tell


def _taking_over(*, seq: int, epoch: int, time: float, writer: str) -> Event:
    body = EpochTaken(schema_version=SCHEMA_VERSION, writer=writer)
    return Event(seq, epoch, time, EventKind.EPOCH, str(epoch), body)


def _writer_of(events: Sequence[Event], epoch: int) -> str | None:
    bodies = (event.body for event in events if event.epoch == epoch)
    return next((body.writer for body in bodies if isinstance(body, EpochTaken)), None)


def _fenced(storage: Storage, epoch: int) -> FencedError:
    return FencedError(
        f"another Urza has taken over {storage.uri} from epoch {epoch}", remedy="stop one of them, or use two addresses"
    )


# ---------------------------------------------------------------- the table


_SCHEMA = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("epoch", pa.int64(), nullable=False),
        pa.field("time", pa.float64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("body", pa.string(), nullable=False),
    ]
)


def read_events(storage: Storage) -> list[Event]:
    """Reads the log as it is now, beside whoever writes it; changes nothing.

    Raises:
        NotFoundError: if there is none.
        StorageError: if it cannot be read, or is of a newer schema.
    """
    try:
        table = DeltaTable(storage.child(TABLE), storage_options=storage.delta_options)
    except TableNotFoundError as error:
        raise NotFoundError(
            f"no catalogue below {storage.shown}", remedy="esper train, or name another --storage"
        ) from (error)
    except (DeltaError, OSError) as error:
        raise storage.failure("open the events of", error) from error
    return _read(storage, table)


def last_writer(storage: Storage) -> str | None:
    """Who took the log over last, as `host:pid:id`; None where there is no log.

    Raises:
        StorageError: if it cannot be read.
    """
    try:
        table = DeltaTable(storage.child(TABLE), storage_options=storage.delta_options)
        takers = table.to_pyarrow_table(columns=["epoch", "body"], filters=[("kind", "=", EventKind.EPOCH.value)])
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise storage.failure("read the events of", error) from error
    rows = takers.to_pylist()
    return str(json.loads(max(rows, key=lambda row: row["epoch"])["body"])["writer"]) if rows else None


def _open(storage: Storage) -> DeltaTable:
    uri, options = storage.child(TABLE), storage.delta_options
    try:
        try:
            return DeltaTable(uri, storage_options=options)
        except TableNotFoundError:
            # "ignore": whoever comes second opens what the first has made
            return DeltaTable.create(uri, _SCHEMA, mode="ignore", storage_options=options)
    except (DeltaError, OSError) as error:
        raise storage.failure("open the events of", error) from error


def _commit(table: DeltaTable, events: Sequence[Event]) -> None:
    write_deltalake(table, _encode(events), mode="append", commit_properties=UNREPEATED)


def _encode(events: Sequence[Event]) -> pa.Table:
    rows = [(e.seq, e.epoch, e.time, e.kind.value, e.id, e.body.model_dump_json()) for e in events]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _read(storage: Storage, table: DeltaTable) -> list[Event]:
    try:
        columns = table.to_pyarrow_table().sort_by("seq").to_pydict()
    except (DeltaError, OSError) as error:
        raise storage.failure("read the events of", error) from error
    rows = list(zip(*(columns[name] for name in _SCHEMA.names), strict=True))
    epochs = {epoch: body for _, epoch, _, kind, _, body in rows if kind == EventKind.EPOCH}
    upgrades = schema.upgrades(epochs, where=storage.uri)
    parse = {kind.value: (kind, body.__pydantic_validator__.validate_json) for kind, body in BODIES.items()}
    events = []
    for seq, epoch, time, name, id_, body in rows:  # a restart waits for this: no look-ups that can be done once
        kind, validate = parse[name]
        upgrade = upgrades.get(epoch)
        events.append(Event(seq, epoch, time, kind, id_, validate(upgrade(name, body) if upgrade else body)))
    return events


def _last_epoch(storage: Storage) -> int:
    """The newest writer's epoch, read with a handle of its own."""
    try:
        return max(_open(storage).to_pyarrow_table(columns=["epoch"])["epoch"].to_pylist(), default=0)
    except (DeltaError, OSError) as error:
        raise storage.failure("read the events of", error) from error
