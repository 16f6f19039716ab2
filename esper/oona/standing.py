"""A bus that does not run, as its logs tell it: to be looked at, and left as it is. Needs no Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from esper.leyline.bus import BusStats
from esper.leyline.errors import NotFoundError
from esper.leyline.messages import Topic
from esper.leyline.ports import ReadPage
from esper.oona.broker import Broker
from esper.oona.client import names_of, page_of
from esper.oona.journal import Journal
from esper.oona.start import Start
from esper.oona.stats import merged


class StandingBus:
    """The shards below `directory`. While this is open no platform can start on them.

    Args:
        directory: see `esper.oona.log.directory_of`.

    Raises:
        NotFoundError: if there is no log of a bus.
        FencedError: if the bus runs.
        StorageError: if a log cannot be read or is damaged.
    """

    def __init__(self, directory: Path) -> None:
        logs = sorted(directory.glob("shard-*-of-*"), key=lambda path: int(path.name.split("-")[1]))
        if not logs:
            raise NotFoundError(f"{directory} holds no log of a bus", remedy="ask on the node where the platform ran")
        self._now = time.monotonic()
        with ExitStack() as stack:
            self._journals = [
                stack.enter_context(Journal.standing(path, Broker(), now=self._now, at=time.time(), shard=shard))
                for shard, path in enumerate(logs)
            ]
            self._open = stack.pop_all()

    def read(
        self,
        topics: Sequence[Topic] = (),
        *,
        key: str | None = None,
        positions: Mapping[int, int] | None = None,
        from_time: float | None = None,
        max_messages: int = 256,
    ) -> ReadPage:
        """See `Bus.read`."""
        start, names = Start.of_read(positions, from_time), names_of(topics)
        return page_of([journal.read(start, names, key, max_messages) for journal in self._journals])

    def stats(self) -> BusStats:
        """See `Bus.stats`."""
        return merged([journal.stats(self._now) for journal in self._journals])

    def close(self) -> None:
        """Lets the logs go."""
        self._open.close()
