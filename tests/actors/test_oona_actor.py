"""Oona on Ray: the conformance suite over real shards, and shards that are killed."""

import dataclasses
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
from bus_conformance import WAIT_S, BusConformance, numbers, step, take
from ray import cloudpickle

from actors.cluster import disconnect
from actors.oona import PROTOCOL, RayTransport, ShardInfo, check_protocol, connect, spawn
from esper.config import OonaConfig
from esper.leyline import BusCounts, ConflictError, NotFoundError, Topic, UnavailableError
from esper.oona import Start
from esper.oona.repair import repair
from esper.storage import Storage
from jobs.bus import NoPlatformError, opened, topic_rows

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", namespace="test-oona")
    yield
    disconnect()


@pytest.fixture
def start(cluster, tmp_path, request):
    """Starts shards with a fresh log; ends them after the test."""
    handles = []

    def start_(config=None, directory=tmp_path / "oona", prefix=None):
        handles.append(
            spawn(config or OonaConfig(), directory, prefix=prefix or f"oona-{abs(hash(request.node.name))}")
        )
        return handles[-1]

    yield start_
    for handle in handles:
        for shard in handle.shards:
            ray.kill(shard)


@pytest.fixture(scope="module")
def shards(cluster, tmp_path_factory):
    """Two shards that `make_bus` sets back for each test: a process for each would take seconds.

    A bus of one shard is what the tests below use.
    """
    handle = spawn(OonaConfig(num_shards=2), tmp_path_factory.mktemp("shards"), prefix="suite")
    yield handle
    handle.stop()


@pytest.fixture
def make_bus(shards, tmp_path):
    buses = []
    # a lambda travels by value: the shard's process cannot import this file
    begin_anew = lambda shard, *args: (shard._journal.close(), shard.__init__(repr(shard), *args))  # noqa: E731

    def make(config):
        for index, shard in enumerate(shards.shards):
            where = str(tmp_path / str(index))
            ray.get(shard.__ray_call__.remote(begin_anew, where, len(shards.shards), config), timeout=WAIT_S)
        buses.extend([dataclasses.replace(shards, config=config).bus(), connect(shards.prefix).bus()])
        return buses

    yield make
    for bus in buses:
        bus.close()


class TestRayBus(BusConformance):
    def test_what_is_not_acknowledged_within_the_lease_comes_again(self, make_bus):
        bus, other = make_bus(OonaConfig(lease_s=1.0))
        slow = bus.subscribe([Topic.STEPS], group="g")
        patient = other.subscribe([Topic.STEPS], group="g")
        bus.publish([step(0), step(1)])
        bus.flush(timeout_s=WAIT_S)  # so that both come at once, and none of them twice to the slow one
        take(slow, 2, ack=False)
        again = take(patient, 2)
        assert numbers(again) == [0, 1]
        assert [delivery.attempt for delivery in again] == [2, 2]


def kill_process(handle, index=0):
    """Ends a shard's process as a crash would; Ray starts it again."""
    os.kill(ray.get(handle.shards[index].describe.remote(), timeout=WAIT_S).pid, signal.SIGKILL)


def kill_and_await_process(handle):
    """Likewise, and waits for the next: most calls have a deadline that a busy machine needs for that alone."""
    kill_process(handle)
    ray.get(handle.shards[0].describe.remote(), timeout=WAIT_S)


def assert_refused(bus, match):
    """Flushes until it hears why nothing is taken: a slow shard may not have answered by the end of the first."""
    until = time.monotonic() + WAIT_S
    while True:
        with pytest.raises(UnavailableError, match=r"not acknowledged within 2 s") as caught:
            bus.flush(timeout_s=2)
        if re.search(match, str(caught.value)):
            return
        assert time.monotonic() < until, str(caught.value)


def test_nothing_acknowledged_is_lost_when_the_shard_is_killed_under_load(start):
    handle = start(OonaConfig(batch=16, lease_s=2.0))
    bus, reader = handle.bus(), handle.bus()
    subscription = reader.subscribe([Topic.STEPS], group="g")
    seen: list[int] = []
    at: set[tuple[int, int]] = set()
    for kill_at in (500, 1000, 1500):
        bus.publish([step(number) for number in range(kill_at - 500, kill_at)])
        kill_process(handle)
        while len(at) < kill_at:
            got = subscription.poll(timeout_s=WAIT_S)
            assert got
            subscription.ack(got)
            seen += numbers(got)
            at |= {(delivery.shard, delivery.offset) for delivery in got}
    bus.flush(timeout_s=WAIT_S)
    assert sorted(set(seen)) == list(range(1500))
    # a message has one (shard, offset) however often it comes: none was appended twice
    assert len(at) == 1500
    assert bus.counts("run").published == 1500
    firsts = list(dict.fromkeys(seen))
    assert firsts == sorted(firsts)
    reader.close()
    bus.close()


def test_positions_survive_the_shard(start):
    handle = start(OonaConfig(lease_s=3600.0))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(number) for number in range(10)])
    subscription.ack(take(subscription, 10, ack=False)[:7])
    subscription.close()
    kill_and_await_process(handle)
    assert numbers(take(bus.subscribe([Topic.STEPS], group="g"), 3)) == [7, 8, 9]
    assert bus.counts("run") == BusCounts(published=10, delivered=13, redelivered=3)
    bus.close()


def test_a_member_that_outlives_the_shard_goes_on_without_duplicates(start):
    handle = start(OonaConfig(lease_s=3600.0))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(number) for number in range(10)])
    held = take(subscription, 10, ack=False)
    kill_process(handle)
    subscription.ack(held)
    bus.publish([step(10)])
    assert numbers(take(subscription, 1)) == [10]
    assert bus.counts("run").redelivered == 0
    bus.close()


def test_a_bus_that_was_stopped_goes_on_from_its_log(start):
    handle = start()
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(0), step(1)])
    subscription.ack(take(subscription, 2, ack=False)[:1])
    bus.close()
    handle.stop()
    again = start(prefix=f"{handle.prefix}-again").bus()
    assert numbers(take(again.subscribe([Topic.STEPS], group="g"), 1)) == [1]
    again.close()


def test_another_actor_reads_and_publishes(start):
    handle = start()

    class Echo:
        """A member in another process."""

        def __init__(self, oona):
            self.bus = oona.bus()
            self.inbox = self.bus.subscribe([Topic.STEPS], group="echo", key="ask")

        def echo(self):
            got = self.inbox.poll(timeout_s=WAIT_S)
            answers = [each.message.model_copy(update={"key": "answer", "sender_id": "echo"}) for each in got]
            self.bus.publish(answers)
            self.inbox.ack(got)
            self.bus.close()
            return "torch" in sys.modules

    echo = ray.remote(num_cpus=0.1)(Echo).remote(handle)
    ray.get(echo.__ray_ready__.remote(), timeout=WAIT_S)
    bus = handle.bus()
    answers = bus.subscribe([Topic.STEPS], group="driver", key="answer")
    answer = echo.echo.remote()
    bus.publish([step(41, "ask")])
    (delivery,) = take(answers, 1)
    assert (delivery.message.sender_id, numbers([delivery])) == ("echo", [41])
    assert ray.get(answer, timeout=WAIT_S) is False
    bus.close()


def test_a_shard_is_named_small_and_without_torch(start):
    handle = start(prefix="named")
    shard = ray.get_actor("named-0", namespace="esper")
    assert ray.get(shard.__ray_call__.remote(lambda self: (repr(self), "torch" in sys.modules)), timeout=WAIT_S) == (
        "named-0",
        False,
    )
    assert handle.shards[0] == shard


def test_names_and_logs_are_not_shared_by_mistake(start, tmp_path):
    start(prefix="taken")
    with pytest.raises(ConflictError, match="cannot start taken"):
        spawn(OonaConfig(), tmp_path / "elsewhere", prefix="taken")
    with pytest.raises(ConflictError, match=r"oona\.num_shards"):
        spawn(OonaConfig(num_shards=2), tmp_path / "oona", prefix="other")
    with pytest.raises(NotFoundError, match="no actor absent-0"):
        connect("absent")


def test_a_shard_that_is_gone_is_unavailable(start):
    handle = start(prefix="gone")
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    handle.stop()
    with pytest.raises(UnavailableError, match="gone"):
        subscription.poll(timeout_s=0.1)
    with pytest.raises(UnavailableError):
        bus.counts("run")
    bus.publish([step(0)])
    with pytest.raises(UnavailableError, match="1 messages were not acknowledged"):
        bus.flush(timeout_s=0.5)
    with pytest.raises(UnavailableError):
        bus._publisher.close(timeout_s=0.0)  # what `close` does, without its patience
    with pytest.raises(UnavailableError):
        bus.close()


def test_a_shard_that_is_closed_refuses_every_call_while_it_is_there_still(start):
    """The end of a bus comes in two steps, and a machine may be slow between them."""
    handle = start(prefix="closed")
    bus = handle.bus()
    bus.subscribe([Topic.STEPS], group="g")
    ray.get(handle.shards[0].close.remote(), timeout=WAIT_S)
    for call in (
        lambda: bus.counts("run"),
        bus.stats,
        bus.read,
        lambda: bus.subscribe([Topic.STEPS], group="g"),
    ):
        with pytest.raises(UnavailableError, match="closed-0 is closed"):
            call()
    with pytest.raises(UnavailableError):
        bus.close()


def test_a_process_that_has_left_ray_starts_no_other(monkeypatch):
    """Ray starts by itself at the first call: a thread of a bus that was left open would do it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    transport = RayTransport([None, None], "left")
    assert isinstance(transport.append(1, b"").exception(timeout=0), UnavailableError)
    for call in (
        lambda: transport.subscribe("g", [], key=None, start=Start()),
        lambda: transport.poll("g", "m", max_records=1, timeout_s=0.0),
        lambda: transport.ack("g", {0: [1]}),
        lambda: transport.leave("g", "m"),
        lambda: transport.counts("run"),
    ):
        with pytest.raises(UnavailableError, match="has left Ray"):
            call()


def connection(bus):
    """To the first shard, once a thread has made it."""
    ends = time.monotonic() + WAIT_S
    while (link := bus._transport._ways[0].link) is None or not link.is_up:
        assert time.monotonic() < ends
        bus._transport._link(bus._transport._ways[0])
        time.sleep(0.01)
    return link


def test_on_its_node_a_shard_is_reached_by_a_connection_and_by_calls_when_that_is_lost(start):
    bus = start().bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    link = connection(bus)
    bus.publish([step(number) for number in range(3)])
    assert numbers(take(subscription, 3)) == [0, 1, 2]
    assert next(link._numbers) >= 2  # a batch and a poll
    link.close()
    bus.publish([step(number) for number in range(3, 6)])
    assert numbers(take(subscription, 3)) == [3, 4, 5]
    assert connection(bus) is not link
    bus.close()


def test_where_there_is_no_connection_everything_goes_by_calls(start, monkeypatch):
    monkeypatch.setattr(RayTransport, "_link", lambda _self, _way: None)
    bus = start().bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(number) for number in range(600)])
    assert numbers(take(subscription, 600)) == list(range(600))
    bus.close()
    assert bus._transport._ways[0].link is None


def test_the_command_line_finds_the_bus_of_a_storage_and_says_where_there_is_none(start, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # this process has joined already
    with pytest.raises(NoPlatformError, match="no platform is up for"), opened(str(tmp_path)):
        pass
    bus = start(prefix=f"oona-{Storage.at(str(tmp_path)).key}").bus()
    bus.publish([step(0)])
    bus.flush(timeout_s=WAIT_S)
    with opened(str(tmp_path)) as found:
        assert [(row["topic"], row["published"]) for row in topic_rows(found)] == [(Topic.STEPS, 1)]
    bus.close()


# ---- members that die, disks that fill up, settings of the disk


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know no folder of tests


class Member:
    """A member in an actor; it holds what it polled."""

    def __init__(self, oona):
        self.bus = oona.bus()
        self.inbox = self.bus.subscribe([Topic.STEPS], group="g")

    def hold(self, count):
        held = []
        while len(held) < count:
            held += self.inbox.poll(timeout_s=60.0)
        return os.getpid()

    def block(self):
        threading.Event().wait()


@pytest.mark.parametrize("is_busy", [False, True])
def test_what_a_killed_actor_held_goes_to_others_at_once(start, is_busy):
    handle = start(OonaConfig(lease_s=3600.0))
    bus = handle.bus()
    patient = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(0), step(1)])
    member = ray.remote(num_cpus=0.1, max_restarts=-1)(Member).remote(handle)  # it comes again, as another
    pid = ray.get(member.hold.remote(2), timeout=WAIT_S)
    assert patient.poll(timeout_s=0.5) == []
    if is_busy:  # it answers no question
        member.block.remote()
    os.kill(pid, signal.SIGKILL)
    again = take(patient, 2)
    assert [(delivery.attempt, *numbers([delivery])) for delivery in again] == [(2, 0), (2, 1)]
    ray.kill(member)
    bus.close()


def test_the_bus_keeps_no_actor_alive(start):
    handle = start(OonaConfig(lease_s=3600.0))
    bus = handle.bus()
    patient = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(0)])
    member = ray.remote(num_cpus=0.1)(Member).remote(handle)
    ray.get(member.hold.remote(1), timeout=WAIT_S)
    del member  # the last handle but the bus's own
    assert numbers(take(patient, 1)) == [0]
    bus.close()


@pytest.mark.parametrize("fsync", ["always", "never"])
def test_the_disk_may_be_waited_for_always_or_never(start, fsync):
    handle = start(OonaConfig(fsync=fsync, batch=8))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(number) for number in range(100)])
    bus.flush(timeout_s=WAIT_S)
    synced = ray.get(
        handle.shards[0].__ray_call__.remote(lambda shard: (shard._num_synced, shard._num_written)), timeout=WAIT_S
    )
    assert synced[0] == (synced[1] if fsync == "always" else 0)
    kill_process(handle)
    assert numbers(take(subscription, 100)) == list(range(100))
    bus.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_told_and_waited_for_and_nothing_is_lost(start, small_disk):
    handle = start(OonaConfig(batch=32, lease_s=3600.0), directory=small_disk / "oona")
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(number) for number in range(100)])
    bus.flush(timeout_s=WAIT_S)
    ballast = small_disk / "ballast"
    filled = subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4096"], capture_output=True, check=False)
    assert b"No space left" in filled.stderr
    bus.publish([step(number) for number in range(100, 300)])
    assert_refused(bus, r"No space left on device \(make room")
    ballast.unlink()
    bus.flush(timeout_s=WAIT_S)
    kill_process(handle)
    assert numbers(take(subscription, 300)) == list(range(300))
    assert bus.counts("run") == BusCounts(published=300, delivered=300)
    bus.close()


def test_a_disk_that_fails_for_a_while_is_waited_for_and_nothing_is_lost(start, tmp_path):
    """The system refuses the shard's writes, and then no longer; publisher and consumer are the same all the while."""
    handle = start(OonaConfig(batch=32, lease_s=3600.0))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(number) for number in range(300)])
    subscription.ack(take(subscription, 300, ack=False))
    pid = ray.get(handle.shards[0].describe.remote(), timeout=WAIT_S).pid
    (path,) = tmp_path.glob("oona/*/*.log")
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (path.stat().st_size + 100, limits[1]))
    bus.publish([step(number) for number in range(300, 400)])
    assert_refused(bus, r"File too large \(mend the disk")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    bus.flush(timeout_s=WAIT_S)
    assert numbers(take(subscription, 100)) == list(range(300, 400))
    kill_and_await_process(handle)
    subscription.close()
    assert bus.counts("run") == BusCounts(published=400, delivered=400)
    (group,) = bus.stats().groups
    assert (group.acknowledged, group.pending) == (400, 0)
    bus.close()


def test_what_is_written_while_a_failed_sync_is_tried_again_is_synced_too(start):
    """As when a member dies meanwhile: no call follows that would begin another sync."""
    handle = start(OonaConfig(batch=32, fsync_ms=1.0))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    bus.publish([step(0)])
    bus.flush(timeout_s=WAIT_S)  # the first one begins a segment, which is a sync of its own

    def fail(_shard):
        import errno
        import os

        from esper.oona import log

        def fsync(_fd):
            raise OSError(errno.EIO, "Input/output error")

        log.whole_fsync, log.os.fsync = os.fsync, fsync

    def heal(shard):
        import asyncio

        from esper.oona import log

        loop = shard._recovering.get_loop()

        async def leave():
            shard._leave("g", "somebody")

        def fsync(fd):  # in a thread, while the shard goes on
            log.os.fsync = log.whole_fsync
            asyncio.run_coroutine_threadsafe(leave(), loop).result(10)
            log.whole_fsync(fd)

        log.os.fsync = fsync

    def state(shard):
        return shard._fault is not None, shard._num_written - shard._num_synced

    def until(wanted):
        deadline = time.monotonic() + WAIT_S
        while (found := ray.get(handle.shards[0].__ray_call__.remote(state), timeout=WAIT_S)) != wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    until((False, 0))  # what is not synced yet would fail beside what comes
    ray.get(handle.shards[0].__ray_call__.remote(fail), timeout=WAIT_S)
    bus.publish([step(1)])
    until((True, 1))
    ray.get(handle.shards[0].__ray_call__.remote(heal), timeout=WAIT_S)
    until((False, 0))
    assert numbers(take(subscription, 2)) == [0, 1]
    subscription.close()
    bus.close()


def test_shards_and_programs_of_different_versions_say_so(start):
    handle = start()
    info = ray.get(handle.shards[0].describe.remote(), timeout=WAIT_S)
    check_protocol(info, "oona")
    assert info.protocol == PROTOCOL
    with pytest.raises(ConflictError, match=rf"protocol {PROTOCOL + 1}, this program {PROTOCOL}.*esper platform down"):
        check_protocol(dataclasses.replace(info, protocol=PROTOCOL + 1), "oona")
    old = object.__new__(ShardInfo)  # as one comes that was pickled before there was such a number
    for name in ("num_shards", "config", "pid"):
        object.__setattr__(old, name, getattr(info, name))
    with pytest.raises(ConflictError, match="protocol 0"):
        check_protocol(old, "oona")


def test_a_sync_that_fails_is_tried_until_the_disk_has_everything(start):
    handle = start(OonaConfig(batch=32, lease_s=3600.0, fsync="always"))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")

    def fail(_shard):  # a disk that refuses to sync cannot be had without its driver
        import errno
        import os

        from esper.oona import log

        def fsync(_fd):
            raise OSError(errno.EIO, "Input/output error")

        log.whole_fsync, log.os.fsync = os.fsync, fsync

    def heal(_shard):
        from esper.oona import log

        log.os.fsync = log.whole_fsync

    ray.get(handle.shards[0].__ray_call__.remote(fail), timeout=WAIT_S)
    bus.publish([step(number) for number in range(100)])
    assert_refused(bus, r"Input/output error \(mend the disk")
    ray.get(handle.shards[0].__ray_call__.remote(heal), timeout=WAIT_S)
    bus.flush(timeout_s=WAIT_S)
    assert numbers(take(subscription, 100)) == list(range(100))
    assert bus.counts("run") == BusCounts(published=100, delivered=100)
    bus.close()


def test_a_damaged_log_is_named_and_goes_on_without_the_damage(start, tmp_path):
    handle = start(OonaConfig(lease_s=3600.0))
    bus = handle.bus()
    subscription = bus.subscribe([Topic.STEPS], group="g")
    for first in range(0, 30, 10):
        bus.publish([step(number) for number in range(first, first + 10)])
        bus.flush(timeout_s=WAIT_S)
    subscription.ack(take(subscription, 30, ack=False)[20:25])
    bus.close()
    handle.stop()
    (path,) = tmp_path.glob("oona/*/*.log")
    whole = path.read_bytes()
    at = whole.index(b'"first_step":15,')  # in the second batch
    path.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    with pytest.raises(UnavailableError, match=r"log is damaged at byte \d+ \(restore .* esper bus repair\)"):
        start(prefix="damaged")
    (cut,) = repair(path.parent)
    assert cut.at < at < cut.at + cut.num_bytes
    again = start(prefix="repaired").bus()
    left = [*range(10), *range(25, 30)]
    assert numbers(take(again.subscribe([Topic.STEPS], group="g"), len(left))) == left
    again.close()
