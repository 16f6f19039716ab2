"""What the bus's suites share."""

import itertools
import json
import struct


def each(leased):
    """(offset, attempt, bytes) of each record."""
    return [(one.offset + at, one.attempt, data) for one in leased for at, data in enumerate(one.records)]


def offsets(leased):
    return [offset for offset, _, _ in each(leased)]


def unpacked(batch):
    """A batch's body as it was until the third form of the log."""
    runs = [
        (topic, key, [len(record.data) for record in run])
        for (topic, key), run in itertools.groupby(batch.records, lambda record: (record.topic, record.key))
    ]
    header = json.dumps((batch.producer, batch.seq, batch.base, runs), separators=(",", ":")).encode()
    return b"".join((struct.pack("<I", len(header)), header, *(record.data for record in batch.records)))
