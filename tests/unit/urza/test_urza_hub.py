"""The hub over a directory and in memory, by the one conformance suite; then what only a durable hub can do."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from deltalake import DeltaTable
from hub_conformance import HubConformance, LeaseConformance
from urza_samples import BUILD, VECTOR, WIDE, Clock, artifact_of, design, report_of

from esper.leyline import BlueprintStatus, FencedError, KernelStatus, NotFoundError, StorageError, UnavailableError
from esper.storage import Storage
from esper.urza.blobs import MemoryBlobs, StoredBlobs
from esper.urza.events import DeltaLog, MemoryLog
from esper.urza.hub import Hub
from esper.urza.memory import MemoryHub


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path / "store")


class TestMemoryHub(HubConformance, LeaseConformance):
    @pytest.fixture
    def hub(self, clock):
        return MemoryHub(clock=clock)


class TestDurableHub(HubConformance, LeaseConformance):
    @pytest.fixture
    def hub(self, storage, clock):
        return Hub.open(storage, clock=clock)


def state_of(hub):
    """All that queries can see."""
    blueprints = hub.blueprints()
    return (
        blueprints,
        [hub.targets(one.blueprint_id) for one in blueprints],
        [(one, hub.outcomes(one.kernel_id)) for one in hub.kernels(status=None)],
        hub.signatures(),
    )


def test_a_hub_opened_again_knows_all_that_was_acknowledged(storage, clock):
    hub = Hub.open(storage, clock=clock)
    hub.register_sites([WIDE], run_id="run")
    hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE])
    job = hub.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job)
    hub.complete(job, record, container)
    leased = hub.claim("w", fingerprint=BUILD)
    hub.report(report_of(record))

    again = Hub.open(storage, clock=clock)
    assert state_of(again) == state_of(hub)
    assert again.epoch == hub.epoch + 1
    assert bytes(again.fetch(record.kernel_id)) == container
    # the lease holds across the restart, and its worker can still complete it
    assert again.claim("other", fingerprint=BUILD) is None
    again.complete(leased, *artifact_of(leased))
    assert again.blueprints()[0].status is BlueprintStatus.VALIDATED


def test_the_one_that_was_taken_over_from_stops(storage, clock):
    old = Hub.open(storage, clock=clock)
    new = Hub.open(storage, clock=clock)
    with pytest.raises(FencedError):
        old.submit_blueprint(design(), name="lost", targets=[VECTOR])
    for ask in (old.blueprints, lambda: old.pending([VECTOR])):
        with pytest.raises(FencedError):
            ask()
    with pytest.raises(FencedError):
        Hub.open(storage, clock=clock, after_epoch=old.epoch)
    new.submit_blueprint(design(), name="kept", targets=[VECTOR])
    assert [one.name for one in Hub.open(storage, clock=clock).blueprints()] == ["kept"]


def test_opening_after_its_own_epoch_continues(storage, clock):
    old = Hub.open(storage, clock=clock)
    assert Hub.open(storage, clock=clock, after_epoch=old.epoch).epoch == old.epoch + 1


class BrokenLog(MemoryLog):
    """A log whose commits fail from now on."""

    def append(self, events):
        raise UnavailableError("the disk is full")


def test_after_a_failed_commit_nothing_is_answered_and_nothing_was_shown(clock):
    hub = Hub(BrokenLog(clock), MemoryBlobs(), clock=clock)
    with pytest.raises(UnavailableError):
        hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    assert isinstance(hub.broken, UnavailableError)
    with pytest.raises(UnavailableError):
        hub.blueprints()


class GatedLog(MemoryLog):
    """A log whose commits wait for the test."""

    def __init__(self, clock):
        super().__init__(clock)
        self.entered, self.gate = threading.Event(), threading.Event()
        self.commits = []

    def append(self, events):
        self.entered.set()
        assert self.gate.wait(10)
        self.commits.append(len(events))
        super().append(events)


def test_requests_that_meet_share_a_commit_and_are_not_seen_before_it(clock):
    log = GatedLog(clock)
    hub = Hub(log, MemoryBlobs(), clock=clock)
    threads = [
        threading.Thread(target=hub.submit_blueprint, args=(design(n),), kwargs={"name": f"d{n}", "targets": [VECTOR]})
        for n in range(1, 9)
    ]
    threads[0].start()
    assert log.entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    while hub._head.seq < 1 + 2 * len(threads):  # all are decided; each waits for a commit
        assert any(thread.is_alive() for thread in threads)
    assert hub.blueprints() == []
    assert hub.pending([VECTOR]) == 0
    log.gate.set()
    for thread in threads:
        thread.join(10)
    assert log.commits == [2, 14]
    assert len(hub.blueprints()) == len(threads)


def test_a_duplicate_waits_for_the_commit_it_rests_on(clock):
    log = GatedLog(clock)
    hub = Hub(log, MemoryBlobs(), clock=clock)
    answers = []

    def submit():
        answers.append(hub.submit_blueprint(design(), name="same", targets=[VECTOR]))

    first, second = threading.Thread(target=submit), threading.Thread(target=submit)
    first.start()
    assert log.entered.wait(10)
    second.start()
    second.join(0.05)
    assert answers == []
    log.gate.set()
    first.join(10)
    second.join(10)
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_a_record_is_written_only_after_its_blob(storage, clock, monkeypatch):
    hub = Hub.open(storage, clock=clock)
    hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    job = hub.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job)

    def full(_blobs, _data):
        raise StorageError("no space left", field="storage")

    with monkeypatch.context() as patch:
        patch.setattr(StoredBlobs, "put", full)
        with pytest.raises(StorageError):
            hub.complete(job, record, container)
    with pytest.raises(NotFoundError):
        hub.kernel(record.kernel_id)
    hub.complete(job, record, container)


def test_the_log_holds_each_transition_once_and_in_order(storage, clock):
    hub = Hub.open(storage, clock=clock)
    hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    job = hub.claim("w", fingerprint=BUILD)
    hub.complete(job, *artifact_of(job))
    events = DeltaLog.take_over(storage, clock).replay()
    assert [event.seq for event in events] == list(range(1, 8))
    assert [event.kind.value for event in events] == [
        "epoch",
        "blueprint.submitted",
        "target.queued",
        "target.leased",
        "kernel.stored",
        "target.compiled",
        "epoch",
    ]
    assert [event.epoch for event in events] == [1, 1, 1, 1, 1, 1, 2]


def test_anyone_can_read_the_projections(storage, clock):
    hub = Hub.open(storage, clock=clock)
    hub.project(storage)  # empty tables are tables too
    hub.submit_blueprint(design(), name="adapter", targets=[VECTOR, WIDE], tags=["small"])
    job = hub.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job)
    hub.complete(job, record, container)
    hub.report(report_of(record))
    hub.mark_kernel(record.kernel_id, KernelStatus.RETIRED, "replaced")
    hub.project(storage)
    [blueprint] = DeltaTable(storage.child("blueprints")).to_pyarrow_table().to_pylist()
    [kernel] = DeltaTable(storage.child("kernels")).to_pyarrow_table().to_pylist()
    assert (blueprint["name"], blueprint["status"], blueprint["tags"]) == ("adapter", "VALIDATED", ["small"])
    assert blueprint["targets"] == [VECTOR.key, WIDE.key]
    assert (kernel["kernel_id"], kernel["status"], kernel["signature"]) == (record.kernel_id, "RETIRED", VECTOR.key)
    assert (kernel["fossilized"], kernel["culled"]) == (1, 0)


def test_urza_imports_neither_torch_nor_ray():
    code = "import esper.urza.hub, esper.urza.memory, sys; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
