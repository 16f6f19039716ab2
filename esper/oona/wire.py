"""How records travel to the broker and lie in its log: one body a batch, so that a batch is encoded once.

A body is a 4-byte header length (little endian), a JSON header and the records' bytes end to end. The header lists
runs of records with the same topic and key, with the length of each. What a record's bytes mean is not known here.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from esper.leyline.errors import TamperedError

_LENGTH = struct.Struct("<I")


class Record(NamedTuple):
    """One message to the broker: where it goes, and bytes that only producers and consumers understand."""

    topic: str
    key: str
    data: bytes


@dataclass(frozen=True)
class Batch:
    """Records of one producer for one shard.

    Attributes:
        producer: unique for each publisher's life.
        seq: numbers the producer's batches for this shard from 0; a retry carries the same number.
        base: every batch below it was acknowledged, so the broker need not wait for one.
    """

    producer: str
    seq: int
    base: int
    records: tuple[Record, ...]

    @cached_property
    def runs(self) -> list[tuple[str, str, int]]:
        """See `runs_of`; several ask."""
        return runs_of(self.records)


class Leased(NamedTuple):
    """A record as a member gets it: `attempt` counts its deliveries to the group."""

    offset: int
    attempt: int
    data: bytes


def shard_of(topic: str, key: str, num_shards: int) -> int:
    """Returns the shard that holds (topic, key); the same in every process."""
    return zlib.crc32(f"{topic}\0{key}".encode()) % num_shards


def encode_batch(batch: Batch) -> bytes:
    """Encodes a batch as one body."""
    runs = [
        (topic, key, [len(record.data) for record in run])
        for (topic, key), run in itertools.groupby(batch.records, lambda record: (record.topic, record.key))
    ]
    header = json.dumps((batch.producer, batch.seq, batch.base, runs), separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(header)), header, *(record.data for record in batch.records)))


def decode_batch(body: bytes) -> Batch:
    """Inverse of `encode_batch`.

    Raises:
        TamperedError: if the body is not whole.
    """
    try:
        (length,) = _LENGTH.unpack_from(body)
        end = _LENGTH.size + length
        producer, seq, base, runs = json.loads(body[_LENGTH.size : end])
        records: list[Record] = []
        for topic, key, sizes in runs:
            for size in sizes:
                records.append(Record(topic, key, body[end : end + size]))
                end += size
    except (struct.error, ValueError, TypeError) as error:
        raise TamperedError(f"a batch of {len(body)} bytes cannot be read: {error}") from error
    if end != len(body):
        raise TamperedError(f"a batch of {len(body)} bytes should have {end}")
    batch = Batch(producer, seq, base, tuple(records))
    batch.__dict__["runs"] = [(topic, key, len(sizes)) for topic, key, sizes in runs]  # known already
    return batch


def runs_of(records: Sequence[Record]) -> list[tuple[str, str, int]]:
    """Returns (topic, key, count) of consecutive records that share both."""
    return [
        (topic, key, sum(1 for _ in run))
        for (topic, key), run in itertools.groupby(records, lambda record: (record.topic, record.key))
    ]
