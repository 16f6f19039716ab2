"""The bus as a program uses it: one publisher and any number of consumers over a transport."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from esper.config import OonaConfig
from esper.leyline.bus import BusStats, DeadLetter
from esper.leyline.contract import new_id
from esper.leyline.errors import UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.ports import ReadPage, Subscription
from esper.leyline.summary import BusCounts
from esper.oona.codec import decode_apart
from esper.oona.consumer import Consumer
from esper.oona.groups import LISTENER
from esper.oona.packed import Packed
from esper.oona.publisher import Publisher
from esper.oona.spans import spans_of
from esper.oona.start import Start
from esper.oona.transport import Received, Shelf, Transport


class BusClient:
    """Implements `esper.leyline.ports.Bus` over a transport.

    Args:
        transport: the way to the shards; closed with this.
        config: batch size and linger.
        deadline_s: see `Publisher`.
    """

    def __init__(self, transport: Transport, config: OonaConfig, *, deadline_s: float | None = 30.0) -> None:
        self._transport = transport
        self._publisher = Publisher(
            transport, batch=config.batch, linger_s=config.linger_ms / 1e3, deadline_s=deadline_s
        )
        self._consumers: list[Consumer] = []
        self._is_closed = False

    def publish(self, messages: Sequence[OonaMessage]) -> None:
        """See `Bus.publish`."""
        self._publisher.publish(messages)

    def flush(self, *, timeout_s: float = 10.0) -> None:
        """See `Bus.flush`."""
        self._publisher.flush(timeout_s=timeout_s)

    def subscribe(
        self,
        topics: Sequence[Topic],
        *,
        group: str,
        key: str | None = None,
        from_start: bool = False,
        from_offsets: Mapping[int, int] | None = None,
        from_time: float | None = None,
    ) -> Subscription:
        """See `Bus.subscribe`. Records of one (topic, key) are out with one member of the group at a time.

        Raises:
            ConflictError: if the group reads other topics or another key.
            UnavailableError: if this is closed, or the broker does not answer.
            ValueError: if more than one place to begin is given.
        """
        self._check()
        start = Start(from_start, from_offsets, from_time)
        self._transport.subscribe(group, names_of(topics), key=key, start=start)
        consumer = Consumer(self._transport, group)
        self._consumers.append(consumer)
        return consumer

    def listen(
        self, topics: Sequence[Topic], *, key: str | None = None, from_start: bool = False, name: str = ""
    ) -> Subscription:
        """See `Bus.listen`."""
        self._check()
        group = f"{LISTENER}{name}-{new_id()}" if name else f"{LISTENER}{new_id()}"
        self._transport.subscribe(group, names_of(topics), key=key, start=Start(from_start=from_start))
        consumer = Consumer(self._transport, group, is_alone=True)
        self._consumers.append(consumer)
        return consumer

    def read(
        self,
        topics: Sequence[Topic] = (),
        *,
        key: str | None = None,
        positions: Mapping[int, int] | None = None,
        from_time: float | None = None,
        max_messages: int = 256,
    ) -> ReadPage:
        """See `Bus.read`.

        Raises:
            ValueError: if both `positions` and `from_time` are given.
        """
        start = Start.of_read(positions, from_time)
        return page_of(self._transport.read(start, names_of(topics), key=key, max_records=max_messages))

    def requeue(self, letters: Sequence[DeadLetter]) -> int:
        """See `Bus.requeue`."""
        places: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for letter in letters:
            places[letter.group][letter.shard].append(letter.offset)
        return sum(
            self._transport.requeue(group, {shard: spans_of(offsets) for shard, offsets in shards.items()})
            for group, shards in places.items()
        )

    def stats(self) -> BusStats:
        """See `Bus.stats`."""
        return self._transport.stats()

    def counts(self, key: str) -> BusCounts:
        """Messages with this key, as the broker knows them; `delivered` counts every delivery to every group."""
        return self._transport.counts(key)

    def close(self) -> None:
        """Flushes, leaves every group joined through this bus, and lets go; one that fails does not keep the others.

        Raises:
            UnavailableError: if the broker does not answer.
        """
        self._is_closed = True
        with ExitStack() as last_first:
            last_first.callback(self._transport.close)
            for consumer in self._consumers:
                last_first.callback(consumer.close)
            last_first.callback(self._publisher.close)

    def _check(self) -> None:
        if self._is_closed:  # else whoever joins again would find nothing, again and again without a pause
            raise UnavailableError("the bus is closed")


def names_of(topics: Sequence[Topic]) -> list[str]:
    """Topics by name."""
    return [Topic(topic).value for topic in topics]


def page_of(shelves: Sequence[Shelf]) -> ReadPage:
    """What was read of each shard, decoded."""
    received = [
        Received(shard, at, 1, Packed.of([data])) for shard, shelf in enumerate(shelves) for at, data in shelf.records
    ]
    deliveries, refused = decode_apart(received)
    return ReadPage(
        deliveries=tuple(deliveries),
        undecodable=tuple(refused),
        positions={shard: shelf.position for shard, shelf in enumerate(shelves)},
        is_end=all(shelf.position >= shelf.end for shelf in shelves),
    )
