"""The ways of encoding that are measured are ways of encoding."""

from __future__ import annotations

import pytest

from esper.oona.wire import decode_batch
from jobs.bench.codec import BATCH, WAYS, health, main, steps


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("messages", [steps(), health()], ids=["steps", "health"])
def test_every_way_gives_back_the_same_messages(way, messages):
    assert way.decode(way.encode(messages)) == messages


def test_the_bus_s_own_way_keeps_each_message_apart():
    records = decode_batch(WAYS[0].encode(steps())).records
    assert len(records) == BATCH


def test_every_way_has_a_row_for_each_kind_of_signal():
    told = []
    result = main(["--rounds", "1"], told.append)
    assert [(row["signal"], row["way"]) for row in result.rows] == [
        (kind, way.name) for kind in ("steps", "health") for way in WAYS
    ]
    assert all(row["encode, us"] >= 0 and row["decode, us"] >= 0 and row["bytes"] > 100 for row in result.rows)
    assert len(told) == 2
