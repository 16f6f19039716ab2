"""The bus inside one process: the same broker without a log, for tests and for programs without Ray.

Nothing survives the process. Threads may share it; `poll` waits on a condition, not by looking again and again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from esper.config import OonaConfig
from esper.leyline.bus import BusStats
from esper.leyline.errors import UnavailableError
from esper.leyline.summary import BusCounts
from esper.oona.broker import Admission, Broker
from esper.oona.client import BusClient
from esper.oona.deadletters import letters_of, spent_reason
from esper.oona.drops import DropTold
from esper.oona.spans import num_in
from esper.oona.start import Start
from esper.oona.transport import Received, Shelf
from esper.oona.wire import Batch, decode_batch


class MemoryTransport:
    """One broker behind a lock.

    Args:
        clock: seconds, monotonic; leases are counted on it.
        wall_clock: seconds since the epoch; replay from a time is counted on it.
    """

    num_shards = 1

    def __init__(
        self,
        broker: Broker,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._clock = clock
        self._wall_clock = wall_clock
        self._told = DropTold(0)
        self._changed = threading.Condition()
        self._waiting: list[tuple[Batch, Future[bool]]] = []
        self._num_polls = 0
        self._is_closed = False

    def append(self, shard: int, body: bytes) -> Future[bool]:
        """Takes the batch, or holds it until there is room."""
        assert shard == 0
        future: Future[bool] = Future()
        with self._changed:
            self._waiting.append((decode_batch(body), future))
            accepted = self._admit()
        _resolve(accepted)
        return future

    def subscribe(self, group: str, topics: Sequence[str], *, key: str | None, start: Start) -> None:
        """See `Broker.join`."""
        with self._changed:
            self._broker.join(group, topics, key=key, start=start.offset(self._broker, 0), now=self._clock())

    def poll(self, group: str, member: str, *, max_records: int, timeout_s: float) -> list[Received]:
        """Waits on the condition for records, or for a lease to run out.

        Raises:
            UnavailableError: once this is closed.
        """
        end = time.monotonic() + timeout_s
        with self._changed:
            while not self._is_closed and not self._broker.has_left(member):
                now = self._clock()
                self._num_polls += 1
                self._broker.expire(now)
                if spent := self._broker.exhausted(group):
                    self._bury(group, spent, spent_reason(self._broker.max_deliveries))
                leased = self._broker.poll(group, member, self._num_polls, max_records, now)
                remaining = end - time.monotonic()
                if leased or remaining <= 0:
                    return [Received(0, *one) for one in leased]
                self._changed.wait(min(remaining, max(0.0, self._broker.next_expiry - now)))
            if self._is_closed:
                raise UnavailableError("the bus is closed")
        return []

    def ack(self, group: str, spans: Mapping[int, Sequence[range]]) -> None:
        """See `Broker.ack`."""
        with self._changed:
            self._broker.ack(group, spans[0], self._clock())
            accepted = self._admit()
            self._changed.notify_all()  # a lane may be free for another member
        _resolve(accepted)

    def reject(self, group: str, spans: Mapping[int, Sequence[range]], reason: str) -> None:
        """Gives records up for the group, with a letter for each."""
        with self._changed:
            self._bury(group, spans[0], reason)
            accepted = self._admit()
            self._changed.notify_all()
        _resolve(accepted)

    def requeue(self, group: str, spans: Mapping[int, Sequence[range]]) -> int:
        """See `Broker.requeue`."""
        with self._changed:
            dead = self._broker.dead(group, spans[0])
            self._broker.requeue(group, dead)
            self._changed.notify_all()
        return num_in(dead)

    def leave(self, group: str, member: str) -> None:
        """Takes back what the member holds and ends its polls."""
        with self._changed:
            self._broker.leave(group, member)
            self._changed.notify_all()

    def forget(self, group: str) -> None:
        """See `Broker.forget`."""
        with self._changed:
            self._broker.forget(group)
            accepted = self._admit()  # it may have been what kept others waiting
        _resolve(accepted)

    def counts(self, key: str) -> BusCounts:
        """See `Broker.counts`."""
        with self._changed:
            return self._broker.counts(key)

    def read(self, start: Start, topics: Sequence[str], *, key: str | None, max_records: int) -> list[Shelf]:
        """See `Kept.read`."""
        with self._changed:
            records, position = self._broker.kept.read(start.offset(self._broker, 0), topics, key, max_records)
            return [Shelf(records, position, self._broker.next_offset)]

    def stats(self) -> BusStats:
        """See `Broker.stats`."""
        with self._changed:
            return self._broker.stats(self._clock())

    def close(self) -> None:
        """Wakes and ends every poll."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _bury(self, group: str, offsets: Sequence[range], reason: str) -> None:
        held = self._broker.held(group, offsets)
        letters = letters_of(held, group=group, shard=0, reason=reason)
        self._broker.bury(group, [offset for offset, _, _ in held], letters, self._wall_clock())
        self._changed.notify_all()

    def _admit(self) -> list[Future[bool]]:
        """Appends every waiting batch that the broker admits; one may make way for the next."""
        accepted: list[Future[bool]] = []
        held: list[tuple[Batch, Future[bool]]] = []
        for batch, future in sorted(self._waiting, key=lambda waiting: waiting[0].seq):
            admission = self._broker.admit(batch)
            if admission is Admission.ACCEPT:
                for group, spans in self._broker.surplus(batch).items():
                    self._broker.drop(group, spans)
                    self._told.tell(group, num_in(spans))
                self._broker.append(batch, self._wall_clock())
            if admission in (Admission.ACCEPT, Admission.DUPLICATE):
                accepted.append(future)
            else:
                held.append((batch, future))
        self._waiting = held
        if accepted:
            self._changed.notify_all()
        return accepted


def _resolve(futures: Sequence[Future[bool]]) -> None:
    """Outside the lock: the callbacks take the publisher's."""
    for future in futures:
        future.set_result(True)


class MemoryBus(BusClient):
    """Oona without Ray: a Bus for one process.

    Args:
        config: as for the real bus; `num_shards` and `fsync_ms` have no meaning here.
        clock: seconds, monotonic; leases are counted on it.
        wall_clock: seconds since the epoch; replay from a time is counted on it.
    """

    def __init__(
        self,
        config: OonaConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        config = config or OonaConfig()
        transport = MemoryTransport(Broker.of(config), clock=clock, wall_clock=wall_clock)
        super().__init__(transport, config, deadline_s=None)
