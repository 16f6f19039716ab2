"""Spans of offsets, packed records and messages as packed records, against what they stand for."""

import itertools
from collections import deque

import pytest
from bus_conformance import step
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import OonaMessage
from esper.leyline.messages import Topic, decode
from esper.oona import Leased, decode_leased, encode_leased
from esper.oona.acknowledged import MAX_SPANS, Acknowledged
from esper.oona.codec import BEGIN, decode_apart, pack
from esper.oona.packed import Packed, joined
from esper.oona.spans import Run, cut, flat, num_in, overlap, spans_of, without
from esper.oona.transport import Received

OFFSETS = st.lists(st.integers(0, 40), max_size=20)
RECORDS = st.lists(st.binary(max_size=9), min_size=1, max_size=9)


def runs_of(offsets):
    return [Run(span.start, span.stop, 1) for span in spans_of(offsets)]


@given(OFFSETS, OFFSETS)
def test_spans_are_sets_of_offsets(some, others):
    spans = spans_of([*some, *others, range(3, 7)])
    assert flat(spans) == sorted({*some, *others, *range(3, 7)})
    assert all(one.stop < other.start for one, other in itertools.pairwise(spans))
    assert num_in(spans) == len(flat(spans))
    assert flat(without(spans_of(some), spans_of(others))) == sorted(set(some) - set(others))
    both = [range(run.start, run.stop) for run in overlap(runs_of(some), spans_of(others))]
    assert flat(both) == sorted(set(some) & set(others))


@given(OFFSETS, OFFSETS)
def test_what_is_cut_out_of_runs_is_not_in_them_any_more(some, others):
    runs = deque(runs_of(some))
    taken = cut(runs, spans_of(others))
    assert flat(range(run.start, run.stop) for run in taken) == sorted(set(some) & set(others))
    assert flat(range(run.start, run.stop) for run in runs) == sorted(set(some) - set(others))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=20))
def test_what_was_acknowledged_is_known_again(steps):
    acknowledged, known = Acknowledged(), set()
    for start, length in steps:
        span = range(start, start + length)
        assert flat(acknowledged.known(0, span)) == sorted(known & set(span))
        assert flat(acknowledged.fresh(0, span)) == sorted(set(span) - known)
        assert flat(acknowledged.add(0, [span])) == sorted(set(span) - known)
        known |= set(span)
    assert acknowledged.known(1, range(99)) == []


def test_of_what_was_acknowledged_the_lowest_is_forgotten_first():
    acknowledged = Acknowledged()
    spans = [range(2 * number, 2 * number + 1) for number in range(MAX_SPANS + 1)]
    acknowledged.add(0, spans)
    assert acknowledged.known(0, spans[0]) == []
    assert acknowledged.known(0, spans[MAX_SPANS // 2]) == [spans[MAX_SPANS // 2]]
    assert acknowledged.known(0, spans[-1]) == [spans[-1]]


@given(RECORDS, st.data())
def test_packed_records_are_the_records(records, data):
    packed = Packed.of(records)
    assert (list(packed), packed.num_bytes) == (records, sum(map(len, records)))
    start = data.draw(st.integers(0, len(records) - 1))
    stop = data.draw(st.integers(start + 1, len(records)))
    part = packed.part(start, stop)
    assert (list(part), part.num_bytes) == (records[start:stop], sum(map(len, records[start:stop])))
    assert list(part.part(0, len(part))) == records[start:stop]
    assert list(joined([part, packed, part])) == [*records[start:stop], *records, *records[start:stop]]
    leased = [Leased(7, 1, part), Leased(99, 2, packed)]
    back = decode_leased(encode_leased(leased))
    assert [(one.offset, one.attempt, list(one.records)) for one in back] == [
        (one.offset, one.attempt, list(one.records)) for one in leased
    ]
    assert decode_leased(encode_leased([])) == []


TEXTS = st.text(max_size=12) | st.sampled_from(['},{"event_id":"', "é,", '"', "\\"])
PAYLOADS = st.dictionaries(TEXTS | st.just("event_id"), TEXTS, max_size=3)


@given(st.lists(st.dictionaries(TEXTS, TEXTS | st.lists(PAYLOADS, max_size=3), max_size=3), min_size=1, max_size=5))
def test_messages_are_packed_and_decoded_whatever_their_payloads(payloads):
    messages = [
        OonaMessage(sender_id="s", trace_id="t", topic=Topic.STEPS, key="k", payload=payload) for payload in payloads
    ]
    packed = pack(messages)
    assert [decode(b"[%b]" % data)[0] for data in packed] == messages
    deliveries, refused = decode_apart([Received(2, 7, 3, packed)])
    assert refused == []
    assert [each.message for each in deliveries] == messages
    assert [(each.shard, each.offset, each.attempt) for each in deliveries] == [
        (2, 7 + at, 3) for at in range(len(messages))
    ]


def test_a_payload_with_objects_that_begin_like_a_message_moves_no_border():
    """Here the list has more places that look like borders than it has borders."""
    inner = [{"event_id": "a"}, {"event_id": "b"}]
    message = OonaMessage(sender_id="s", trace_id="t", topic=Topic.STEPS, key="k", payload={"x": inner})
    packed = pack([message, message])
    assert len(packed) == 2
    assert bytes(packed.view).count(b"}," + BEGIN) == 3
    assert [decode(b"[%b]" % data) for data in packed] == [[message], [message]]


def test_every_message_begins_with_its_id():
    assert next(iter(OonaMessage.model_fields)) == "event_id"
    assert pack([step(0)])[0].startswith(BEGIN)


@pytest.mark.parametrize("bad", [b"", b"{}", b"nothing"])
def test_what_is_no_message_is_told_apart(bad):
    packed = Packed.of([pack([step(0)])[0], bad, pack([step(1)])[0]])
    deliveries, refused = decode_apart([Received(0, 5, 1, packed)])
    assert [each.offset for each in deliveries] == [5, 7]
    assert refused == [(0, 6)]
