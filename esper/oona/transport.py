"""The way from publishers and consumers to the broker's shards: what memory and Ray each implement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from esper.leyline.bus import BusStats
from esper.leyline.summary import BusCounts
from esper.oona.packed import Packed
from esper.oona.start import Start


class Received(NamedTuple):
    """Records of one lane as they arrive at a member: of consecutive offsets, the same delivery of each."""

    shard: int
    offset: int
    attempt: int
    records: Packed

    @property
    def span(self) -> range:
        """Their offsets."""
        return range(self.offset, self.offset + len(self.records))

    def part(self, start: int, stop: int) -> Received:
        """Some of them, counted from 0."""
        return self._replace(offset=self.offset + start, records=self.records.part(start, stop))


class Shelf(NamedTuple):
    """What `read` found in one shard: (offset, bytes) of records, where to go on, and where the shard ended."""

    records: list[tuple[int, bytes]]
    position: int
    end: int


class Transport(Protocol):
    """All shards of one bus. Every call may raise `UnavailableError` when its deadline passes."""

    @property
    def num_shards(self) -> int: ...

    def append(self, shard: int, body: bytes) -> Future[bool]:
        """Sends an encoded batch without waiting. True: it is safe. False: there is no room yet, send it again."""
        ...

    def subscribe(self, group: str, topics: Sequence[str], *, key: str | None, start: Start) -> None:
        """Makes the group known to every shard."""
        ...

    def poll(self, group: str, member: str, *, max_records: int, timeout_s: float) -> list[Received]:
        """Waits for records; may return more than `max_records` where there are more shards than that."""
        ...

    def ack(self, group: str, spans: Mapping[int, Sequence[range]]) -> None:
        """Acknowledges offsets, by shard; returns once that is safe."""
        ...

    def reject(self, group: str, spans: Mapping[int, Sequence[range]], reason: str) -> None:
        """Gives records up for the group, by shard; returns once their letters are safe."""
        ...

    def requeue(self, group: str, spans: Mapping[int, Sequence[range]]) -> int:
        """Gives a group again what it gave up, by shard; returns how many of it were there, once that is safe."""
        ...

    def leave(self, group: str, member: str) -> None:
        """Gives back what the member holds."""
        ...

    def forget(self, group: str) -> None:
        """Ends a group; one that is not there is no error."""
        ...

    def counts(self, key: str) -> BusCounts:
        """Sums over the shards."""
        ...

    def read(self, start: Start, topics: Sequence[str], *, key: str | None, max_records: int) -> list[Shelf]:
        """Looks into every shard without a group; at most `max_records` of each."""
        ...

    def stats(self) -> BusStats:
        """Of all shards together."""
        ...

    def close(self) -> None:
        """Lets go."""
        ...
