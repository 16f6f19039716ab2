"""The archive: each message once, in the order of its key, whoever writes and whatever is killed; stories from it."""

import threading

import pytest
from bus_conformance import WAIT_S, started, step

from esper.config import OonaConfig
from esper.leyline import Delivery, NotFoundError, SeedStage, StorageError, Topic, UnavailableError
from esper.leyline.messages import OonaMessage
from esper.leyline.signals import EpochRecord, LifecycleEvent, RunStarted
from esper.oona import MemoryBus
from esper.oona.archive import Archive, read_archive
from esper.oona.archivist import Archivist, archive_group
from esper.oona.story import story_of
from esper.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage.at(tmp_path)


def delivered(*numbers, shard=0):
    return [Delivery(shard=shard, offset=number, message=step(number)) for number in numbers]


def firsts(rows):
    return [row.message.body().first_step for row in rows]


def test_what_is_given_again_is_written_once(storage):
    archive, some = Archive(storage), delivered(0, 1, 2, 3)
    assert archive.append(some[:2]) == 2
    assert archive.append(some[1:3]) == 1
    assert Archive(storage).append(some) == 1  # another life knows what the one before has written
    assert firsts(read_archive(storage)) == [0, 1, 2, 3]
    assert [row.message for row in read_archive(storage)] == [each.message for each in some]


def test_what_comes_late_finds_its_gap(storage):
    archive, some = Archive(storage), delivered(0, 1, 2, 3)
    archive.append([some[0], some[3]])
    assert Archive(storage).append(some) == 2
    assert sorted(firsts(read_archive(storage))) == [0, 1, 2, 3]


def test_two_writers_lose_and_double_nothing(storage):
    one, other, some = Archive(storage), Archive(storage), delivered(0, 1, 2, 3)
    one.append(some[:2])
    assert other.append(some[1:3]) == 1  # its handle was stale: it looked again
    assert one.append(some) == 1
    assert sorted(firsts(read_archive(storage))) == [0, 1, 2, 3]
    assert [row.seq for row in read_archive(storage)] == [1, 2, 3, 4]


def test_a_log_that_was_begun_anew_is_another_one(storage):
    Archive(storage).append(delivered(0, 1))
    assert Archive(storage).append(delivered(0, 1)) == 2  # equal places, other messages


def test_the_topic_and_the_key_select(storage):
    Archive(storage).append(
        [Delivery(shard=0, offset=0, message=started("a")), Delivery(shard=0, offset=1, message=step(1, "b"))]
    )
    assert firsts(read_archive(storage, [Topic.STEPS])) == [1]
    assert [row.message.topic for row in read_archive(storage, key="a")] == [Topic.RUN_STARTED]


def test_tidying_keeps_every_row(storage):
    archive = Archive(storage)
    for delivery in delivered(0, 1, 2):
        archive.append([delivery])
    tidied = archive.tidy(kept_hours=0, full=True)
    assert (tidied.files_before, tidied.files_after, tidied.problem) == (3, 1, "")
    archive.append(delivered(3))
    assert firsts(read_archive(storage)) == [0, 1, 2, 3]


def test_no_archive_and_an_address_that_cannot_be_used_are_told(storage, tmp_path):
    with pytest.raises(NotFoundError, match="no archive below"):
        read_archive(storage)
    (tmp_path / "archive").write_text("a file")
    with pytest.raises(StorageError, match="cannot open the archive"):
        Archive(storage)


# ---- from the bus


class Fails:
    """An archive that a script disturbs: it fails, or dies after its commit."""

    def __init__(self, storage, script):
        self._archive = Archive(storage)
        self._script = script

    def append(self, deliveries):
        fault = self._script.pop(0) if self._script else None
        if fault == "before":
            raise UnavailableError("scripted")
        count = self._archive.append(deliveries)
        if fault == "after":
            raise UnavailableError("scripted")
        return count


@pytest.mark.parametrize("script", [[], ["before"], ["after"], ["after", "before", "after"]])
def test_the_archivist_copies_each_message_once(storage, script):
    bus, left = MemoryBus(OonaConfig(lease_s=3600.0)), list(script)
    bus.publish([step(0), started(), step(1)])
    bus.flush(timeout_s=WAIT_S)
    archivist = Archivist([Topic.STEPS], lambda: Shared(bus), lambda: Fails(storage, left))
    until(lambda: not left)
    bus.publish([step(2)])
    bus.flush(timeout_s=WAIT_S)
    until(lambda: [group.pending for group in bus.stats().groups] == [0])
    assert archivist.stop(timeout_s=WAIT_S)
    assert firsts(read_archive(storage)) == [0, 1, 2]
    (group,) = bus.stats().groups
    assert (group.group, group.pending) == (archive_group([Topic.STEPS]), 0)
    bus.close()


class Shared:
    """A bus that whoever got it may close."""

    def __init__(self, bus):
        self.subscribe = bus.subscribe

    def close(self):
        pass


def until(happened):
    waiting = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if happened():
            return
        waiting.wait(0.005)
    raise AssertionError("it did not happen")


# ---- stories


def event(at, to=SeedStage.GERMINATED):
    return LifecycleEvent(
        run_id="run", step=int(at), epoch=int(at), site="s", seed="s0", from_stage=SeedStage.DORMANT, to_stage=to,
        reason="why", timestamp=at,
    )  # fmt: skip


def begun(at, **more):
    return RunStarted(run_id="run", task="t", num_epochs=9, sites={}, params=1, directory="d", started_at=at, **more)


def told(*bodies, key="run"):
    topics = {RunStarted: Topic.RUN_STARTED, LifecycleEvent: Topic.LIFECYCLE, EpochRecord: Topic.EPOCH}
    return [OonaMessage.of(topics[type(body)], body, sender_id="test", key=key) for body in bodies]


def test_what_a_crash_undid_is_no_part_of_the_story():
    one, two, three, again = event(1.0), event(2.0), event(3.0), event(12.0)
    bodies = (begun(0.5), one, two, three, begun(10.0, resumed_from_epoch=1, num_events=1), again)
    epochs = [EpochRecord(run_id="run", epoch=2, num_epochs=9, step=1, train_loss=loss) for loss in (0.5, 0.25)]
    story = story_of("run", [*told(*bodies, *epochs), *told(event(11.0), key="other")])
    assert story.events == (one, again)
    assert story.undone == (two, three)
    assert [start.started_at for start in story.starts] == [0.5, 10.0]
    assert [record.train_loss for record in story.epochs] == [0.25]


def test_without_a_beginning_there_is_no_story():
    with pytest.raises(NotFoundError, match="of run run"):
        story_of("run", told(event(1.0)))
