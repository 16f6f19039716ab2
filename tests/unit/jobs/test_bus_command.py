"""`esper bus`: what it shows of a bus, and what it says where there is none. Nothing here reaches Ray."""

from __future__ import annotations

import contextlib
import json

import pytest
from bus_conformance import started, step, take

from esper.config import OonaConfig
from esper.leyline import Delivery, NotFoundError, OonaMessage, SeedStage, Topic
from esper.leyline.signals import LifecycleEvent, RunStarted
from esper.oona import Batch, Broker, Journal, MemoryBus, Record, SegmentLog, Start, encode_batch
from esper.oona.archive import Archive
from esper.storage import Storage
from jobs import bus as bus_job
from jobs import cli


@pytest.fixture
def esper(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(list(arguments))
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def bus(monkeypatch):
    """A bus with three messages and a group that has acknowledged one."""
    memory = MemoryBus(OonaConfig(lease_s=3600.0))
    subscription = memory.subscribe([Topic.STEPS], group="reader")
    memory.publish([step(0, "a"), step(1, "b"), started("a")])
    memory.flush()
    subscription.ack(take(subscription, 2, ack=False)[:1])
    subscription.close()
    monkeypatch.setattr(bus_job, "opened", lambda storage: contextlib.nullcontext(memory))
    yield memory
    memory.close()


def test_topics_and_groups_as_json(esper, bus):
    code, out, _ = esper("bus", "topics", "--json")
    rows = {row["topic"]: row for row in json.loads(out)}
    assert (code, rows[Topic.STEPS]["published"], rows[Topic.RUN_STARTED]["kept"]) == (0, 2, 1)
    code, out, _ = esper("bus", "stats", "--json")
    (row,) = json.loads(out)
    assert (code, row["group"], row["pending"], row["delivered"]) == (0, "reader", 1, 2)


def test_tables_have_a_line_for_each(esper, bus):
    _, out, _ = esper("bus", "topics")
    head, *lines = out.splitlines()
    assert head.split() == ["topic", "published", "kept", "kept_bytes", "oldest_at", "newest_at"]
    assert [line.split()[0] for line in lines] == [Topic.RUN_STARTED, Topic.STEPS]
    _, out, _ = esper("bus", "stats")
    assert out.splitlines()[1].split()[:3] == ["reader", Topic.STEPS, "-"]


def test_tail_prints_what_is_kept_and_leaves_no_trace(esper, bus):
    before = bus.stats().groups[0].model_copy(update={"idle_s": 0.0})
    code, out, _ = esper("bus", "tail", "--from-start", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, [row["offset"] for row in rows]) == (0, [0, 1, 2])
    _, out, _ = esper("bus", "tail", "--from-start", "--key", "a", "--topic", Topic.STEPS)
    assert len(out.splitlines()) == 1
    assert '"first_step": 0' in out
    _, out, _ = esper("bus", "tail", "--offset", "0:1", "--limit", "1", "--json")
    assert json.loads(out)["offset"] == 1
    _, out, _ = esper("bus", "tail", "--since", "3600", "--json")
    assert len(out.splitlines()) == 3
    assert bus.stats().groups[0].model_copy(update={"idle_s": 0.0}) == before


def test_what_was_given_up_is_given_again(esper, bus):
    subscription = bus.subscribe([Topic.STEPS], group="failing", from_start=True)
    subscription.reject(take(subscription, 2, ack=False), reason="no such run")
    first, _ = bus.read([Topic.DEAD_LETTERS]).deliveries
    code, out, _ = esper("bus", "requeue", "--letter", f"0:{first.offset}", "--json")
    assert (code, json.loads(out)) == (
        0,
        [{"group": "failing", "letters": 1, "requeued": 1, "note": ""}],
    )
    assert len(take(subscription, 1)) == 1
    assert esper("bus", "requeue", "--group", "reader")[:2] == (0, "nothing was given up\n")
    code, out, _ = esper("bus", "requeue")
    assert (code, out.splitlines()[1].split()[:3]) == (0, ["failing", "2", "1"])
    assert "came back before" in out
    code, _, err = esper("bus", "requeue", "--letter", "0:9999")
    assert (code, "no letter at 0:9999" in err, "--from-start" in err) == (1, True, True)
    subscription.close()
    bus._transport.forget("failing")
    assert "no group failing" in esper("bus", "requeue")[1]


def test_tail_follows_from_now_on(bus, monkeypatch):
    monkeypatch.setattr(bus_job, "POLL_S", 0.001)
    rows = bus_job.messages(bus, (), key=None, positions=bus.read(positions={}).positions, follow=True, limit=2)
    bus.publish([step(7, "a"), step(8, "a")])
    assert [row["payload"]["first_step"] for row in rows] == [7, 8]


def test_what_is_no_message_is_told(bus):
    page = bus.read().model_copy(update={"undecodable": ((0, 9),)})
    bus.read = lambda *args, **kwargs: page
    assert [bus_job.line(row) for row in bus_job.messages(bus, (), key=None, positions=None)][-1] == (
        "0:9        cannot be decoded"
    )


@pytest.mark.parametrize("command", ["topics", "stats", "tail"])
def test_without_a_cluster_one_line_and_exit_code_2(esper, monkeypatch, tmp_path, command):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out, err = esper("bus", command, "--storage", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "RAY_ADDRESS is not set" in err
    assert "esper platform up" in err
    code, out, _ = esper("bus", command, "--storage", str(tmp_path), "--json")
    assert (code, json.loads(out)["error"]["type"]) == (2, "NoPlatformError")


def test_a_bus_that_is_over_is_looked_at_in_its_log(esper, monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    journal = Journal.open(tmp_path / "oona" / "shard-0-of-1", Broker(), now=0.0)
    journal.join("all", [topic.value for topic in Topic], key=None, start=Start(), now=0.0)
    message = step(3, "a")
    batch = Batch("p", 0, 0, (Record(message.topic.value, message.key, message.model_dump_json().encode()),))
    journal.append(batch, encode_batch(batch), at=1.0)
    code, out, err = esper("bus", "topics", "--storage", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the bus runs" in err
    assert "RAY_ADDRESS=auto" in err
    journal.close()
    code, out, err = esper("bus", "topics", "--storage", str(tmp_path), "--json")
    assert (code, [row["topic"] for row in json.loads(out)], "does not run" in err) == (0, [Topic.STEPS], True)
    code, out, _ = esper("bus", "stats", "--storage", str(tmp_path))
    assert (code, out.splitlines()[1].split()[:3]) == (0, ["all", str(len(Topic)), "topics"])
    assert json.loads(esper("bus", "stats", "--storage", str(tmp_path), "--json")[1])[0]["topics"] == sorted(Topic)
    code, out, _ = esper("bus", "tail", "--storage", str(tmp_path), "--from-start")
    assert (code, '"first_step": 3' in out) == (0, True)
    for arguments in ([], ["--from-start", "--follow"]):
        code, out, err = esper("bus", "tail", "--storage", str(tmp_path), *arguments)
        assert (code, out, "nothing comes" in err, "--from-start" in err) == (2, "", True, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topic", "none"], "no topic 'none'"),
        (["--offset", "5"], "'5' is no SHARD:OFFSET"),
        (["--offset", "7:0", "--limit", "1"], "there is no shard 7 (0 to 0)"),
        (["--offset", "0:1", "--from-start"], "more than one place to begin"),
    ],
)
def test_a_wrong_argument_is_one_line(esper, bus, arguments, words):
    code, out, err = esper("bus", "tail", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_a_story_is_told_from_the_archive_without_a_platform(esper, tmp_path):
    events = [
        LifecycleEvent(
            run_id="run", step=number, epoch=number, site="block", seed="s0", from_stage=SeedStage.DORMANT,
            to_stage=SeedStage.GERMINATED, reason=f"reason {number}", timestamp=float(number),
        )
        for number in (1, 2, 12)
    ]  # fmt: skip
    started = [
        RunStarted(run_id="run", task="t", num_epochs=9, sites={}, params=1, directory="d", started_at=at, num_events=n)
        for at, n in ((0.5, 0), (10.0, 1))
    ]
    told = [OonaMessage.of(Topic.RUN_STARTED, body, sender_id="test", key="run") for body in started]
    told += [OonaMessage.of(Topic.LIFECYCLE, body, sender_id="test", key="run") for body in events]
    archive = Archive(Storage.at(tmp_path))
    archive.append([Delivery(shard=0, offset=at, message=message) for at, message in enumerate(told)])
    code, out, _ = esper("bus", "story", "run", "--storage", str(tmp_path), "--json")
    assert code == 0
    assert [(row["step"], row["state"]) for row in json.loads(out)] == [(1, "done"), (2, "undone"), (12, "done")]
    code, out, _ = esper("bus", "story", "run", "--storage", str(tmp_path))
    assert "DORMANT > GERMINATED" in out
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["2", "3", "13"]  # counted from 1, as views do
    code, _, err = esper("bus", "story", "absent", "--storage", str(tmp_path))
    assert (code, err.strip().count("\n")) == (1, 0)
    assert "of run absent (the newest there: run)" in err
    for name in ("latest", "ru"):
        assert "DORMANT > GERMINATED" in esper("bus", "story", name, "--storage", str(tmp_path))[1]


def test_a_run_of_an_archive_is_named_as_other_commands_name_runs():
    ids = ["a-1", "a-2", "a-1", "b-1"]  # a-1 was resumed
    assert [bus_job.archived_run(name, ids) for name in ("latest", "b", "a-2")] == ["b-1", "b-1", "a-2"]
    with pytest.raises(NotFoundError, match="'a' could be any of a-1, a-2"):
        bus_job.archived_run("a", ids)
    with pytest.raises(NotFoundError, match="beginning of run latest"):
        bus_job.archived_run("latest", [])


def test_repair_names_what_it_cut_and_says_where_there_is_nothing(esper, tmp_path):
    code, _, err = esper("bus", "repair", "--storage", str(tmp_path))
    assert (code, "holds no log of a bus" in err) == (1, True), err
    log = SegmentLog(tmp_path / "oona" / "shard-0-of-1")
    log.roll(0, 0, b"state")
    for body in (b"one", b"two"):
        log.write(1, body)
    log.close()
    assert esper("bus", "repair", "--storage", str(tmp_path))[:2] == (0, "nothing is damaged\n")
    (path,) = log.segments
    path.write_bytes(path.read_bytes().replace(b"one", b"One"))
    code, out, _ = esper("bus", "repair", "--storage", str(tmp_path), "--json")
    assert (code, json.loads(out)) == (
        0,
        [{"path": str(path), "at": 14, "num_bytes": 12, "original": str(path.with_suffix(".damaged"))}],
    )
