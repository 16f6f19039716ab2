"""The journal: a broker opened anew from the log behaves as the one that died."""

import base64
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oona_support import each, offsets, unpacked

from esper.leyline.errors import NotFoundError, TamperedError, UnavailableError
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.summary import BusCounts
from esper.oona import (
    Admission,
    Batch,
    Broker,
    Journal,
    Record,
    SegmentLog,
    Start,
    decode_batch,
    encode_batch,
    shard_of,
)
from esper.oona.groups import LISTENER
from esper.oona.journal import ABANDON_AFTER_S, FORGET_AFTER_S, GRACE_S, Kind
from esper.oona.kept import Kept
from esper.oona.packed import Packed
from esper.oona.wire import Block


def batch(seq, *keys, size=4):
    return Batch("p", seq, 0, tuple(Record("t", key, os.urandom(size)) for key in keys))


def append(journal, one):
    return journal.append(one, encode_batch(one))


@pytest.fixture
def reopen(tmp_path):
    """Opens the journal of one directory again; the last one dies without a word."""
    logs: list[SegmentLog] = []

    def open_(now=0.0, segment_bytes=64 << 20, lasting=(), at=0.0, **kwargs):
        while logs:  # what a dead process leaves: nothing flushed, nothing closed but by the kernel
            log = logs.pop()
            os.close(log._fd)
            os.close(log._lock_fd)
        logs.append(SegmentLog(tmp_path, segment_bytes=segment_bytes))
        return Journal(logs[0], Broker(lease_s=10.0, **kwargs), now=now, lasting=lasting, at=at)

    yield open_
    for log in logs:
        log.close()


def test_records_positions_leases_and_counts_survive(reopen):
    journal = reopen()
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    first = batch(0, "a", "a", "b")
    assert append(journal, first) is Admission.ACCEPT
    assert offsets(journal.poll("g", "m", 0, 2, 0.0)) == [0, 1]
    assert journal.ack("g", [0], 0.0) == 1

    journal = reopen(now=100.0)
    assert append(journal, first) is Admission.DUPLICATE
    assert journal.counts("a") == BusCounts(published=2, delivered=2)
    # 1 is still out with m, who may be alive; b never was
    other = journal.poll("g", "m2", 0, 9, 100.0)
    assert each(other) == [(2, 1, first.records[2].data)]
    journal.ack("g", [2], 100.0)
    journal.expire(110.0)
    again = journal.poll("g", "m2", 1, 9, 110.0)
    assert each(again) == [(1, 2, first.records[1].data)]
    journal.ack("g", [1], 110.0)

    journal = reopen(now=200.0)
    journal.expire(300.0)
    assert journal.poll("g", "m3", 0, 9, 300.0) == []


def test_an_answer_lost_with_the_broker_is_given_again(reopen):
    journal = reopen()
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    append(journal, batch(0, "a", "a"))
    lost = each(journal.poll("g", "m", 5, 9, 0.0))
    assert each(reopen().poll("g", "m", 5, 9, 0.0)) == lost


def test_leases_that_ran_out_or_were_given_back_are_replayed(reopen):
    journal = reopen()
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    append(journal, batch(0, "a", "a", "b"))
    journal.poll("g", "m1", 0, 1, 0.0)
    journal.expire(20.0)
    journal.poll("g", "m2", 0, 2, 20.0)
    journal.leave("g", "m2")
    journal.poll("g", "m1", 1, 1, 20.0)
    expected = [journal.counts(key) for key in "ab"]
    journal = reopen(now=20.0)
    assert [journal.counts(key) for key in "ab"] == expected
    journal.leave("g", "m1")
    got = journal.poll("g", "m3", 0, 9, 20.0)
    assert sorted(offsets(got)) == [0, 1, 2]


def test_old_segments_go_when_all_in_them_is_acknowledged(reopen, tmp_path):
    journal = reopen(segment_bytes=2000, kept=Kept(retain=0))
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    for seq in range(40):
        append(journal, batch(seq, "a", size=300))
        if seq >= 5:
            journal.ack("g", offsets(journal.poll("g", "m", seq, 1, 0.0)), 0.0)
    assert len(list(tmp_path.glob("*.log"))) < 6
    journal = reopen(segment_bytes=2000, kept=Kept(retain=0))
    # also of messages whose beginning is not in the log any more
    assert journal.counts("a") == BusCounts(published=40, delivered=35)
    assert journal.stats(0.0).groups[0].acknowledged == 35
    assert offsets(journal.poll("g", "m", 99, 99, 0.0)) == [35, 36, 37, 38, 39]
    assert append(journal, batch(40, "a")) is Admission.ACCEPT


def test_a_group_nobody_uses_is_forgotten_also_after_a_restart(reopen):
    journal = reopen()
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    journal.expire(1e6)
    journal = reopen(now=1e6)
    journal.join("g", ["other"], key=None, start=Start(), now=1e6)  # a conflict, were it still known


def test_a_dead_group_keeps_publishers_waiting_for_ten_minutes_at_most(reopen):
    journal = reopen(backlog=4)
    for name in ("dead", "read"):
        journal.join(name, ["t"], key=None, start=Start(), now=0.0)
    append(journal, batch(0, "a", "b", "c", "d"))
    full = batch(1, "e")
    assert append(journal, full) is Admission.FULL
    journal.expire(ABANDON_AFTER_S - 1)
    assert append(journal, full) is Admission.FULL
    journal.ack("read", offsets(journal.poll("read", "m", 0, 9, ABANDON_AFTER_S)), ABANDON_AFTER_S)
    journal.expire(ABANDON_AFTER_S + 1)
    assert append(journal, full) is Admission.ACCEPT
    assert offsets(journal.poll("read", "m", 1, 9, ABANDON_AFTER_S)) == [4]
    with pytest.raises(NotFoundError, match="forgotten"):
        journal.poll("dead", "m", 0, 9, ABANDON_AFTER_S)


def test_a_replayed_group_starts_where_it_did(reopen):
    journal = reopen()
    append(journal, batch(0, "a"))
    journal.join("end", ["t"], key=None, start=Start(), now=0.0)
    journal.join("start", ["t"], key=None, start=Start(from_start=True), now=0.0)
    append(journal, batch(1, "a"))
    journal = reopen()
    assert offsets(journal.poll("end", "m", 0, 9, 0.0)) == [1]
    assert offsets(journal.poll("start", "m", 0, 9, 0.0)) == [0, 1]


def test_the_dead_and_the_dropped_stay_so_after_a_restart(reopen):
    settings_ = {"max_deliveries": 1, "backlog": 2, "drop_oldest": ("d",)}
    journal = reopen(**settings_)
    for name, topic in (("g", "t"), ("d", "d"), ("letters", Topic.DEAD_LETTERS)):
        journal.join(name, [topic], key=None, start=Start(), now=0.0)
    append(journal, batch(0, "a", "b"))
    journal.poll("g", "m", 0, 9, 0.0)
    journal.leave("g", "m")
    assert journal.bury_exhausted("g", at=5.0) == 1
    dropping = Batch("q", 0, 0, tuple(Record("d", "k", b"x") for _ in range(2)))
    append(journal, dropping)
    append(journal, Batch("q", 1, 0, dropping.records))
    before = [journal.counts(key) for key in "abk"], journal.stats(0.0)
    assert before[0][2] == BusCounts(published=4, dropped=2)
    assert sum(counts.dead for counts in before[0]) == 1

    journal = reopen(**settings_)
    assert ([journal.counts(key) for key in "abk"], journal.stats(0.0)) == before
    assert journal.poll("d", "x", 0, 9, 0.0)
    (letter,) = journal.poll("letters", "x", 0, 9, 0.0)
    assert OonaMessage.model_validate_json(letter.records[0]).body().reason == "not acknowledged after 1 deliveries"
    journal.ack("letters", [letter.offset], 0.0)
    assert [counts.dead for counts in [reopen(**settings_).counts(key) for key in "ab"]].count(1) == 1


def test_what_was_given_up_and_asked_for_again_survives(reopen):
    journal = reopen(segment_bytes=400)
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    for seq in range(3):
        append(journal, batch(seq, "a", "a"))
    journal.poll("g", "m", 0, 5, 0.0)
    journal.bury("g", [0, 1, 3], "why")
    journal.ack("g", [2, 4], 0.0)
    for _ in range(2):
        journal = reopen(segment_bytes=400)
        assert journal.requeue("g", [2, 4, 5, 99]) == 0  # none of them is dead
        assert journal.stats(0.0).groups[0].dead == 3
    assert journal.requeue("g", [0, 3]) == 2
    for _ in range(2):
        journal = reopen(segment_bytes=400)
        (group,) = journal.stats(0.0).groups
        assert (group.dead, group.pending, group.acknowledged) == (1, 3, 2)
        assert journal.counts("a").dead == 1
    got = journal.poll("g", "m", 1, 9, 0.0)
    assert [(offset, attempt) for offset, attempt, _ in each(got)] == [(0, 1), (3, 1), (5, 1)]
    journal.ack("g", offsets(got), 0.0)
    assert journal.requeue("g", [0, 1, 3]) == 1
    assert offsets(journal.poll("g", "m", 2, 9, 0.0)) == [1]


def test_what_is_no_longer_kept_does_not_come_again(reopen):
    journal = reopen(segment_bytes=400, kept=Kept(retain=1))
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    for seq in range(9):
        append(journal, batch(seq, "a"))
    journal.poll("g", "m", 0, 9, 0.0)
    journal.bury("g", range(9), "why")
    journal.tidy(0.0, 1.0)
    for seq in range(9, 20):
        append(journal, batch(seq, "b"))
        journal.poll("g", "m", seq, 9, 0.0)
        journal.ack("g", [range(99)], 0.0)
    assert journal.read(Start(from_start=True), [], None, 1).records[0][0] > 9
    assert journal.requeue("g", [range(9)]) == 0
    journal = reopen(segment_bytes=400, kept=Kept(retain=1))
    assert journal.requeue("g", [range(9)]) == 0
    assert journal.stats(0.0).groups[0].dead == 9


def test_times_survive_and_a_log_of_the_first_form_has_none(reopen, tmp_path):
    log = SegmentLog(tmp_path)
    log.roll(0, Kind.SNAPSHOT, json.dumps(Broker().snapshot()).encode())
    log.write(Kind.BATCH, unpacked(batch(0, "a")))
    log.close()
    journal = reopen()
    second = batch(1, "a")
    journal.append(second, encode_batch(second), at=100.0)
    journal = reopen()
    (topic,) = journal.stats(0.0).topics
    assert (topic.kept, topic.oldest_at, topic.newest_at) == (2, None, 100.0)
    assert journal.read(Start(time=50.0), [], None, 9).records == [(1, second.records[0].data)]


def test_what_is_too_old_goes_where_nobody_publishes_or_reads(reopen, tmp_path):
    kept = {"retain_s": 100.0}
    journal = reopen(kept=Kept(**kept))
    for seq in range(3):
        journal.append(one := batch(seq, "a", size=100), encode_batch(one), at=float(seq))
    journal.tidy(0.0, 50.0)
    assert journal.stats(0.0).topics[0].kept == 3
    journal.tidy(0.0, 200.0)
    assert journal.stats(0.0).topics[0].kept == 0
    assert sum(path.stat().st_size for path in tmp_path.glob("*.log")) < 300  # from the disk too
    assert reopen(kept=Kept(**kept)).counts("a").published == 3


def test_a_log_that_is_opened_on_a_full_disk_can_be_read_and_goes_on_once_there_is_room(reopen, monkeypatch):
    journal = reopen()
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    append(journal, batch(0, "a", "a"))
    full = UnavailableError("full")

    def refuse(self, offset, kind, body):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(SegmentLog, "roll", refuse)
        journal = reopen()
        assert len(journal.read(Start(from_start=True), [], None, 9).records) == 2
        for change in (lambda: append(journal, batch(1, "a")), lambda: journal.poll("g", "m", 0, 9, 0.0)):
            with pytest.raises(UnavailableError, match="full"):
                change()
    assert offsets(journal.poll("g", "m", 0, 9, 0.0)) == [0, 1]
    assert append(journal, batch(1, "a")) is Admission.ACCEPT
    assert reopen().counts("a") == BusCounts(published=3, delivered=2)


def test_a_frame_of_another_kind_is_refused(tmp_path):
    log = SegmentLog(tmp_path)
    log.roll(0, 31, b"{}")
    with pytest.raises(TamperedError, match=r"frame 0 .* cannot be understood"):
        Journal(log, Broker(), now=0.0)
    log.close()


def test_a_refused_log_is_unlocked_again(tmp_path):
    log = SegmentLog(tmp_path)
    log.roll(0, 31, b"{}")
    log.close()
    for _ in range(2):
        with pytest.raises(TamperedError):
            Journal.open(tmp_path, Broker(), now=0.0)


NAMES = st.text(min_size=1, max_size=8)


@given(st.lists(st.tuples(NAMES, NAMES, st.binary(max_size=40)), max_size=8), st.integers(0, 1 << 40))
@settings(max_examples=50)
def test_batches_round_trip(records, seq):
    one = Batch("p", seq, seq // 2, tuple(Record(*record) for record in records))
    assert decode_batch(encode_batch(one)) == one


@pytest.mark.parametrize(
    "change", [lambda body: body[:-1], lambda body: body + b"x", lambda body: body[:3], lambda _: b""]
)
def test_a_batch_that_is_not_whole_is_refused(change):
    with pytest.raises(TamperedError):
        decode_batch(change(encode_batch(batch(0, "a", "b"))))


def test_a_key_has_the_same_shard_everywhere():
    assert [shard_of("t", key, 4) for key in "abcdefgh"] == [shard_of("t", key, 4) for key in "abcdefgh"]
    assert shard_of("telemetry.seed.health", "run-1", 7) == 2
    assert {shard_of("t", str(key), 4) for key in range(100)} == {0, 1, 2, 3}


def test_a_lasting_group_is_kept_and_a_listener_is_not(reopen):
    journal = reopen()
    journal._lasting = frozenset(["archive"])
    for name in ("archive", f"{LISTENER}1"):
        journal.join(name, ["t"], key=None, start=Start(), now=0.0)
    journal.expire(ABANDON_AFTER_S + 1)
    assert [group.group for group in journal.stats(0.0).groups] == ["archive"]
    journal.expire(1e7)
    assert [group.group for group in reopen(now=1e7).stats(1e7).groups] == ["archive"]


def test_records_go_by_size_and_by_age_but_never_what_a_group_needs(reopen, tmp_path):
    kept = {"retain": 1000, "retain_bytes": 1000, "retain_s": 100.0}
    journal = reopen(segment_bytes=2000, kept=Kept(**kept))
    journal.join("g", ["t"], key=None, start=Start(), now=0.0)
    for seq in range(20):
        journal.append(one := batch(seq, "a", size=100), encode_batch(one), at=float(seq))
    assert journal.stats(0.0).topics[0].kept == 20
    journal.ack("g", offsets(journal.poll("g", "m", 0, 99, 0.0)), 0.0)
    journal.append(one := batch(20, "a", size=100), encode_batch(one), at=20.0)
    assert journal.stats(0.0).topics[0].kept_bytes <= 1250
    journal.ack("g", offsets(journal.poll("g", "m", 1, 99, 0.0)), 0.0)
    journal.expire(0.0, at=200.0)
    assert journal.stats(0.0).topics[0].kept == 0
    journal.append(one := batch(21, "a", size=100), encode_batch(one), at=201.0)  # old segments go with the next
    assert len(list(tmp_path.glob("*.log"))) == 1
    journal = reopen(segment_bytes=2000, kept=Kept(**kept))
    assert offsets(journal.poll("g", "m", 2, 99, 0.0)) == [21]
    assert journal.counts("a").published == 22


@pytest.mark.parametrize("kept", [{"retain_bytes": 40}, {"retain_s": 100.0}])
def test_a_dead_group_keeps_old_records_for_ten_minutes_at_most(reopen, caplog, kept):
    """One message of a quiet topic that nobody takes would keep all that comes behind it, of whatever topic."""
    journal = reopen(kept=Kept(**kept))
    journal.join("dead", ["rare"], key=None, start=Start(), now=0.0)
    journal.join("archive", ["t"], key=None, start=Start(), now=0.0)
    rare = Batch("q", 0, 0, (Record("rare", "a", b"x"),))
    journal.append(rare, encode_batch(rare), at=1.0)

    def publish(start, stop):
        for seq in range(start, stop):
            one = batch(seq, "a")
            assert journal.append(one, encode_batch(one), at=seq + 1.0) is Admission.ACCEPT
            journal.ack("archive", offsets(journal.poll("archive", "m", seq, 9, float(seq))), float(seq))
            journal.expire(float(seq), seq + 1.0)

    publish(0, int(ABANDON_AFTER_S))
    assert journal.read(Start(from_start=True), [], None, 1).records == [(0, b"x")]
    told = [record for record in caplog.records if record.message == "oona.records.held"]
    assert {name for record in told for name in record.groups} == {"dead"}
    assert 1 <= len(told) < 10
    publish(int(ABANDON_AFTER_S), int(ABANDON_AFTER_S) + 3)
    with pytest.raises(NotFoundError):
        journal.poll("dead", "m", 0, 9, ABANDON_AFTER_S)
    assert journal.read(Start(from_start=True), [], None, 1).records[0][0] > ABANDON_AFTER_S / 2


def test_short_runs_one_after_another_forget_what_none_of_them_uses(reopen):
    """Each opens the log anew and ends within minutes; what one left there without a word must not stay for ever."""
    day = FORGET_AFTER_S
    for run, at in enumerate((1.0, day, 2 * day, 3 * day)):
        journal = reopen(now=0.0, at=at)
        if run == 0:
            for name in ("once", f"{LISTENER}once"):
                journal.join(name, ["t"], key=None, start=Start(), now=0.0)
        journal.join("each", ["t"], key=None, start=Start(), now=0.0)
        one = batch(run, "a")
        journal.append(one, encode_batch(one), at=at)
        journal.expire(GRACE_S - 1, at)
        known = {group.group for group in journal.stats(0.0).groups}
        journal.expire(GRACE_S + 1, at)
        left = {group.group for group in journal.stats(0.0).groups}
        assert known - left == {1: {f"{LISTENER}once"}, 2: {"once"}}.get(run, set())
    assert offsets(journal.poll("each", "m", 0, 99, 0.0)) == [0, 1, 2, 3]


def test_who_waits_at_a_quiet_bus_is_not_forgotten_when_its_broker_comes_again(reopen):
    """A poll that finds nothing is not in the log."""
    journal = reopen()
    journal.join(f"{LISTENER}1", ["t"], key=None, start=Start(), now=0.0)
    one = batch(0, "a")
    journal.append(one, encode_batch(one), at=1.0)
    journal = reopen(now=1e6, at=1e6)
    journal.expire(1e6 + GRACE_S / 2, 1e6)
    assert offsets(journal.poll(f"{LISTENER}1", "m", 0, 9, 1e6 + GRACE_S / 2)) == [0]
    journal.expire(1e6 + 2 * GRACE_S, 1e6)
    journal.ack(f"{LISTENER}1", [0], 1e6 + 2 * GRACE_S)


def test_a_lasting_group_keeps_what_it_needs_and_that_is_told(reopen, caplog):
    journal = reopen(kept=Kept(retain_bytes=40), lasting=("archive",))
    journal.join("archive", ["t"], key=None, start=Start(), now=0.0)
    for seq in range(21):
        append(journal, batch(seq, "a"))
    journal.expire(1e6, 1e6)
    assert offsets(journal.poll("archive", "m", 0, 99, 1e6)) == list(range(21))
    assert [record.groups for record in caplog.records if record.message == "oona.records.held"] == [["archive"]]


def test_trimming_costs_what_goes_not_what_stays():
    kept = Kept(retain_bytes=100)
    for at in range(200):
        kept.append([Block("t", "a", Packed.of([b"x" * 100] * 20))], float(at + 1))
    seen = []
    within = Kept.within

    def counted(self, start, stop):
        for held in within(self, start, stop):
            seen.append(held)
            yield held

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kept, "within", counted)
        kept.trim(0, 201.0)  # somebody needs the first
        assert (kept.first_offset, len(seen)) == (0, 0)
        kept.trim(30, 201.0)
        assert (kept.first_offset, len(seen)) == (30, 4)
    kept.trim(4000, 201.0)
    assert (kept.first_offset, kept.num_bytes) == (3999, 100)


def test_what_the_log_could_not_take_did_not_happen(reopen, monkeypatch):
    """A full disk: each call says so, and works once there is room."""
    journal = reopen()
    full = UnavailableError("full")

    def refuse(self, kind, body):
        raise full

    def refused(call):
        with monkeypatch.context() as patch:
            patch.setattr(SegmentLog, "write", refuse)
            with pytest.raises(UnavailableError, match="full"):
                call()
        return call()

    refused(lambda: journal.join("g", ["t"], key=None, start=Start(), now=0.0))
    assert refused(lambda: append(journal, batch(0, "a", "a"))) is Admission.ACCEPT
    assert offsets(refused(lambda: journal.poll("g", "m", 0, 9, 0.0))) == [0, 1]
    assert refused(lambda: journal.ack("g", [0], 0.0)) == 1
    assert refused(lambda: journal.bury("g", [1], "why")) == 1
    expected = journal.counts("a")
    assert expected == BusCounts(published=2, delivered=2, dead=1)
    journal = reopen()
    assert journal.counts("a") == expected
    assert journal.poll("g", "m", 1, 9, 0.0) == []


def test_a_log_that_names_each_record_is_read_as_it_was(tmp_path):
    """Written by the last version that did, with a frame of every kind; what it held is beside it."""
    told = json.loads((Path(__file__).parent / "log_of_single_records.json").read_text())
    for name, data in told["segments"].items():
        (tmp_path / name).write_bytes(base64.b64decode(data))
    broker = Broker(lease_s=10.0, backlog=12, drop_oldest=("d",))
    journal = Journal.open(tmp_path, broker, now=0.0)
    kept = journal.read(Start(from_start=True), [], None, 999)
    assert {str(offset): data.decode() for offset, data in kept.records} == told["records"]
    assert kept.end == told["end"]
    stats = journal.stats(0.0).model_dump(mode="json")
    for group in stats["groups"]:
        group["idle_s"] = 0.0  # the version before took all groups for used just now
    assert stats == told["stats"]
    journal.leave("g", "m")
    assert sorted(offsets(journal.poll("g", "new", 0, 999, 0.0))) == told["pending"]
    append(journal, Batch("q", 0, 0, (Record("t", "a", b"x"),)))
    journal.close()
    journal = Journal.open(tmp_path, Broker(lease_s=10.0, backlog=12, drop_oldest=("d",)), now=0.0)
    assert journal.read(Start(from_start=True), [], None, 999).records[-1] == (told["end"], b"x")
    journal.close()
