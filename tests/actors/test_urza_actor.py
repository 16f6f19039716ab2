"""Urza behind its handle: the conformance suite, `kill -9`, lost owners, deadlines; S3, where a server is there."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
from hub_conformance import HubConformance
from ray.exceptions import OwnerDiedError
from urza_samples import BUILD, VECTOR, WIDE, artifact_of, design

from actors import urza
from actors.cluster import NAMESPACE, disconnect
from esper.config import UrzaConfig
from esper.leyline import FencedError, NotFoundError, OonaMessage, StorageError, Topic, UnavailableError
from esper.storage import Storage
from esper.urza.blobs import StoredBlobs
from esper.urza.hub import Hub

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(
        "local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    disconnect()


@pytest.fixture
def address(tmp_path):
    return str(tmp_path / "store")


def start(address, options=None, **more):
    return urza.spawn(address, options, num_cpus=0.01, deadline_s=240.0, **more)


@pytest.fixture
def hub(address):
    handle = start(address)
    yield handle
    ray.kill(handle._actor)


class MovableUrza(urza.UrzaActor):
    """Serves another address from now on: a process for each test of the suite would take a second each."""

    def move(self, address):
        self.__init__(Storage.at(address), config=UrzaConfig(maintain_every_s=None))


@pytest.fixture(scope="module")
def movable(cluster, tmp_path_factory):
    storage = Storage.at(tmp_path_factory.mktemp("first"))
    actor = ray.remote(MovableUrza).options(num_cpus=0.01, max_concurrency=8).remote(storage)
    yield actor
    ray.kill(actor)


class TestUrzaHandle(HubConformance):
    """The suite of the library's hubs, through Ray."""

    @pytest.fixture
    def hub(self, movable, address):
        ray.get(movable.move.remote(address), timeout=240)
        return urza.UrzaHandle(movable, deadline_s=240.0)


def compiled(hub, name="adapter", targets=(VECTOR,)):
    """Takes one design all the way; returns the kernel's record and bytes."""
    hub.submit_blueprint(design(), name=name, targets=targets)
    job = hub.claim("w", fingerprint=BUILD)
    record, container = artifact_of(job)
    hub.complete(job, record, container)
    return record, container


def test_all_that_was_acknowledged_survives_kill_9(hub):
    record, container = compiled(hub, targets=(VECTOR, WIDE))
    leased = hub.claim("w", fingerprint=BUILD)
    before = hub.blueprints()
    pid = hub.ready()
    os.kill(pid, signal.SIGKILL)
    assert hub.blueprints() == before
    assert hub.ready() != pid
    assert hub.kernels() == [record]
    assert bytes(hub.fetch(record.kernel_id)) == container
    assert hub.claim("w", fingerprint=BUILD) == leased
    hub.complete(leased, *artifact_of(leased))
    assert len(hub.kernels()) == 2


def test_submissions_under_way_at_kill_9_are_all_there_once_acknowledged(hub):
    names = [f"d{n}" for n in range(12)]
    acknowledged = []

    def submit(name):
        acknowledged.append(hub.submit_blueprint(design(), name=name, targets=[VECTOR]).name)

    threads = [threading.Thread(target=submit, args=(name,)) for name in names]
    pid = hub.ready()
    for thread in threads:
        thread.start()
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(400)
    # Ray repeats what had no answer, and repeating a submission is harmless
    assert sorted(acknowledged) == sorted(names)
    assert sorted(one.name for one in hub.blueprints()) == sorted(names)


def test_a_reader_whose_ref_lost_its_owner_asks_the_successor(hub):
    record, container = compiled(hub)
    lost = hub._locate(record.kernel_id, 60.0)
    os.kill(hub.ready(), signal.SIGKILL)
    hub.ready()

    def read_until_it_is_lost():
        while True:  # the bytes may lie there for a moment more; the test's own limit ends this
            ray.get(lost, timeout=240)

    with pytest.raises(OwnerDiedError):
        read_until_it_is_lost()

    class Reader(urza.UrzaHandle):
        """Gets the lost ref first, as one does who asked just before Urza died."""

        asked = 0

        def _locate(self, kernel_id, timeout_s):
            self.asked += 1
            return lost if self.asked == 1 else super()._locate(kernel_id, timeout_s)

    reader = Reader(hub._actor, deadline_s=240.0)
    assert bytes(reader.fetch(record.kernel_id)) == container
    assert reader.asked == 2


def test_bytes_are_read_where_they_lie_and_cannot_be_changed(hub):
    record, container = compiled(hub)
    one, two = hub.fetch(record.kernel_id), hub.fetch(record.kernel_id)
    assert one.readonly
    assert (one.format, one.nbytes) == ("B", len(container))
    assert hub._locate(record.kernel_id, 60.0) == hub._locate(record.kernel_id, 60.0)  # hot: one object for all
    del one
    assert bytes(two) == container


def test_cold_kernels_fall_out_and_come_back(address):
    storage = Storage.at(address)
    actor = urza.UrzaActor(storage, config=UrzaConfig(hot_mb=100 / 2**20, maintain_every_s=None))
    hub = Hub.open(storage)
    ids = []
    for targets in ([VECTOR], [WIDE]):
        hub.submit_blueprint(design(), name="adapter", targets=targets)
        job = hub.claim("w", fingerprint=BUILD)
        record, container = artifact_of(job)
        hub.complete(job, record, container)
        ids.append(record.kernel_id)
    first = actor.fetch(ids[0])
    assert actor.fetch(ids[0]) == first
    actor.fetch(ids[1])  # 71 bytes each: only one is hot
    again = actor.fetch(ids[0])
    assert again != first
    assert (ray.get(again[0]) == ray.get(first[0])).all()


def test_two_spawns_are_one_urza_and_connect_finds_it(address, hub):
    assert start(address).ready() == hub.ready()
    assert urza.connect(address).ready() == hub.ready()
    with pytest.raises(UnavailableError, match="no Urza runs"):
        urza.connect(address + "-other")


def test_errors_cross_unchanged(hub):
    with pytest.raises(NotFoundError) as caught:
        hub.fetch("0" * 64)
    assert type(caught.value) is NotFoundError
    with pytest.raises(NotFoundError):
        hub.kernel("0" * 64)


def test_a_storage_that_fails_for_a_while_is_a_system_that_does_not_answer(address, tmp_path):
    # without maintenance, which begins by writing tables: that would make the folder again while it is aside
    hub = start(address, config=UrzaConfig(maintain_every_s=None))
    record, container = compiled(hub)
    aside = Path(address).rename(tmp_path / "aside")
    Path(address).touch()
    for question in (lambda: hub.fetch(record.kernel_id), lambda: hub.register_sites([WIDE], run_id="r")) * 2:
        with pytest.raises(UnavailableError):  # the second time it must be opened anew
            question()
    Path(address).unlink()
    aside.rename(address)
    assert bytes(hub.fetch(record.kernel_id)) == container
    hub.register_sites([WIDE], run_id="r")
    ray.kill(hub._actor)


def test_an_address_that_cannot_be_written_is_refused_before_an_actor_starts(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as caught:
        start(str(tmp_path / "file" / "store"))
    assert caught.value.field == "storage"
    with pytest.raises(UnavailableError):
        urza.connect(str(tmp_path / "file" / "store"))


def test_a_call_that_takes_too_long_is_unavailable(hub):
    os.kill(hub.ready(), signal.SIGSTOP)
    hasty = urza.UrzaHandle(hub._actor, deadline_s=0.2)
    for ask in (hasty.ready, hasty.blueprints, lambda: hasty.fetch("0" * 64)):
        with pytest.raises(UnavailableError, match="deadline"):
            ask()


def test_a_kernel_that_was_fetched_is_read_again_without_asking_urza(address):
    handle = start(address)
    record, container = compiled(handle)
    assert bytes(handle.fetch(record.kernel_id)) == container
    process = Path(f"/proc/{handle.ready()}")
    with _stopped(process):
        patient = pickle.loads(pickle.dumps(handle))
        patient._deadline_s = 0.5
        with pytest.raises(UnavailableError):
            patient.fetch(record.kernel_id)  # another process's handle has to ask
        assert bytes(handle.fetch(record.kernel_id)) == container


@contextmanager
def _stopped(process):
    """The process answers nothing meanwhile."""
    os.kill(int(process.name), signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(int(process.name), signal.SIGCONT)


def test_an_urza_that_is_gone_for_good_is_unavailable(address):
    handle = start(address)
    process = Path(f"/proc/{handle.ready()}")
    ray.kill(handle._actor)
    while process.exists():  # a call that comes before the kill is still answered; the test's own deadline ends this
        time.sleep(0.01)
    with pytest.raises(UnavailableError, match="gone"):
        handle.ready()


def test_a_second_writer_fences_the_actor(address, hub):
    hub.submit_blueprint(design(), name="kept", targets=[VECTOR])
    rival = Hub.open(Storage.at(address))
    for _ in range(2):
        with pytest.raises(FencedError):
            hub.submit_blueprint(design(), name="lost", targets=[VECTOR])
    assert [one.name for one in rival.blueprints()] == ["kept"]


def test_the_process_maps_no_torch(hub):
    compiled(hub)
    maps = Path(f"/proc/{hub.ready()}/maps").read_text()
    assert "libarrow" in maps or "deltalake" in maps  # the right process
    assert "libtorch" not in maps


class Mailbox:
    """An actor that keeps what the bus below was given."""

    def __init__(self):
        self.messages = []

    def put(self, messages):
        self.messages += messages

    def get(self):
        return self.messages


class MailboxBus:
    """The part of a bus that Urza uses."""

    def __init__(self, mailbox):
        self.mailbox = mailbox

    def publish(self, messages):
        ray.get(self.mailbox.put.remote(list(messages)), timeout=240)

    def close(self):
        pass


class FullBus(MailboxBus):
    def publish(self, messages):
        raise UnavailableError("the bus does not answer")


# workers cannot import this module by name
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_compilers_are_told_of_a_submission(address):
    mailbox = ray.remote(Mailbox).options(num_cpus=0.01).remote()
    hub = start(address, make_bus=lambda: MailboxBus(mailbox))
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    hub.submit_blueprint(design(4), name="no-work", targets=[])
    [message] = ray.get(mailbox.get.remote(), timeout=240)
    assert isinstance(message, OonaMessage)
    assert (message.topic, message.body()) == (Topic.BLUEPRINT_SUBMITTED, blueprint)
    ray.kill(hub._actor)


def test_a_submission_stands_even_if_nobody_can_be_told(address):
    hub = start(address, make_bus=lambda: FullBus(None))
    blueprint = hub.submit_blueprint(design(), name="adapter", targets=[VECTOR])
    assert hub.blueprints() == [blueprint]
    ray.kill(hub._actor)


def test_closing_writes_the_tables_for_other_readers(address, hub):
    from deltalake import DeltaTable

    record, _ = compiled(hub)
    hub.close()
    table = DeltaTable(Storage.at(address).child("kernels")).to_pyarrow_table()
    assert table["kernel_id"].to_pylist() == [record.kernel_id]


def test_maintenance_on_demand_and_on_schedule(address):
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    storage = Storage.at(address)
    actor = urza.UrzaActor(storage, config=UrzaConfig(maintain_every_s=0.05, kept_hours=0.0))
    hub = Hub.open(storage)
    record, _ = compiled(hub)
    actor.ready()  # takes over
    actor.submit_blueprint(design(6), name="late", targets=[VECTOR])
    rounds = range(600)  # of 0.1 s, should the machine be busy
    names = []
    for _ in rounds:
        # the table may not be there yet, or a round have removed the files of the version that was opened
        with suppress(DeltaError, OSError):
            names = DeltaTable(storage.child("blueprints")).to_pyarrow_table()["name"].to_pylist()
        if "late" in names:  # written by the schedule alone
            break
        threading.Event().wait(0.1)
    assert names == ["adapter", "late"]
    actor.fetch(record.kernel_id)
    report = actor.maintain()
    assert (report.blobs_kept, report.blobs_removed, report.problems) == (1, 0, ())
    assert len(list((storage.local / "events").glob("*.parquet"))) == 1  # replaced files are kept for no hour
    assert "urza-maintenance" in {thread.name for thread in threading.enumerate()}
    actor.close()  # a thread that is inside Delta when the interpreter ends takes the process down with it
    assert "urza-maintenance" not in {thread.name for thread in threading.enumerate()}


class Broken:
    """A `FaultPlan` with a bug at a place for as long as `has_bug` is set."""

    def __init__(self, place):
        self._place = place
        self.has_bug = threading.Event()
        self.has_bug.set()

    def at(self, place, step):
        del step
        if place == self._place and self.has_bug.is_set():
            raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("place", ["sweeping", "checkpointed"])  # beside requests; with all of them held back
def test_maintenance_goes_on_after_a_bug_and_says_so(address, caplog, place):
    storage = Storage.at(address)
    StoredBlobs(storage).put(b"no record names this")
    for path in (storage.local / "blobs").rglob("*"):
        os.utime(path, (0, 0))
    faults = Broken(place)
    actor = urza.UrzaActor(storage, config=UrzaConfig(maintain_every_s=0.05), faults=faults)
    actor.ready()
    assert until(lambda: actor.census().unmaintained) == "ZeroDivisionError('a bug')"
    assert repr(actor) == f"Urza({storage.uri}): the last maintenance failed: ZeroDivisionError('a bug')"
    until(lambda: actor.submit_blueprint(design(), name="meanwhile", targets=[VECTOR]))
    [first, *_] = [record for record in caplog.records if record.message == "urza.unmaintained"]
    assert "test_urza_actor.py" in first.exc_text
    faults.has_bug.clear()
    until(lambda: not actor.census().unmaintained)
    assert repr(actor) == f"Urza({storage.uri})"
    assert [one.name for one in until(lambda: actor.call("blueprints", (), {}))] == ["meanwhile"]
    actor.close()


def until(ask):
    """What is answered once it is true; the machine may be busy, or a hub break in the middle of the question."""
    for _ in range(600):
        with suppress(UnavailableError):
            if answer := ask():
                return answer
        threading.Event().wait(0.1)
    raise AssertionError("it never came")


def test_maintenance_keeps_what_the_configuration_says(address):
    storage = Storage.at(address)
    unnamed = StoredBlobs(storage).put(b"no record names this")
    when = time.time() - 5 * 3600
    os.utime(storage.local / "blobs" / unnamed[:2] / unnamed, (when, when))
    patient = urza.UrzaActor(storage, config=UrzaConfig(maintain_every_s=None, grace_hours=6.0)).maintain()
    assert (patient.blobs_kept, patient.blobs_set_aside) == (1, 0)
    hasty = urza.UrzaActor(storage, config=UrzaConfig(maintain_every_s=None, grace_hours=4.0)).maintain()
    assert (hasty.blobs_kept, hasty.blobs_set_aside) == (0, 1)


def test_maintenance_through_the_handle(hub):
    record, container = compiled(hub)
    hub.fetch(record.kernel_id)
    report = hub.maintain()
    assert (report.blobs_kept, report.uses_written, report.problems) == (1, 1, ())
    assert bytes(hub.fetch(record.kernel_id)) == container


# ---------------------------------------------------------------- S3


def test_on_s3_what_was_acknowledged_survives_kill_9_and_a_second_writer_is_fenced(s3_options):
    address = f"s3://bucket/{uuid.uuid4().hex}"
    hub = start(address, s3_options)
    record, container = compiled(hub)
    os.kill(hub.ready(), signal.SIGKILL)
    assert hub.kernels() == [record]
    assert bytes(hub.fetch(record.kernel_id)) == container
    hub.close()
    rival = Hub.open(Storage.at(address, s3_options))
    with pytest.raises(FencedError):
        hub.submit_blueprint(design(), name="lost", targets=[VECTOR])
    assert [one.name for one in rival.blueprints()] == ["adapter"]
    assert bytes(rival.fetch(record.kernel_id)) == container
    with pytest.raises(NotFoundError):
        rival.fetch("0" * 64)
    ray.kill(hub._actor)


def test_on_s3_a_missing_bucket_is_named(s3_options):
    with pytest.raises(StorageError) as caught:
        start("s3://nowhere/store", s3_options)
    assert caught.value.field == "storage"
    assert "s3://nowhere/store" in str(caught.value)
