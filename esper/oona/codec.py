"""Messages as packed records, and back: a whole batch by one call of pydantic, in both directions."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, count, repeat
from operator import add

from pydantic import ValidationError

from esper.leyline.messages import OonaMessage, decode, encode
from esper.leyline.ports import Delivery
from esper.oona.packed import END, SEPARATOR, Packed
from esper.oona.transport import Received

BEGIN = b'{"event_id":"'
"""How the JSON of every message begins: `event_id` is its first field, and a string."""
_BETWEEN = b"}," + BEGIN

_to_json = OonaMessage.__pydantic_serializer__.to_json
_delivery = partial(tuple.__new__, Delivery)


def pack(messages: Sequence[OonaMessage]) -> Packed:
    """Encodes messages as one JSON list, and finds where each ends; there is at least one.

    A quote within a string is escaped, so what looks like a border is one, or lies between objects of a payload. Of a
    list that has more of them than borders each message is encoded by itself.
    """
    body = encode(messages)
    inner = body.split(_BETWEEN)
    if len(inner) != len(messages):
        return Packed.of([_to_json(message) for message in messages])
    ends = array(END, map(add, accumulate(map(len, inner)), count(1, len(_BETWEEN))))
    ends[-1] = len(body) - 1
    return Packed(body, 1, ends)


def decode_apart(received: Sequence[Received]) -> tuple[list[Delivery], list[tuple[int, int]]]:
    """Decodes all at once; returns (shard, offset) of what is no message apart."""
    if not received:
        return [], []
    try:
        messages = _decoded(received)
    except ValidationError:
        messages = []
    refused: list[tuple[int, int]] = []
    if len(messages) != sum([len(one.records) for one in received]):  # the bytes of one may also be none, or several
        singly = [one.part(at, at + 1) for one in received for at in range(len(one.records))]
        refused = [(one.shard, one.offset) for one in singly if not _is_message(one.records[0])]
        received = [one for one in singly if _is_message(one.records[0])]
        messages = _decoded(received)
    deliveries: list[Delivery] = []
    rest = iter(messages)
    for shard, offset, attempt, records in received:
        offsets = range(offset, offset + len(records))
        deliveries += map(
            _delivery, zip(repeat(shard), offsets, rest, repeat(attempt), strict=False)
        )  # as many as offsets
    return deliveries, refused


def _decoded(received: Sequence[Received]) -> list[OonaMessage]:
    return decode(b"[%b]" % SEPARATOR.join([one.records.view for one in received]))


def _is_message(data: bytes) -> bool:
    try:
        OonaMessage.model_validate_json(data)
    except ValidationError:
        return False
    return True
