"""Repair: whatever frame is damaged, the log says so, and without it nothing else is lost."""

import errno
import json
import os

import pytest
from oona_support import each, offsets, unpacked

from esper.leyline.errors import FencedError, StorageError, TamperedError
from esper.leyline.messages import Topic
from esper.oona import Batch, Broker, Journal, Record, SegmentLog, Start, decode_batch, encode_batch
from esper.oona.frames import frame_of, frames_in
from esper.oona.kinds import OF_OFFSETS, Kind
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
        held = offsets(journal.poll("g", "m", number, 3, 0.0))
        journal.ack("g", held[:1], 0.0)
        journal.bury("g", held[1:2], "why")
        if number == 4:
            journal.forget("gone")
            journal.leave("g", "m2")
    append("t", "a")
    shelf = journal.read(Start(from_start=True), [], None, 999)
    records = dict(shelf.records)
    runs = [run for lane in log_group(journal).lanes.values() for run in (*lane.ready, *lane.leased)]
    pending = {offset for run in runs for offset in range(run.start, run.stop)}
    journal.close()
    return records, pending, shelf.end


def log_group(journal):
    return journal._broker._readers["g"]


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
    if frame.kind == Kind.PACKED_BATCH:
        return {at for at, data in records.items() if data in frame.body}
    if frame.kind == Kind.BURY:
        return {at for at, data in records.items() if data[:1] == b"{"}
    return set()


def test_without_the_one_damaged_frame_nothing_else_is_lost(tmp_path):
    records, pending, end = write(tmp_path / "whole")
    frames = places(tmp_path / "whole")
    assert {frame.kind for *_, frame in frames} >= {
        Kind.SNAPSHOT, Kind.PACKED_BATCH, Kind.JOIN, Kind.LEASE_SPANS, Kind.ACK_SPANS, Kind.LEAVE, Kind.FORGET,
        Kind.BURY, Kind.DROP_SPANS,
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
        came = set(offsets(journal.poll("g", "new", 0, 999, 0.0)))
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


def as_it_was_before_batches_told_their_offsets(directory):
    for path in directory.glob("*.log"):
        frames = []
        for frame in frames_in(path.read_bytes()):
            kind, body = frame.kind, frame.body
            if kind == Kind.PACKED_BATCH:
                kind, body = Kind.TIMED_BATCH, body[:8] + unpacked(decode_batch(body[16:]))
            elif kind in OF_OFFSETS:
                *values, spans = json.loads(body)
                named = [offset for start, stop in spans for offset in range(start, stop)]
                kind, body = OF_OFFSETS[kind], json.dumps([*values, named]).encode()
            elif kind == Kind.BURY:
                body = json.dumps(json.loads(body)[:4]).encode()
            frames.append(frame_of(kind, body))
        path.write_bytes(b"".join(frames))


def test_without_the_one_damaged_frame_a_log_that_tells_no_offsets_goes_on(tmp_path):
    records, pending, _ = write(tmp_path / "whole")
    as_it_was_before_batches_told_their_offsets(tmp_path / "whole")
    last = max(path.name for path in (tmp_path / "whole").glob("*.log"))
    num_moved = 0
    for number, (name, at, frame) in enumerate(places(tmp_path / "whole")):
        directory = tmp_path / str(number)
        directory.mkdir()
        for path in (tmp_path / "whole").iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        data = bytearray((directory / name).read_bytes())
        data[at + frame.size // 2] ^= 1
        (directory / name).write_bytes(data)
        assert len(repair(directory)) == 1
        journal = opened(directory)
        kept = dict(journal.read(Start(from_start=True), [], None, 999).records)
        gone = {offset for offset, data in records.items() if is_only_in(frame, data)}
        # by what they say, with their offsets wherever anything tells those
        assert sorted(kept.values()) == sorted(data for offset, data in records.items() if offset not in gone), frame
        moved = {offset for offset in kept if records.get(offset) != kept[offset]}
        assert not moved or (name == last and min(moved) >= max(records)), frame
        num_moved += bool(moved)
        for group, topics in JOINS.items():
            journal.join(group, topics, key=None, start=Start(), now=0.0)
        journal.leave("g", "m")
        came = {data for _, _, data in each(journal.poll("g", "new", 0, 999, 0.0))}
        assert came >= {records[offset] for offset in pending - gone}, frame
        journal.close()
    assert num_moved


def is_only_in(frame, data):
    """Whether a record stands in this frame alone; a letter, which is JSON, is escaped there."""
    if frame.kind == Kind.BURY:
        return data[:1] == b"{" and json.dumps(data.decode()).encode()[1:-1] in frame.body
    return frame.kind == Kind.TIMED_BATCH and data in frame.body


def test_what_lies_between_two_losses_in_a_log_that_tells_no_offsets_is_not_guessed_at(tmp_path):
    log = SegmentLog(tmp_path)
    log.roll(0, Kind.SNAPSHOT, b'{"next_offset":0,"producers":{},"counts":{},"groups":[]}')
    batch = Batch("p", 0, 0, (Record("t", "a", b"x"),))
    for _ in range(2):
        log.write(Kind.GAP, b"{}")
        log.write(Kind.BATCH, unpacked(batch))
    log.close()
    with pytest.raises(TamperedError, match="its offset is not known"):
        opened(tmp_path)


@pytest.mark.parametrize("place", ["middle", "tail"])
def test_blocks_that_the_disk_cannot_read_are_cut_out(tmp_path, monkeypatch, place):
    records, _, _ = write(tmp_path)
    paths = sorted(tmp_path.glob("*.log"))
    path, whole = (paths[1], paths[1].read_bytes()) if place == "middle" else (paths[-1], paths[-1].read_bytes())
    first = len(whole) // 2 if place == "middle" else len(whole) - 40
    bad = range(first, first + 40)
    inode, pread, path_read = path.stat().st_ino, os.pread, type(path).read_bytes

    def failing(fd, length, at):
        if os.fstat(fd).st_ino == inode and at < bad.stop and at + length > bad.start:
            raise OSError(errno.EIO, "Input/output error")
        return pread(fd, length, at)

    def read_bytes(self):
        if self.stat().st_ino == inode:
            raise OSError(errno.EIO, "Input/output error")
        return path_read(self)

    monkeypatch.setattr("esper.oona.repair.BLOCK_BYTES", 16)
    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(type(path), "read_bytes", read_bytes)
    with pytest.raises(StorageError, match="cannot read"):
        opened(tmp_path)
    (cut,) = repair(tmp_path)
    assert cut.at <= bad.start
    assert cut.at + cut.num_bytes >= bad.stop
    assert cut.original.stat().st_ino == inode  # as it was, with its blocks
    monkeypatch.setattr(os, "pread", pread)
    assert repair(tmp_path) == []
    journal = opened(tmp_path)
    kept = dict(journal.read(Start(from_start=True), [], None, 999).records)
    lost = {at for at, data in records.items() if at not in kept}
    assert kept.items() <= records.items()
    touched = {at for _, where, frame in frames_of(whole) for at in of_frame(frame, records)
               if where < cut.at + cut.num_bytes and where + frame.size > cut.at}  # fmt: skip
    assert lost <= touched
    journal.close()


def test_what_else_the_disk_says_ends_the_repair(tmp_path, monkeypatch):
    write(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.log*")}

    def refused(*_args):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "pread", refused)
    with pytest.raises(StorageError, match=r"cannot repair .*Permission denied"):
        repair(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.log*")} == before


def frames_of(data):
    """(name, first byte, frame) of whole frames of one segment."""
    at, found = 0, []
    for frame in frames_in(data):
        found.append(("", at, frame))
        at += frame.size
    return found
