"""Closing a bus whose broker is only partly there."""

import pytest

from esper.config import OonaConfig
from esper.leyline import Topic, UnavailableError
from esper.oona import BusClient


class Failing:
    """A transport that is told who leaves, and then does not answer."""

    num_shards = 1

    def __init__(self):
        self.left = []
        self.is_closed = False

    def subscribe(self, group, topics, *, key, start):
        pass

    def leave(self, group, member):
        self.left.append(group)
        raise UnavailableError(f"{group} got no answer")

    def close(self):
        self.is_closed = True


def test_one_group_that_cannot_be_left_does_not_keep_the_others():
    transport = Failing()
    bus = BusClient(transport, OonaConfig())
    for group in ("one", "two"):
        bus.subscribe([Topic.STEPS], group=group)
    with pytest.raises(UnavailableError, match="got no answer"):
        bus.close()
    assert sorted(transport.left) == ["one", "two"]
    assert transport.is_closed
