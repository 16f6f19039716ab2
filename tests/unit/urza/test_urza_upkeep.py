"""Maintenance, the versions of the log's events, and reading a storage beside its Urza."""

from __future__ import annotations

import json
import os
import threading

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from urza_samples import BUILD, VECTOR, WIDE, Clock, artifact_of, compiled, design

from esper.leyline import BlueprintStatus, FencedError, KernelStatus, NotFoundError, StorageError
from esper.leyline.catalogue import BlueprintQuery, KernelQuery
from esper.storage import Storage
from esper.urza import events as events_module
from esper.urza import projections, records, schema, upkeep
from esper.urza.blobs import MemoryBlobs, StoredBlobs
from esper.urza.events import DeltaLog, MemoryLog
from esper.urza.hub import Hub
from esper.urza.reading import Reader
from esper.urza.records import EpochTaken, Event, EventKind

HOUR = 3600.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path / "store")


# ---------------------------------------------------------------- maintenance


def test_a_round_leaves_few_files_and_loses_nothing(storage):
    hub = Hub.open(storage)
    kernels = [compiled(hub, f"d{n}") for n in range(4)]
    hub.fetch(kernels[0].kernel_id)
    report = upkeep.maintain(hub, storage, kept_hours=0.0)
    assert report.files_before > 10
    assert report.files_after == 1
    assert report.files_removed >= report.files_before
    assert (report.uses_written, report.blobs_kept, report.blobs_removed, report.problems) == (1, 4, 0, ())
    assert (storage.local / "events" / "_delta_log" / "_last_checkpoint").exists()
    assert len(list((storage.local / "events").glob("*.parquet"))) == 1
    again = Hub.open(storage)
    assert again.kernels() == kernels
    assert again.kernel_entry(kernels[0].kernel_id).statistics.num_fetches == 1
    # the hub that tidied goes on until it is taken over from
    with pytest.raises(FencedError):
        upkeep.maintain(hub, storage)


def test_only_old_blobs_that_no_event_names_go(storage, clock):
    hub, blobs = Hub.open(storage, clock=clock), StoredBlobs(storage)
    kernel = compiled(hub, "kept")
    hub.mark_kernel(kernel.kernel_id, KernelStatus.RETIRED, "a run may come back for it")
    old, fresh = blobs.put(b"crashed before its record"), blobs.put(b"being handed over")
    draft = storage.local / "blobs" / old[:2] / ".draft"
    draft.write_bytes(b"half")
    now = 1_000_000.0
    clock.time = now
    for digest, age in ((kernel.kernel_id, 99), (old, 25), (fresh, 23)):
        when = now - age * HOUR
        os.utime(storage.local / "blobs" / digest[:2] / digest, (when, when))
    os.utime(draft, (0, 0))
    report = hub.maintain(grace_hours=24.0)
    assert (report.blobs_kept, report.blobs_set_aside, report.blobs_removed) == (2, 1, 0)
    assert blobs.get(old) == b"crashed before its record"
    report = hub.maintain(grace_hours=24.0)
    assert (report.blobs_kept, report.blobs_set_aside, report.blobs_removed) == (2, 0, 1)
    assert report.bytes_removed == len(b"crashed before its record")
    assert bytes(hub.fetch(kernel.kernel_id))
    assert bytes(blobs.get(fresh))
    assert not draft.exists()
    with pytest.raises(NotFoundError):
        blobs.get(old)


def test_what_killed_writers_left_goes_once_it_is_old(storage):
    """Data of a commit that never came, and the probe of a start that was cut short."""
    hub = Hub.open(storage)
    kernel = compiled(hub, "kept")
    hub.project(storage)
    left = [storage.local / table / "part-left.parquet" for table in ("events", "blueprints", "kernels")]
    left.append(storage.local / ".probe-left")
    for path in left:
        path.write_bytes(b"half")
    upkeep.maintain(hub, storage, kept_hours=24.0, grace_hours=24.0)
    assert all(path.exists() for path in left)  # somebody may be at it
    for path in left:
        os.utime(path, (0, 0))
    report = upkeep.maintain(hub, storage, kept_hours=24.0, grace_hours=24.0)
    assert not any(path.exists() for path in left)
    assert report.problems == ()
    assert bytes(hub.fetch(kernel.kernel_id))
    assert Hub.open(storage).kernels() == [kernel]


def test_tables_written_at_the_same_time_end_with_the_newest_state(storage, monkeypatch):
    """One who is slow to write must not replace what another has written of a later state."""
    hub = Hub.open(storage)
    compiled(hub, "first")
    others = []
    original = projections.write_kernels

    def slow(storage, kernels, confirm):
        if not others:
            compiled(hub, "second")
            others.append(threading.Thread(target=hub.project, args=(storage,)))
            others[0].start()
            others[0].join(1.0)  # it waits for this one; without the lock it would be done
        original(storage, kernels, confirm)

    monkeypatch.setattr(projections, "write_kernels", slow)
    hub.project(storage)
    others[0].join()
    names = DeltaTable(storage.child("kernels")).to_pyarrow_table()["blueprint_name"].to_pylist()
    assert names == ["first", "second"]


@pytest.mark.parametrize("make", [MemoryBlobs, None], ids=["memory", "stored"])
def test_a_blob_that_is_written_again_while_it_is_swept_stays(make, storage):
    blobs = StoredBlobs(storage) if make is None else make()
    digest = blobs.put(b"kernel")
    [listed] = blobs.stored()
    before = listed.written_at + 0.0
    assert blobs.set_aside(listed._replace(written_at=before - HOUR), before=before) is False
    assert (list(blobs.stored()), blobs.aside()) == ([listed], [])
    assert blobs.set_aside(listed, before=before + HOUR) is True
    assert blobs.set_aside(listed, before=before + HOUR) is False  # it is gone already
    assert list(blobs.stored()) == []
    [copy] = blobs.aside()
    assert (copy.digest, blobs.get(digest)) == (digest, b"kernel")
    blobs.restore(copy)
    assert ([one.digest for one in blobs.stored()], blobs.aside()) == ([digest], [])
    blobs.set_aside(listed, before=before + HOUR)
    blobs.discard(blobs.aside()[0])
    with pytest.raises(NotFoundError):
        blobs.get(digest)


def test_a_blob_that_is_being_stored_stays_however_old_it_is(clock):
    """A crash left the bytes long ago; now the same work hands them over again, and is overtaken by a sweep."""

    class Sweeping(MemoryBlobs):
        def put(self, data):
            digest = super().put(data)
            self._written_at[digest] = 0.0
            reports.append(hub.maintain(grace_hours=1.0))
            return digest

    reports = []
    clock.time = 1_000_000.0
    hub = Hub(MemoryLog(clock), Sweeping(clock), clock=clock)
    hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    job = hub.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job)
    hub.complete(job, record, container)
    assert [report.blobs_set_aside for report in reports] == [0]
    assert bytes(hub.fetch(record.kernel_id)) == container


def test_one_that_was_taken_over_from_sweeps_nothing(storage, clock):
    stalled = Hub.open(storage, clock=clock)
    Hub.open(storage, clock=clock)
    digest = StoredBlobs(storage).put(b"the successor's, not yet recorded")
    os.utime(storage.local / "blobs" / digest[:2] / digest, (0, 0))
    with pytest.raises(FencedError):
        stalled.maintain(grace_hours=0.0)
    assert StoredBlobs(storage).get(digest)
    with pytest.raises(FencedError):
        stalled.blueprints()


@pytest.mark.parametrize("place", ["before", "confirmed"])
def test_one_that_was_taken_over_from_writes_no_older_state_for_other_readers(storage, monkeypatch, place):
    stalled = Hub.open(storage)
    compiled(stalled, "first")
    successors = []

    def succeed():
        successors.append(Hub.open(storage))
        compiled(successors[0], "second")
        successors[0].project(storage)

    if place == "before":
        succeed()
    else:  # it stalls just after it made sure that it is the writer
        confirm = stalled._log.confirm
        monkeypatch.setattr(stalled._log, "confirm", lambda: [confirm(), successors or succeed()])
    with pytest.raises(FencedError):
        stalled.project(storage)
    for name, column in (("blueprints", "name"), ("kernels", "blueprint_name")):
        names = DeltaTable(storage.child(name)).to_pyarrow_table()[column].to_pylist()
        assert names == ["first", "second"]


class StallingStorage(Storage):
    """Does something else just before a file is moved or removed: what others do while this process stands still."""

    def move(self, name, to):
        self._meanwhile()
        super().move(name, to)

    def remove(self, name):
        self._meanwhile()
        super().remove(name)

    def _meanwhile(self):
        deed = self.__dict__.pop("deed", None)
        if deed is not None:
            deed()


@pytest.mark.parametrize("round_", ["setting aside", "discarding"])
def test_one_that_stalls_in_its_sweep_takes_nothing_from_its_successor(storage, clock, round_):
    """A crash left a blob; just as it is swept another Urza takes over, and the same work hands the same bytes over."""
    clock.time = 1_000_000.0
    stalling = StallingStorage(storage.uri)
    first = Hub.open(storage, clock=clock)
    first.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    job = first.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job)
    orphan = StoredBlobs(storage).put(container)
    os.utime(storage.local / "blobs" / orphan[:2] / orphan, (0, 0))
    stalled = Hub.open(stalling, clock=clock)
    if round_ == "discarding":
        assert stalled.maintain(grace_hours=1.0).blobs_set_aside == 1
    successors = []

    def succeed():
        successors.append(Hub.open(storage, clock=clock))
        successors[0].complete(job, record, container)

    stalling.__dict__["deed"] = succeed
    stalled.maintain(grace_hours=1.0)
    [successor] = successors
    assert bytes(successor.fetch(record.kernel_id)) == container
    for _ in range(2):  # and its own rounds bring it back to its place
        successor.maintain(grace_hours=1.0)
        assert bytes(successor.fetch(record.kernel_id)) == container
    assert StoredBlobs(storage).aside() == []
    assert (storage.local / "blobs" / orphan[:2] / orphan).exists()
    with pytest.raises(FencedError):
        stalled.maintain(grace_hours=1.0)


# ---------------------------------------------------------------- versions of the events


def test_a_log_of_an_older_schema_is_brought_forward_as_it_is_read(storage, monkeypatch):
    """The old events stay as they are, and each is read by the version of the Urza that wrote it."""
    monkeypatch.setattr(events_module, "SCHEMA_VERSION", 1)
    old = Hub.open(storage)
    old.submit_blueprint(design(), name="adapter", targets=[VECTOR], submitted_by="old")
    monkeypatch.setattr(events_module, "SCHEMA_VERSION", 2)

    def migrate(kind, body):
        return body | {"submitted_by": "brought forward"} if kind == "blueprint.submitted" else body

    monkeypatch.setitem(schema.MIGRATIONS, 1, migrate)
    new = Hub.open(storage)
    new.submit_blueprint(design(5), name="newer", targets=[VECTOR], submitted_by="new")
    for hub in (new, Hub.open(storage)):
        assert [blueprint.submitted_by for blueprint in hub.blueprints()] == ["brought forward", "new"]
    rows = DeltaTable(storage.child("events")).to_pyarrow_table().sort_by("seq").to_pylist()
    versions = [json.loads(row["body"])["schema_version"] for row in rows if row["kind"] == "epoch"]
    assert versions == [1, 2, 2]
    assert "old" in next(row["body"] for row in rows if row["kind"] == "blueprint.submitted")


def test_a_kernel_stored_before_there_were_scores_still_reads(storage, monkeypatch):
    """Schema 3 wrote reports of checks and seconds alone."""
    monkeypatch.setattr(events_module, "SCHEMA_VERSION", 3)
    old = Hub.open(storage)
    kernel = compiled(old, "adapter")
    table = DeltaTable(storage.child("events"))
    rows = table.to_pyarrow_table().to_pylist()
    for row in rows:
        if row["kind"] == "kernel.stored":
            body = json.loads(row["body"])
            body["report"] = {"checks": body["report"]["checks"], "seconds": 0.5}
            row["body"] = json.dumps(body)
    schema_of = table.to_pyarrow_table().schema
    write_deltalake(storage.child("events"), pa.Table.from_pylist(rows, schema=schema_of), mode="overwrite")
    monkeypatch.undo()
    hub = Hub.open(storage)
    found = hub.kernel(kernel.kernel_id)
    assert (found.risk_score, found.report.figures, found.report.seconds) == (None, {}, 0.5)
    assert hub.search_kernels(KernelQuery(max_risk=1.0)).total == 0


def test_every_older_schema_has_its_way_forward():
    assert sorted(schema.MIGRATIONS) == list(range(1, records.SCHEMA_VERSION))


def test_a_reader_refuses_a_newer_schema_too(storage, clock):
    log = DeltaLog.take_over(storage, clock)
    newer = EpochTaken(schema_version=records.SCHEMA_VERSION + 1, writer="future")
    log.append([Event(2, 2, 5.0, EventKind.EPOCH, "2", newer)])
    with pytest.raises(StorageError, match="newer Esper"):
        Reader.of(storage)


# ---------------------------------------------------------------- reading beside Urza


def test_a_reader_sees_what_the_writer_acknowledged_and_disturbs_nobody(storage, clock):
    hub = Hub.open(storage, clock=clock)
    kernel = compiled(hub, "adapter", tags=["small"])
    waiting = hub.submit_blueprint(design(7), name="waiting", targets=[WIDE], parent_id=kernel.blueprint_id)
    reader = Reader.of(storage)
    assert reader.search_blueprints(BlueprintQuery()) == hub.search_blueprints(BlueprintQuery())
    assert reader.search_kernels(KernelQuery(tags_all=("small",))) == hub.search_kernels(KernelQuery())
    assert reader.kernel_entry(kernel.kernel_id) == hub.kernel_entry(kernel.kernel_id)
    assert reader.lineage(waiting.blueprint_id) == hub.lineage(waiting.blueprint_id)
    assert reader.outlook(waiting.blueprint_id) == hub.outlook(waiting.blueprint_id)
    assert reader.targets(waiting.blueprint_id) == hub.targets(waiting.blueprint_id)
    assert bytes(reader.fetch(kernel.kernel_id)) == bytes(hub.fetch(kernel.kernel_id))
    assert reader.blueprint(kernel.blueprint_id).status is BlueprintStatus.VALIDATED
    hub.submit_blueprint(design(8), name="later", targets=[])  # the writer goes on, the reader stands still
    assert reader.search_blueprints(BlueprintQuery()).total == 2


def test_where_nothing_lies_a_reader_says_so_and_makes_nothing(storage):
    with pytest.raises(NotFoundError, match="no catalogue"):
        Reader.of(storage)
    assert not storage.local.exists()
