"""Prioritised replay: what surprised most is looked at more often, and counts less each time (Schaul et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class Replay(Generic[Item]):
    """A store of bounded size, sampled in proportion to priority ** alpha.

    Args:
        capacity: items kept; then the oldest gives way.
        alpha: 0 samples all alike.
        beta: how far importance weights undo the preference; 1 wholly.
        seed: of the draws.
    """

    def __init__(self, capacity: int, *, alpha: float = 0.6, beta: float = 1.0, seed: int = 0) -> None:
        if capacity < 1:
            raise ValueError(f"a replay of {capacity} items keeps nothing")
        self._capacity, self._alpha, self._beta = capacity, alpha, beta
        self._random = np.random.default_rng(seed)
        self._items: list[Item] = []
        self._priorities = np.zeros(capacity)
        self._next = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Item, priority: float | None = None) -> int:
        """Adds an item and returns its place.

        Args:
            item: of any kind.
            priority: at least 0; None: as high as the highest, so that it is looked at once soon.
        """
        highest = self._priorities.max() if self._items else 1.0
        place = self._next
        if place < len(self._items):
            self._items[place] = item
        else:
            self._items.append(item)
        self._priorities[place] = highest or 1.0 if priority is None else _checked(priority)
        self._next = (place + 1) % self._capacity
        return place

    def sample(self, num: int) -> tuple[list[int], list[Item], np.ndarray]:
        """Returns places, items and importance weights (num,), the largest of which is 1.

        Raises:
            ValueError: if it is empty.
        """
        if not self._items:
            raise ValueError("an empty replay has nothing to sample")
        shares = self.shares()
        places = self._random.choice(len(self._items), size=num, p=shares)
        weights = (len(self._items) * shares[places]) ** -self._beta
        return places.tolist(), [self._items[place] for place in places], weights / weights.max()

    def shares(self) -> np.ndarray:
        """The probability of each item, (len,)."""
        scaled = (self._priorities[: len(self._items)] + 1e-6) ** self._alpha
        return scaled / scaled.sum()

    def update(self, places: Sequence[int], priorities: np.ndarray) -> None:
        """Sets priorities: how surprising each item was, at least 0."""
        for place, priority in zip(places, priorities.tolist(), strict=True):
            self._priorities[place] = _checked(priority)


def _checked(priority: float) -> float:
    if not (np.isfinite(priority) and priority >= 0.0):
        raise ValueError(f"{priority} is no priority")
    return float(priority)
