"""How records travel to the broker and lie in its log, and how they come from there: packed, so that a batch is encoded
once and decoded once, however many records it has.

A batch's body is a 4-byte header length (little endian), a JSON header, where each record ends (`packed.END`), and the
records. The header lists runs of records with the same topic and key. What a record's bytes mean is not known here.
"""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from esper.leyline.errors import TamperedError
from esper.oona.packed import Packed, joined, read_ends

_LENGTH = struct.Struct("<I")
_EACH_END = 4


class Record(NamedTuple):
    """One message to the broker: where it goes, and bytes that only producers and consumers understand."""

    topic: str
    key: str
    data: bytes


class Block(NamedTuple):
    """Records that follow each other with the same topic and key."""

    topic: str
    key: str
    records: Packed

    def part(self, start: int, stop: int) -> Block:
        """Some of them, counted from 0."""
        return self._replace(records=self.records.part(start, stop))


class Batch:
    """Records of one producer for one shard.

    Args:
        producer: unique for each publisher's life.
        seq: numbers the producer's batches for this shard from 0; a retry carries the same number.
        base: every batch below it was acknowledged, so the broker need not wait for one.
        records: what it carries.
        blocks: the same, where it is packed already.
    """

    def __init__(
        self, producer: str, seq: int, base: int, records: Sequence[Record] = (), *, blocks: Sequence[Block] = ()
    ) -> None:
        self.producer = producer
        self.seq = seq
        self.base = base
        self.blocks = (*blocks, *blocks_of(records))

    @cached_property
    def runs(self) -> list[tuple[str, str, int]]:
        """(topic, key, count) of its blocks."""
        return [(topic, key, len(records)) for topic, key, records in self.blocks]

    @property
    def records(self) -> tuple[Record, ...]:
        """Each record; for who wants them one by one."""
        return tuple(Record(topic, key, data) for topic, key, records in self.blocks for data in records)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Batch):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, int, int, tuple[Record, ...]]:
        return self.producer, self.seq, self.base, self.records


class Leased(NamedTuple):
    """Records of one lane as a member gets them: of consecutive offsets, delivered to the group equally often.

    Attributes:
        offset: of the first.
        attempt: which delivery this is.
        records: their bytes.
    """

    offset: int
    attempt: int
    records: Packed


def shard_of(topic: str, key: str, num_shards: int) -> int:
    """Returns the shard that holds (topic, key); the same in every process."""
    return zlib.crc32(f"{topic}\0{key}".encode()) % num_shards


def blocks_of(records: Sequence[Record]) -> list[Block]:
    """Packs records."""
    return [
        Block(topic, key, Packed.of([record.data for record in run]))
        for (topic, key), run in itertools.groupby(records, lambda record: (record.topic, record.key))
    ]


def merged_blocks(blocks: Sequence[Block]) -> list[Block]:
    """One block for each topic and key. Within one their records keep their order, which is all that the bus promises:
    so messages whose keys alternate do not become blocks of one.
    """
    lanes: dict[tuple[str, str], list[Packed]] = {}
    for topic, key, records in blocks:
        lanes.setdefault((topic, key), []).append(records)
    return [Block(topic, key, joined(parts)) for (topic, key), parts in lanes.items()]


def encode_batch(batch: Batch) -> bytes:
    """Encodes a batch as one body."""
    header = (batch.producer, batch.seq, batch.base, batch.runs)
    return _encode(header, [block.records for block in batch.blocks])


def decode_batch(body: bytes) -> Batch:
    """Inverse of `encode_batch`; the batch shares the bytes of the body.

    Raises:
        TamperedError: if the body is not whole.
    """
    try:
        (producer, seq, base, runs), all_of_it = _decode(body, lambda header: sum(count for *_, count in header[3]))
        blocks: list[Block] = []
        first = 0
        for topic, key, count in runs:
            blocks.append(Block(topic, key, all_of_it.part(first, first + count)))
            first += count
    except (struct.error, ValueError, TypeError, IndexError) as error:
        raise TamperedError(f"a batch of {len(body)} bytes cannot be read: {error}") from error
    return Batch(producer, seq, base, blocks=blocks)


def decode_unpacked(body: bytes) -> Batch:
    """A body as it was until the third form of the log: the header has the length of each record, nothing between them.

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
    return Batch(producer, seq, base, records)


def encode_leased(leased: Sequence[Leased]) -> bytes:
    """What a member gets as one body; nothing is no byte."""
    if not leased:
        return b""
    header = [(offset, attempt, len(records)) for offset, attempt, records in leased]
    return _encode(header, [one.records for one in leased])


def decode_leased(body: bytes) -> list[Leased]:
    """Inverse of `encode_leased`. What follows each other in the list does so in the bytes, too."""
    if not body:
        return []
    header, all_of_it = _decode(body, lambda header: sum(count for *_, count in header))
    leased: list[Leased] = []
    first = 0
    for offset, attempt, count in header:
        leased.append(Leased(offset, attempt, all_of_it.part(first, first + count)))
        first += count
    return leased


def _encode(header: object, parts: Sequence[Packed]) -> bytes:
    records = joined(parts) if len(parts) else Packed(b"", 0, ())
    ends = records.ends if records.begin == 0 else [end - records.begin for end in records.ends]
    head = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((_LENGTH.pack(len(head)), head, Packed(b"", 0, ends).end_bytes, records.view))


def _decode(body: bytes, count_in: Callable[[Any], int]) -> tuple[Any, Packed]:
    (length,) = _LENGTH.unpack_from(body)
    at = _LENGTH.size + length
    header = json.loads(body[_LENGTH.size : at])
    number = count_in(header)
    ends = read_ends(body, at, number)
    records = Packed(memoryview(body)[at + _EACH_END * number :], 0, ends)
    if len(records.data) != (ends[-1] if number else 0):
        raise ValueError(f"its records should have {ends[-1] if number else 0} bytes")
    return header, records
