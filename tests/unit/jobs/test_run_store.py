"""Runs are found, listed and reported from what lies in a folder."""

from __future__ import annotations

import os

import nissa_story as story
import pytest
from typer.testing import CliRunner

from esper.leyline import RunStatus, RunSummary, StorageError
from esper.leyline.errors import UserError
from esper.nissa.live import Live
from esper.nissa.replay import dump
from jobs.cli import app
from jobs.runs import RunStore, UnknownRunError, list_table

OLDER, NEWER = "digits-20261119-aaaa", "digits-20261120-bbbb"


def lay_down(root, run, *, at, **changes):
    """A run as the trainer leaves it, last written `at` (seconds)."""
    folder = root / "runs" / run
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(story.summary(run_id=run, **changes).model_dump_json())
    (folder / "history.json").write_text(story.history().model_dump_json())
    (folder / "config.yaml").write_text(f"seed: {at}\n")
    os.utime(folder / "summary.json", (at, at))
    return folder


@pytest.fixture
def store(tmp_path):
    # the names say the opposite of the times: it is the times that count
    lay_down(tmp_path, OLDER, at=2_000)
    lay_down(tmp_path, NEWER, at=1_000, status=RunStatus.FAILED)
    return RunStore(str(tmp_path))


def test_the_last_written_run_comes_first(store):
    assert store.ids() == [OLDER, NEWER]
    assert store.resolve("latest") == OLDER


def test_the_beginning_of_an_id_is_enough_where_it_is_the_only_one(store):
    assert store.resolve(NEWER) == NEWER
    assert store.resolve("digits-20261120") == NEWER
    with pytest.raises(UnknownRunError, match=f"could be any of {OLDER}, {NEWER}"):
        store.resolve("digits-")


def test_a_whole_id_wins_over_ids_that_begin_with_it(store, tmp_path):
    lay_down(tmp_path, f"{OLDER}-again", at=3_000)
    assert store.resolve(OLDER) == OLDER


@pytest.mark.parametrize("name", ["absent", "latest"])
def test_a_run_that_is_not_there_is_the_users_error(tmp_path, name):
    with pytest.raises(UnknownRunError, match="no run") as caught:
        RunStore(str(tmp_path)).resolve(name)
    assert isinstance(caught.value, UserError)


def test_what_was_written_is_read_back(store, tmp_path):
    written = (tmp_path / "runs" / NEWER / "summary.json").read_text()
    assert store.summary(NEWER) == RunSummary.model_validate_json(written)
    assert store.summary(NEWER).status is RunStatus.FAILED
    assert store.history("latest") == story.history()
    assert store.config_text("latest") == "seed: 2000\n"
    assert store.directory("latest") == str(tmp_path / "runs" / OLDER)


def test_a_missing_file_is_named(store, tmp_path):
    (tmp_path / "runs" / OLDER / "history.json").unlink()
    with pytest.raises(UnknownRunError, match=r"history\.json"):
        store.history(OLDER)


def test_rows_hold_what_a_list_shows(store):
    first, second = store.rows()
    summary = story.summary()
    assert (first["run_id"], first["status"], second["status"]) == (OLDER, summary.status.value, "failed")
    assert first["started"] == "2026-09-21 14:13:20+00:00"
    assert (first["params_start"], first["params_final"]) == (summary.params.start, summary.params.final)
    assert first["fossils"] == 1
    assert first["val_accuracy"] == summary.metrics.val_accuracy


def test_an_unreadable_summary_is_listed_as_such(store, tmp_path):
    (tmp_path / "runs" / OLDER / "summary.json").write_text('{"run_id": 3}')
    rows = {row["run_id"]: row for row in store.rows()}
    assert rows[OLDER]["status"].startswith("unreadable summary")
    assert rows[NEWER]["status"] == "failed"
    table = list_table(list(rows.values()))
    assert "unreadable summary" in table
    assert OLDER in table


def test_the_table_shows_each_run_on_a_line(store):
    header, *lines = list_table(store.rows()).splitlines()
    assert header.split()[0] == "run"
    assert [line.split()[0] for line in lines] == [OLDER, NEWER]
    assert f"{story.summary().params.start:,} -> {story.summary().params.final:,}" in lines[0]


def test_an_empty_storage_says_how_to_begin(tmp_path):
    store = RunStore(str(tmp_path / "nothing"))
    assert store.ids() == []
    assert "esper train" in list_table(store.rows())


def test_a_run_that_was_stopped_before_it_trained_is_listed_and_says_so(store, tmp_path):
    (tmp_path / "runs" / "early").mkdir()
    (tmp_path / "runs" / "early" / "config.yaml").write_text("seed: 1\n")
    assert "early" in store.ids()
    (line,) = [line for line in list_table(store.rows()).splitlines() if line.startswith("early")]
    assert "has not trained" in line
    with pytest.raises(UnknownRunError, match="has not trained"):
        store.summary("early")


def test_a_report_lies_beside_the_run_or_where_it_is_wanted(store, tmp_path):
    assert store.write_report("latest") == str(tmp_path / "runs" / OLDER / "report.html")
    wanted = tmp_path / "elsewhere.html"
    assert store.write_report(NEWER, wanted) == str(wanted)
    assert NEWER in wanted.read_text(encoding="utf-8")


def test_the_home_folder_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lay_down(tmp_path / "esper", OLDER, at=1_000)
    assert RunStore("~/esper").ids() == [OLDER]


def test_an_address_that_nothing_reads_is_refused():
    with pytest.raises(StorageError, match="unknown scheme in carrier-pigeon"):
        RunStore("carrier-pigeon://loft")


def test_alerts_of_a_run_that_ended_before_they_were_counted_in_come_from_its_last_picture(tmp_path):
    folder = lay_down(tmp_path, OLDER, at=1_000, status=RunStatus.INTERRUPTED)
    live, store = Live(), RunStore(str(tmp_path))
    assert store.whole_summary(OLDER).alerts == ()
    alert = story.alert(run_id=OLDER)
    live.apply(story.told(alert))
    (folder / "view.json").write_bytes(dump(live.view(OLDER)))
    assert store.whole_summary(OLDER).alerts == (alert,)
    assert store.told(OLDER).view.open_alerts == (alert,)
    said = CliRunner().invoke(app, ["runs", "show", OLDER, "--storage", str(tmp_path)]).stdout
    assert "the loss jumped" in said
    assert alert.command in said
    counted = alert.model_copy(update={"count": 8})
    (folder / "summary.json").write_text(story.summary(run_id=OLDER, alerts=(counted,)).model_dump_json())
    assert store.whole_summary(OLDER).alerts == (counted,)
