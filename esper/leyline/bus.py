"""What the bus tells of itself: dead letters, and its figures by topic and by group."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

from pydantic import Field

from esper.leyline.contract import API_VERSION, Contract, Finite

Count = Annotated[int, Field(ge=0)]


class DeadLetter(Contract):
    """A message that one group could not take, as it lay with the broker.

    Attributes:
        topic, key: of the message.
        group: which gave it up; other groups may have taken it.
        shard, offset: where it lay.
        attempts: deliveries to the group.
        data: the message's bytes; `raw` undoes `encoding`.
    """

    api_version: int = API_VERSION
    topic: str
    key: str
    group: str
    shard: Count
    offset: Count
    attempts: Count
    reason: str
    data: str
    encoding: Literal["utf-8", "base64"] = "utf-8"

    @property
    def raw(self) -> bytes:
        """The message's bytes."""
        return base64.b64decode(self.data) if self.encoding == "base64" else self.data.encode()


class TopicStats(Contract):
    """One topic.

    Attributes:
        published: messages since the log began.
        kept: messages that can still be read.
        kept_bytes: their size.
        oldest_at, newest_at: when the broker took the first and last kept one, seconds since the epoch; None without.
    """

    topic: str
    published: Count = 0
    kept: Count = 0
    kept_bytes: Count = 0
    oldest_at: Finite | None = None
    newest_at: Finite | None = None


class GroupStats(Contract):
    """One consumer group.

    Attributes:
        key: what it is limited to; None is every key.
        members: that hold messages now.
        pending: messages not acknowledged: its lag, those with members included.
        leased: messages that are with members.
        delivered: deliveries, the repeated ones too; `redelivered` are those.
        acknowledged: messages that were; each ends as one of these, dropped or dead.
        dropped: messages that gave way to newer ones.
        dead: messages that went to the dead letters.
        idle_s: seconds since it last asked for or acknowledged anything.
    """

    group: str
    topics: tuple[str, ...]
    key: str | None = None
    members: Count = 0
    pending: Count = 0
    leased: Count = 0
    delivered: Count = 0
    redelivered: Count = 0
    acknowledged: Count = 0
    dropped: Count = 0
    dead: Count = 0
    idle_s: Annotated[Finite, Field(ge=0)] = 0.0


class BusStats(Contract):
    """The bus as a whole; topics and groups by name."""

    num_shards: Annotated[int, Field(ge=1)]
    topics: tuple[TopicStats, ...] = ()
    groups: tuple[GroupStats, ...] = ()
