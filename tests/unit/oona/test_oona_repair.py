"""Repair: whatever frame is damaged, the log says so, and without it nothing else is lost."""

import pytest

from esper.leyline.errors import FencedError, StorageError, TamperedError
from esper.leyline.messages import Topic
from esper.oona import Batch, Broker, Journal, Record, SegmentLog, Start, encode_batch
from esper.oona.frames import frames_in
from esper.oona.journal import Kind
from esper.oona.repair import repair

LIMITS = {"lease_s": 10.0, "backlog": 12, "drop_oldest": ("d",)}
JOINS = {"g": ["t"], "drops": ["d"], "letters": [Topic.DEAD_LETTERS]}


def opened(directory):
    return Journal.open(directory, Broker(**LIMITS), now=0.0)


def write(directory):
    """Something of every kind, over several segments; returns the records by offset, and what `g` has before it."""
    log = SegmentLog(directory, segment_bytes=1500)
    journal = Journal(log, Broker(**LIMITS), now=0.0)
    records, number = {}, 0

    def append(topic, *keys):
        nonlocal number
        batch = Batch(
            "p", number, 0, tuple(Record(topic, key, f"{number}-{i}".encode() * 20) for i, key in enumerate(keys))
        )
        journal.append(batch, encode_batch(batch), at=float(number))
        number += 1

    for name, topics in JOINS.items():
        journal.join(name, topics, key=None, start=Start(), now=0.0)
    journal.join("gone", ["t"], key=None, start=Start(), now=0.0)
    for _ in range(4):
        append("t", "a", "b")
        append("d", *"abcdef")
        held = [one.offset for one in journal.poll("g", "m", number, 3, 0.0)]
        journal.ack("g", held[:1], 0.0)
        journal.bury("g", held[1:2], "why")
        if number == 4:
            journal.forget("gone")
            journal.leave("g", "m2")
    append("t", "a")
    shelf = journal.read(Start(from_start=True), [], None, 999)
    records = dict(shelf.records)
    pending = {offset for lane in log_group(journal).lanes.values() for offset in (*lane.ready, *lane.leased)}
    journal.close()
    return records, pending, shelf.end


def log_group(journal):
    return journal._broker._groups["g"]


def places(directory):
    """(segment, first byte, frame) of every frame, but for the last of all: that one would be a torn tail."""
    found = []
    for path in sorted(directory.glob("*.log")):
        at = 0
        for frame in frames_in(path.read_bytes()):
            found.append((path.name, at, frame))
            at += frame.size
    return found[:-1]


def of_frame(frame, records):
    """The offsets that only this frame holds."""
    if frame.kind == Kind.PLACED_BATCH:
        return {at for at, data in records.items() if data in frame.body}
    if frame.kind == Kind.BURY:
        return {at for at, data in records.items() if data[:1] == b"{"}
    return set()


def test_without_the_one_damaged_frame_nothing_else_is_lost(tmp_path):
    records, pending, end = write(tmp_path / "whole")
    frames = places(tmp_path / "whole")
    assert {frame.kind for *_, frame in frames} >= {
        Kind.SNAPSHOT, Kind.PLACED_BATCH, Kind.JOIN, Kind.LEASE, Kind.ACK, Kind.LEAVE, Kind.FORGET, Kind.BURY, Kind.DROP
    }  # fmt: skip
    assert len({name for name, *_ in frames}) > 2
    for number, (name, at, frame) in enumerate(frames):
        directory = tmp_path / str(number)
        directory.mkdir()
        for path in (tmp_path / "whole").iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        data = bytearray((directory / name).read_bytes())
        data[at + frame.size // 2] ^= 1
        (directory / name).write_bytes(data)

        with pytest.raises(StorageError, match=rf"{name} is damaged at byte {at} \(.*esper bus repair"):
            opened(directory)
        (cut,) = repair(directory)
        assert (cut.path.name, cut.at, cut.num_bytes) == (name, at, frame.size)
        assert cut.original.read_bytes() == data
        assert repair(directory) == []
        for _ in range(2):  # again and again
            journal = opened(directory)
            kept = dict(journal.read(Start(from_start=True), [], None, 999).records)
            assert kept.items() <= records.items(), frame
            assert set(records) - set(kept) <= of_frame(frame, records), frame
            journal.close()
        journal = opened(directory)
        for group, topics in JOINS.items():  # as its members do when they start again
            journal.join(group, topics, key=None, start=Start(), now=0.0)
        journal.leave("g", "m")
        came = {one.offset for one in journal.poll("g", "new", 0, 999, 0.0)}
        assert came >= pending & set(kept), frame
        journal.append(one := Batch("q", 0, 0, (Record("t", "a", b"x"),)), encode_batch(one))
        assert journal.read(Start(from_start=True), ["t"], None, 999).records[-1] == (end, b"x")
        journal.close()


def test_a_log_that_is_written_is_not_repaired(tmp_path):
    journal = opened(tmp_path / "log")
    with pytest.raises(FencedError):
        repair(tmp_path / "log")
    journal.close()
    with pytest.raises(StorageError, match="cannot use"):
        repair(tmp_path / "none")


def test_a_segment_that_is_damaged_all_through_is_set_aside(tmp_path):
    records, _, _ = write(tmp_path)
    path = sorted(tmp_path.glob("*.log"))[1]
    path.write_bytes(bytes(len(path.read_bytes())))
    (cut,) = repair(tmp_path)
    assert (cut.at, cut.num_bytes) == (0, cut.original.stat().st_size)
    journal = opened(tmp_path)
    kept = dict(journal.read(Start(from_start=True), [], None, 999).records)
    assert kept.items() < records.items()
    journal.close()


def test_what_one_repair_set_aside_stays_at_the_next(tmp_path):
    write(tmp_path)
    path = sorted(tmp_path.glob("*.log"))[1]
    originals = []
    for _ in range(2):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        (cut,) = repair(tmp_path)
        originals.append((cut.original, bytes(data)))
    assert len({original for original, _ in originals}) == 2
    assert all(original.read_bytes() == data for original, data in originals)


def test_a_log_that_tells_no_offsets_is_not_guessed_at(tmp_path):
    log = SegmentLog(tmp_path)
    log.roll(0, Kind.SNAPSHOT, b'{"next_offset":0,"producers":{},"counts":{},"groups":[]}')
    log.write(Kind.GAP, b"{}")
    batch = Batch("p", 0, 0, (Record("t", "a", b"x"),))
    log.write(Kind.BATCH, encode_batch(batch))
    log.close()
    with pytest.raises(TamperedError, match="its offset is not known"):
        opened(tmp_path)
