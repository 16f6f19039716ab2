"""The bus's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esper.config.section import PositiveFloat, PositiveInt, Section
from esper.leyline.messages import Topic


class OonaConfig(Section):
    """The bus."""

    num_shards: PositiveInt = 1
    linger_ms: Annotated[float, Field(ge=0)] = 5.0
    batch: PositiveInt = 256
    backlog: PositiveInt = 100_000
    """Messages of a topic that a group may have before it; then `publish` waits, or old ones give way."""
    drop_oldest: tuple[Topic, ...] = (Topic.SEED_HEALTH, Topic.STEPS)
    """Topics whose oldest messages give way when a group holds `backlog` of them; what was dropped is told."""
    max_deliveries: PositiveInt | None = 16
    """Deliveries to a group after which a message goes to the dead letters; null: it comes again for ever."""
    lease_s: PositiveFloat = 30.0
    archive: tuple[Topic, ...] = (
        Topic.KASMINA_COMMANDS,
        Topic.RUN_STARTED,
        Topic.EPOCH,
        Topic.LIFECYCLE,
        Topic.RUNGS,
        Topic.POLICIES,
        Topic.FIELD_REPORTS,
        Topic.DEAD_LETTERS,
    )
    """Topics that are copied to the Delta table `archive` of the storage: the audit trail; none leaves it unwritten."""
    retain_mb: PositiveFloat = 256.0
    """Of each shard: messages that every group has acknowledged go beyond it, the oldest first; they are in memory."""
    retain_hours: PositiveFloat | None = 168.0
    """Messages that every group has acknowledged go after so long; null: only by size."""
    fsync: Literal["interval", "always", "never"] = "interval"
    """`always`: what is acknowledged is on the disk. `interval`: within `fsync_ms`. `never`: when the system likes; the
    death of the broker loses nothing with any of them, the death of its machine what was not on the disk."""
    fsync_ms: Annotated[float, Field(ge=0)] = 200.0
