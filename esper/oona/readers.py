"""The groups of a shard: by name, and by what they want."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from esper.leyline.errors import NotFoundError
from esper.oona.groups import Group


class Readers:
    """Every group that is known, in the order in which they became so.

    Args:
        max_deliveries: of one record to one group; None is no limit.
    """

    def __init__(self, max_deliveries: int | None = None) -> None:
        self._max_deliveries = max_deliveries
        self._groups: dict[str, Group] = {}
        self._takers: dict[tuple[str, str | None], list[Group]] = {}  # by topic and by what they are limited to

    def __getitem__(self, name: str) -> Group:
        """The group of this name.

        Raises:
            NotFoundError: if there is none.
        """
        group = self._groups.get(name)
        if group is None:
            raise NotFoundError(f"no group {name}; it never joined, or was idle for too long and forgotten")
        return group

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def get(self, name: str) -> Group | None:
        """The group of this name, if there is one."""
        return self._groups.get(name)

    def enter(self, name: str, topics: Sequence[str], key: str | None, now: float) -> Group:
        """Makes a group known, with nothing before it yet.

        Args:
            name: not known yet.
            topics: that it reads.
            key: that it is limited to; None is any.
            now: when it is used.
        """
        group = self._groups[name] = Group(name, frozenset(topics), key, now, self._max_deliveries)
        for topic in group.topics:
            self._takers.setdefault((topic, key), []).append(group)
        return group

    def forget(self, name: str) -> None:
        """Drops a group; one that is not there is passed over."""
        group = self._groups.pop(name, None)
        if group is not None:
            for topic in group.topics:
                takers = self._takers[topic, group.key]
                takers.remove(group)
                if not takers:
                    del self._takers[topic, group.key]

    def clear(self) -> None:
        """Drops all."""
        self._groups, self._takers = {}, {}

    def of(self, topic: str, key: str) -> list[Group]:
        """The groups that want this, found without a look at all the others."""
        anyway, this = self._takers.get((topic, None)), self._takers.get((topic, key))
        return (anyway or []) + (this or []) if this else anyway or []

    def idle(self, now: float, idle_s: float, *, pending: int = 0) -> list[str]:
        """Groups that nobody has joined, polled or acknowledged for so long; see `Broker.idle_groups`."""
        idle = (group for group in self if now - group.seen_at > idle_s)
        return [group.name for group in idle if max(group.pending.values(), default=0) >= pending]
