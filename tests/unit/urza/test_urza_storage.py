"""Blobs and the table of events on a directory."""

from __future__ import annotations

import hashlib
import itertools
import os
import time

import pytest
from deltalake import DeltaTable
from urza_samples import Clock

from esper.leyline import FencedError, NotFoundError, StorageError, TamperedError, UnavailableError
from esper.storage import Storage
from esper.urza import events as events_module
from esper.urza.blobs import MemoryBlobs, StoredBlobs
from esper.urza.events import DeltaLog
from esper.urza.records import SCHEMA_VERSION, EpochTaken, Event, EventKind, Reason


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path / "store")


class TestBlobs:
    @pytest.fixture(params=["memory", "stored"])
    def blobs(self, request, storage):
        return MemoryBlobs() if request.param == "memory" else StoredBlobs(storage)

    def test_bytes_come_back_by_their_hash(self, blobs):
        digest = blobs.put(b"kernel")
        assert digest == hashlib.sha256(b"kernel").hexdigest() == blobs.put(memoryview(b"kernel"))
        assert blobs.get(digest) == b"kernel"

    @pytest.mark.parametrize("digest", ["0" * 64, "../../etc/passwd", "A" * 64])
    def test_what_is_not_there_is_not_found(self, blobs, digest):
        with pytest.raises(NotFoundError):
            blobs.get(digest)

    def test_damage_is_noticed_and_mended_by_the_next_put(self, storage, tmp_path):
        blobs = StoredBlobs(storage)
        digest = blobs.put(b"kernel")
        file = tmp_path / "store" / "blobs" / digest[:2] / digest
        file.write_bytes(b"KERNEL")
        with pytest.raises(TamperedError):
            blobs.get(digest)
        blobs.put(b"kernel")
        assert blobs.get(digest) == b"kernel"

    def test_a_store_that_cannot_be_written_says_so(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError):
            StoredBlobs(Storage.at(tmp_path / "file")).put(b"kernel")


def note(log, seq, text="x"):
    return Event(seq, log.epoch, 5.0, EventKind.BLUEPRINT_RETIRED, "some", Reason(reason=text))


class Stall:
    """A `FaultPlan` that does something else at a place, once: what others do while this process stands still."""

    def __init__(self, place, deed):
        self._place, self._deed = place, deed
        self.fired = False

    def at(self, place, step):
        del step
        if place == self._place and not self.fired:
            self.fired = True
            self._deed()


PLACES = ("tidying", "compacted", "checkpointed", "listed", "sealed", "vacuumed")
DEEDS = ("writes and tidies", "tidies and writes")
KEEPS, KEPT = (0.0, 24.0), (0.0, 0.5)
PAIRWISE = ({(0, 0, 0), (1, 1, 1)}, {(0, 1, 1), (1, 0, 0)}, {(1, 0, 1), (0, 1, 0)})
"""Which of the deeds, of what the successor keeps and of what is kept go together at each third place."""
STALLS = [
    pytest.param(place, DEEDS[a], KEEPS[b], KEPT[c], marks=() if (a, b, c) in PAIRWISE[index % 3] else pytest.mark.soak)
    for index, place in enumerate(PLACES)
    for a, b, c in itertools.product((0, 1), repeat=3)
]
"""All that there are for `make soak`; every two values of theirs together here."""


class TestDeltaLog:
    def test_what_was_appended_is_replayed_in_order(self, storage):
        log = DeltaLog.take_over(storage, Clock())
        appended = [note(log, seq, f"text {seq}") for seq in range(2, 7)]
        log.append(appended[:3])
        log.append(appended[3:])
        again = DeltaLog.take_over(storage, Clock())
        assert again.replay()[1:-1] == appended
        assert [event.epoch for event in again.replay() if event.kind is EventKind.EPOCH] == [1, 2]

    def test_a_commit_of_the_one_taken_over_from_is_refused_each_time(self, storage):
        old = DeltaLog.take_over(storage, Clock())
        new = DeltaLog.take_over(storage, Clock())
        for _ in range(2):
            with pytest.raises(FencedError):
                old.append([note(old, 2)])
        new.append([note(new, 3)])
        assert [event.epoch for event in DeltaLog.take_over(storage, Clock()).replay()] == [1, 2, 2, 3]

    def test_of_two_that_start_at_the_same_moment_the_later_one_wins(self, storage, monkeypatch):
        DeltaLog.take_over(storage, Clock())
        commit, rivals = events_module._commit, []

        def overtaken(table, batch):
            if not rivals:
                rivals.append(None)
                rivals[0] = DeltaLog.take_over(storage, Clock())
            commit(table, batch)

        monkeypatch.setattr(events_module, "_commit", overtaken)
        winner = DeltaLog.take_over(storage, Clock())
        assert (rivals[0].epoch, winner.epoch) == (2, 3)
        winner.append([note(winner, 4)])
        with pytest.raises(FencedError):
            rivals[0].append([note(rivals[0], 3)])

    def test_a_take_over_whose_reply_was_lost_is_recognised(self, storage, monkeypatch):
        commit, lost = events_module._commit, []

        def reply_lost(table, batch):
            commit(table, batch)
            if not lost:
                lost.append(True)
                raise OSError("connection reset")

        monkeypatch.setattr(events_module, "_commit", reply_lost)
        log = DeltaLog.take_over(storage, Clock())
        assert lost
        assert log.epoch == 1
        log.append([note(log, 2)])
        assert len(log.replay()) == 1

    def test_a_commit_that_fails_without_a_rival_is_not_called_fencing(self, storage, monkeypatch):
        log = DeltaLog.take_over(storage, Clock())

        def full(_table, _batch):
            raise OSError("no space left on device")

        monkeypatch.setattr(events_module, "_commit", full)
        with pytest.raises(UnavailableError, match="no space left"):
            log.append([note(log, 2)])

    def test_a_newer_schema_is_refused_before_anything_is_written(self, storage, tmp_path):
        log = DeltaLog.take_over(storage, Clock())
        newer = EpochTaken(schema_version=SCHEMA_VERSION + 1, writer="future")
        log.append([Event(2, 2, 5.0, EventKind.EPOCH, "2", newer)])
        commits = tmp_path / "store" / "events" / "_delta_log"
        before = sorted(path.name for path in commits.iterdir())
        with pytest.raises(StorageError, match="newer Esper"):
            DeltaLog.take_over(storage, Clock())
        assert sorted(path.name for path in commits.iterdir()) == before

    def test_a_table_that_is_not_ours_is_refused(self, tmp_path):
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "events").write_text("in the way")
        with pytest.raises(StorageError):
            DeltaLog.take_over(Storage.at(tmp_path / "store"), Clock())

    def test_the_table_is_tidied_now_and_then_and_holds_all_that_it_did(self, storage, monkeypatch, tmp_path):
        monkeypatch.setattr(events_module, "TIDY_EVERY", 10)
        log = DeltaLog.take_over(storage, Clock())
        appended = [note(log, seq) for seq in range(2, 40)]
        for event in appended:
            log.append([event])
        assert len(DeltaTable(storage.child("events")).file_uris()) <= 10
        assert (tmp_path / "store" / "events" / "_delta_log" / "_last_checkpoint").exists()
        assert DeltaLog.take_over(storage, Clock()).replay()[1:-1] == appended

    def test_who_was_taken_over_from_tidies_no_more(self, storage):
        stalled = DeltaLog.take_over(storage, Clock())
        successor = DeltaLog.take_over(storage, Clock())
        stalled._tidy()
        successor.append([note(successor, 3)])  # its handle is not stale
        with pytest.raises(FencedError):
            stalled.append([note(stalled, 2)])

    def test_tidying_never_lets_a_writer_back_in(self, storage, monkeypatch):
        """deltalake's own compaction is accepted from a stale handle, and refreshes it; Urza's must be refused."""
        stalled = DeltaLog.take_over(storage, Clock())
        for seq in range(2, 6):
            stalled.append([note(stalled, seq)])
        look = events_module._last_epoch

        def look_and_be_taken_over_from(storage):
            seen = look(storage)
            monkeypatch.undo()
            successor = DeltaLog.take_over(storage, Clock())
            successor.append([note(successor, 7, "acknowledged")])
            return seen

        monkeypatch.setattr(events_module, "_last_epoch", look_and_be_taken_over_from)
        stalled._tidy()
        for _ in range(2):
            with pytest.raises(FencedError):
                stalled.append([note(stalled, 6)])
        assert [event.seq for event in DeltaLog.take_over(storage, Clock()).replay()] == [*range(1, 9)]

    @pytest.mark.parametrize(("place", "deeds", "successor_keeps", "kept_hours"), STALLS)
    def test_a_writer_that_stalls_while_it_tidies_takes_nothing_from_its_successor(
        self, storage, place, deeds, successor_keeps, kept_hours
    ):
        """However long it stalls: no file may be judged by its age, as all here are seconds old."""

        def succeed():
            successors.append(successor := DeltaLog.take_over(storage, Clock()))
            for deed in deeds.split(" and "):
                if deed == "tidies":
                    assert successor.maintain(kept_hours=successor_keeps).problem == ""
                else:
                    successor.append([note(successor, 8, "acknowledged")])

        successors = []
        stall = Stall(place, succeed)
        stalled = DeltaLog.take_over(storage, Clock(), faults=stall)
        for seq in range(2, 7):
            stalled.append([note(stalled, seq)])
        if kept_hours:  # nothing that was replaced is old enough: something has to be, for the place to be met
            (storage.local / "events" / "part-left.parquet").write_bytes(b"half")
            os.utime(storage.local / "events" / "part-left.parquet", (0, 0))
        with pytest.raises((FencedError, UnavailableError)):
            stalled.maintain(kept_hours=kept_hours)
        assert stall.fired
        with pytest.raises((FencedError, UnavailableError)):
            stalled.append([note(stalled, 8)])
        [successor] = successors
        after = DeltaLog.take_over(storage, Clock(), faults=None)
        assert [event.seq for event in after.replay()] == list(range(1, 10))
        assert after.replay()[7].body == Reason(reason="acknowledged")
        with pytest.raises(FencedError):
            successor.append([note(successor, 9)])
        assert after.maintain(kept_hours=0.0).problem == ""  # and what the stalled one wrote in vain goes
        assert len(list((storage.local / "events").glob("*.parquet"))) == 1

    def test_what_is_removed_is_removed_once(self, storage):
        log = DeltaLog.take_over(storage, Clock())
        for seq in range(2, 7):
            log.append([note(log, seq)])
        assert [log.maintain(kept_hours=0.0).files_removed for _ in range(3)] == [6, 0, 0]
        version = log._table.version()
        log.maintain(kept_hours=0.0)
        assert log._table.version() == version, "nothing to remove: nothing to seal"

    def test_what_a_killed_writer_left_goes_whatever_hours_are_kept(self, storage):
        log = DeltaLog.take_over(storage, Clock())
        left, fresh = (storage.local / "events" / f"part-{name}.parquet" for name in ("left", "fresh"))
        for path in (left, fresh):
            path.write_bytes(b"half")
        os.utime(left, (time.time() - 50 * 60,) * 2)
        assert log.maintain(kept_hours=0.5).files_removed == 0  # a begun hour is a whole one
        os.utime(left, (time.time() - 70 * 60,) * 2)
        assert log.maintain(kept_hours=0.5).files_removed == 1
        assert (left.exists(), fresh.exists()) == (False, True)

    def test_a_writer_that_cannot_see_who_writes_writes_no_more(self, storage, monkeypatch):
        log = DeltaLog.take_over(storage, Clock())

        def unreadable(_):
            raise StorageError("cannot read")

        monkeypatch.setattr(events_module, "_last_epoch", unreadable)
        monkeypatch.setattr(events_module, "TIDY_EVERY", 1)
        log.append([note(log, 2)])  # durable before the table was tidied
        with pytest.raises(UnavailableError, match="not known who writes"):
            log.append([note(log, 3)])
        monkeypatch.undo()
        assert [event.seq for event in DeltaLog.take_over(storage, Clock()).replay()] == [1, 2, 3]
