"""Prioritised replay, by counting."""

from __future__ import annotations

import numpy as np
import pytest

from esper.simic.replay import Replay


def test_items_come_in_proportion_to_their_priority():
    replay = Replay(10, alpha=1.0)
    for item, priority in (("rare", 1.0), ("common", 3.0)):
        replay.add(item, priority)
    _, items, _ = replay.sample(8000)
    assert items.count("common") / len(items) == pytest.approx(0.75, abs=0.02)


def test_weights_undo_the_preference():
    """The weighted mean of any figure is that over all items alike."""
    replay = Replay(4, alpha=1.0, beta=1.0, seed=1)
    values = {0: 1.0, 1: 5.0, 2: 9.0}
    for item, priority in ((0, 0.2), (1, 1.0), (2, 3.0)):
        replay.add(item, priority)
    _, items, weights = replay.sample(20_000)
    figures = np.array([values[item] for item in items])
    assert (figures * weights).sum() / weights.sum() == pytest.approx(5.0, abs=0.1)
    assert weights.max() == 1.0


def test_the_oldest_gives_way_and_new_ones_come_first():
    replay = Replay(3, alpha=1.0)
    for item in range(5):
        replay.add(item)
    assert len(replay) == 3
    assert set(replay.sample(200)[1]) == {2, 3, 4}
    replay.update(replay.sample(3)[0], np.zeros(3))
    replay.update([0, 1, 2], np.array([0.0, 5.0, 0.0]))
    place = replay.add("new")
    assert replay.shares()[place] == replay.shares().max()


def test_what_is_no_priority_is_refused():
    replay = Replay(2)
    with pytest.raises(ValueError, match="empty"):
        replay.sample(1)
    with pytest.raises(ValueError, match="no priority"):
        replay.add("item", float("nan"))
    with pytest.raises(ValueError, match="no priority"):
        replay.update([replay.add("item")], np.array([-1.0]))
