"""`kill -9` of Urza under eight clients, on a directory and on a real S3 server: nothing acknowledged is lost.

`make test` runs a few fixed plans; `make soak` runs fifty on each storage. A soak keeps its results below
`ESPER_SOAK_DIR` (default: `.soak`) and goes on there if it was stopped; delete the folder to begin again.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

import pytest
import ray
import rgw
import table_reader
import urza_clients
import urza_kills
from urza_kills import KillWhenArmed, Plan

from actors.cluster import NAMESPACE, disconnect
from esper.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

for module in (table_reader, urza_clients, urza_kills):
    ray.cloudpickle.register_pickle_by_value(module)  # workers know no folder of tests

NUM_PLANS = 50
FIXED = {4: "committed", 2: "stored", 7: "compacted"}
"""Killed after a commit and before its answer; between a blob and its record; after a compaction. On both storages."""


@pytest.fixture(scope="module", autouse=True)
def kills_cluster():
    ray.init(
        address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    disconnect()


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory):
    """The `storage_options` of a real S3 server with one bucket, `bucket`."""
    if missing := rgw.missing():
        pytest.skip(f"no S3 server: {', '.join(missing)} not installed (Debian: radosgw ceph-mon ceph-osd)")
    with rgw.serve(tmp_path_factory.mktemp("s3") / "ceph") as options:
        Storage.at("s3://bucket", options).fs.mkdir("bucket")
        yield options


def test_killed_on_a_directory_nothing_acknowledged_is_lost(tmp_path):
    rows = urza_kills.soak(lambda name: Storage.at(tmp_path / name), tmp_path / "soak", list(FIXED), print)
    assert {row.plan: row.place for row in rows} == FIXED


def test_killed_on_s3_nothing_acknowledged_is_lost(s3_server, tmp_path):
    rows = urza_kills.soak(lambda name: _on_s3(s3_server, name), tmp_path / "soak", list(FIXED), print)
    assert {row.plan: row.place for row in rows} == FIXED


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_fifty_kills(kind, tmp_path, capsys, request):
    folder = Path(os.environ.get("ESPER_SOAK_DIR", ".soak")).resolve() / f"urza-{kind}"
    options = request.getfixturevalue("s3_server") if kind == "s3" else None

    def storage_of(name):
        return _on_s3(options, name) if options else Storage.at(tmp_path / name)

    def say(line):
        with capsys.disabled():
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    rows = urza_kills.soak(storage_of, folder, range(NUM_PLANS), say)
    assert sorted(row.plan for row in rows) == list(range(NUM_PLANS))
    assert sum(row.kills for row in rows) == NUM_PLANS + sum(Plan.drawn(row.plan).again for row in rows)


def _on_s3(options, name):
    return Storage.at(f"s3://bucket/{name}-{uuid.uuid4().hex[:8]}", options)


def test_an_armed_place_is_deadly_once(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(urza_kills.os, "kill", lambda pid, number: killed.append((pid, number)))
    faults = KillWhenArmed(tmp_path)
    faults.at("stored", 1)
    faults.arm("stored")
    faults.at("committed", 2)
    assert killed == []
    faults.at("stored", 3)
    faults.at("stored", 4)
    assert killed == [(os.getpid(), 9)]
    assert faults.fired("stored") == {os.getpid()}


def test_a_loss_would_be_seen():
    """The checks of the soak, on logs that are not whole."""
    body = '{"metadata": {"num_targets": 1}, "kernel_id": "k"}'

    def row(seq, kind, id_, epoch=1):
        return {"seq": seq, "epoch": epoch, "time": 0.0, "kind": kind, "id": id_, "body": body}

    whole = [row(1, "epoch", "1"), row(2, "kernel.stored", "k"), row(3, "target.compiled", "j")]
    table_reader.Log().take(whole)
    for broken in (whole[:2], whole[:1] + whole[2:], [*whole, row(4, "blueprint.submitted", "b")],
                   [*whole, row(4, "epoch", "0", epoch=0)]):  # fmt: skip
        with pytest.raises(table_reader.NotWholeError):
            table_reader.Log().take(broken)
    log = table_reader.Log()
    log.take(whole)
    for later in (whole[:1], [*whole[:2], row(3, "target.compiled", "other")]):
        with pytest.raises(table_reader.NotWholeError):
            log.take(later)
