"""The figures of several shards as those of one bus."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from esper.leyline.bus import BusStats, GroupStats, TopicStats


def merged(shards: Sequence[BusStats]) -> BusStats:
    """Sums over the shards; a group's idleness is that of its last sign of life anywhere."""
    topics: dict[str, TopicStats] = {}
    groups: dict[str, GroupStats] = {}
    for stats in shards:
        for topic in stats.topics:
            known = topics.get(topic.topic)
            topics[topic.topic] = topic if known is None else _topic(known, topic)
        for group in stats.groups:
            known = groups.get(group.group)
            groups[group.group] = group if known is None else _group(known, group)
    return BusStats(
        num_shards=len(shards),
        topics=tuple(topic for _, topic in sorted(topics.items())),
        groups=tuple(group for _, group in sorted(groups.items())),
    )


def _topic(one: TopicStats, other: TopicStats) -> TopicStats:
    return TopicStats(
        topic=one.topic,
        published=one.published + other.published,
        kept=one.kept + other.kept,
        kept_bytes=one.kept_bytes + other.kept_bytes,
        oldest_at=min(_known(one.oldest_at, other.oldest_at), default=None),
        newest_at=max(_known(one.newest_at, other.newest_at), default=None),
    )


def _group(one: GroupStats, other: GroupStats) -> GroupStats:
    return one.model_copy(
        update={
            # a member that holds messages of two shards is one member; how many are the same is not known here
            "members": max(one.members, other.members),
            "pending": one.pending + other.pending,
            "leased": one.leased + other.leased,
            "delivered": one.delivered + other.delivered,
            "redelivered": one.redelivered + other.redelivered,
            "acknowledged": one.acknowledged + other.acknowledged,
            "dropped": one.dropped + other.dropped,
            "dead": one.dead + other.dead,
            "idle_s": min(one.idle_s, other.idle_s),
        }
    )


def _known(*values: float | None) -> Iterable[float]:
    return [value for value in values if value is not None]
