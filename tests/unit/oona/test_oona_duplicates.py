"""Messages that are known again by (shard, offset)."""

from bus_conformance import step

from esper.leyline import Delivery
from esper.oona import Duplicates

MESSAGE = step(0)


def delivery(shard, offset, attempt=1):
    return Delivery(shard=shard, offset=offset, attempt=attempt, message=MESSAGE)


def test_what_was_handled_is_dropped_whatever_its_attempt():
    duplicates = Duplicates()
    first = [delivery(0, 0), delivery(1, 0)]
    assert duplicates.fresh(first) == first
    assert duplicates.fresh(first) == first  # seen is not handled: the work may have failed
    duplicates.handled(first[:1])
    assert duplicates.fresh([delivery(0, 0, attempt=2), delivery(1, 0, attempt=2)]) == [delivery(1, 0, attempt=2)]
    assert duplicates.num_dropped == 1
    assert (0, 0) in duplicates
    assert (1, 0) not in duplicates


def test_one_answer_with_a_message_twice_gives_it_once():
    duplicates = Duplicates()
    assert duplicates.fresh([delivery(0, 5), delivery(0, 5, attempt=2)]) == [delivery(0, 5)]


def test_the_longest_known_is_forgotten_first():
    duplicates = Duplicates(remembered=2, positions=[(0, 1), (0, 2), (0, 3)])
    assert duplicates.positions == [(0, 2), (0, 3)]
    assert duplicates.add(0, 1)
    assert not duplicates.add(0, 3)
