"""The way from publishers and consumers to the broker's shards: what memory and Ray each implement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from esper.leyline.summary import BusCounts


class Received(NamedTuple):
    """A record as it arrives at a member."""

    shard: int
    offset: int
    attempt: int
    data: bytes


class Transport(Protocol):
    """All shards of one bus. Every call may raise `UnavailableError` when its deadline passes."""

    @property
    def num_shards(self) -> int: ...

    def append(self, shard: int, body: bytes) -> Future[bool]:
        """Sends an encoded batch without waiting. True: it is safe. False: there is no room yet, send it again."""
        ...

    def subscribe(self, group: str, topics: Sequence[str], *, key: str | None, from_start: bool) -> None:
        """Makes the group known to every shard."""
        ...

    def poll(self, group: str, member: str, *, max_records: int, timeout_s: float) -> list[Received]:
        """Waits for records; may return more than `max_records` where there are more shards than that."""
        ...

    def ack(self, group: str, offsets: Mapping[int, Sequence[int]]) -> None:
        """Acknowledges offsets, by shard; returns once that is safe."""
        ...

    def leave(self, group: str, member: str) -> None:
        """Gives back what the member holds."""
        ...

    def counts(self, key: str) -> BusCounts:
        """Sums over the shards."""
        ...

    def close(self) -> None:
        """Lets go."""
        ...
