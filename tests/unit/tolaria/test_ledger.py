import json

import pytest

from esper.leyline import Flops, Ledger, Seconds
from esper.tolaria.ledger import FLOP_PURPOSES, SECOND_PURPOSES, LedgerBook


class Clock:
    """A clock that moves only when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_snapshot_sums_by_purpose_and_in_total():
    book = LedgerBook()
    book.add("host", flops=10, seconds=1.0)
    book.add("host", flops=5)
    book.add("shadow", flops=3, seconds=0.5)
    book.add("checkpoint", seconds=0.25)
    assert book.snapshot() == Ledger(
        flops=Flops(host=15, shadow=3, total=18),
        seconds=Seconds(host=1.0, shadow=0.5, checkpoint=0.25, total=1.75),
    )


def test_flops_stay_exact_beyond_float_precision():
    book = LedgerBook()
    book.add("host", flops=2**60)
    book.add("host", flops=1)
    assert book.snapshot().flops.total == 2**60 + 1


def test_every_purpose_of_the_contract_can_be_booked():
    book = LedgerBook()
    for purpose in SECOND_PURPOSES:
        book.add(purpose, flops=1 if purpose in FLOP_PURPOSES else 0, seconds=1.0)
    ledger = book.snapshot()
    assert ledger.flops.total == len(FLOP_PURPOSES) == len(Flops.model_fields) - 1
    assert ledger.seconds.total == len(SECOND_PURPOSES) == len(Seconds.model_fields) - 1


@pytest.mark.parametrize(
    ("purpose", "cost", "words"),
    [
        ("hots", {"seconds": 1.0}, "unknown purpose 'hots'"),
        ("total", {"seconds": 1.0}, "unknown purpose"),
        ("control", {"flops": 1}, "control has no FLOPs"),
        ("host", {"flops": -1}, "not negative"),
        ("host", {"seconds": -0.1}, "not negative"),
        ("host", {"seconds": float("nan")}, "finite"),
    ],
)
def test_a_wrong_cost_is_refused_and_not_booked(purpose, cost, words):
    book = LedgerBook()
    with pytest.raises(ValueError, match=words):
        book.add(purpose, **cost)
    assert book.snapshot() == Ledger()


def test_nested_blocks_count_no_second_twice():
    clock = Clock()
    book = LedgerBook(clock=clock)
    with book.timed("host"):
        clock.now = 1.0
        with book.timed("telemetry"):
            clock.now = 4.0
        clock.now = 6.0
    assert book.snapshot().seconds == Seconds(host=3.0, telemetry=3.0, total=6.0)


def test_a_block_that_raises_is_booked_all_the_same():
    clock = Clock()
    book = LedgerBook(clock=clock)

    def work():
        with book.timed("control"):
            clock.now = 2.0
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert book.snapshot().seconds.control == 2.0


def test_an_unknown_purpose_fails_before_the_block_runs():
    ran = False
    with pytest.raises(ValueError, match="unknown purpose"), LedgerBook().timed("sleep"):
        ran = True
    assert not ran


def test_state_round_trips_through_json():
    book = LedgerBook()
    book.add("shadow", flops=2**60 + 1, seconds=0.1)
    other = LedgerBook()
    other.add("host", flops=7)
    other.load_state_dict(json.loads(json.dumps(book.state_dict())))
    assert other.snapshot() == book.snapshot()


def test_a_state_of_another_form_is_refused():
    state = LedgerBook().state_dict()
    del state["flops"]["shadow"]
    with pytest.raises(ValueError, match="purposes"):
        LedgerBook().load_state_dict(state)


def test_the_flops_of_another_account_move_whole():
    mine, other = LedgerBook(), LedgerBook()
    mine.add("host", flops=10, seconds=1.0)
    other.add("host", flops=7, seconds=2.0)
    other.add("shadow", flops=3)
    mine.book(other.take_flops())
    assert mine.snapshot().flops == Flops(host=17, shadow=3, total=20)
    assert mine.snapshot().seconds.total == 1.0  # a clock that ran at the same time adds none
    assert other.snapshot().flops.total == 0
    mine.book(other.take_flops())
    assert mine.snapshot().flops.total == 20
