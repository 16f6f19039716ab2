"""Runs side by side, and their metrics in the files of other tools."""

from __future__ import annotations

import re
import struct
import sys

import nissa_story as story
import pytest
from test_live_page import lay_down

from esper.leyline.errors import ConfigError, NotFoundError
from esper.leyline.summary import Params
from esper.nissa import compare, export
from esper.nissa.runs import RunStore

OTHER = "digits-20261121-other"


@pytest.fixture
def store(tmp_path):
    lay_down(tmp_path)
    folder = tmp_path / "runs" / OTHER
    folder.mkdir()
    summary = story.summary(
        run_id=OTHER, params=Params(start=1_434, final=1_434), events=(), rungs=(), field_reports=()
    )
    epochs = tuple(
        record.model_copy(update={"run_id": OTHER, "params": 1_434}) for record in story.history().epochs[:20]
    )
    (folder / "summary.json").write_text(summary.model_dump_json())
    (folder / "history.json").write_text(
        story.history().model_copy(update={"run_id": OTHER, "epochs": epochs}).model_dump_json()
    )
    return RunStore(str(tmp_path))


def test_runs_are_laid_side_by_side(store, tmp_path):
    runs = compare.gather(store, [OTHER, story.RUN])
    assert [run.summary.run_id for run in runs] == [OTHER, story.RUN]
    rows = dict(compare.rows(runs))
    assert rows["params final"] == ["1,434", "2,666"]
    assert rows["kept"] == ["0", "1"]
    assert rows["test accuracy"] == ["88.1%", "88.1%"]
    assert rows["epochs"] == ["20", "30"]
    assert rows["policy"] == ["—", "heuristic"]  # the first left no picture of its end
    assert [one["params_final"] for one in compare.figures(runs)] == [1_434, 2_666]
    text = compare.table(runs)
    assert OTHER in text
    assert re.search(r"kept\s+0\s+1$", text, re.MULTILINE)
    page = compare.write(runs, tmp_path / "c.html").read_text()
    assert page.count("<figure") == 4
    assert page.count('class="line run-0"') == page.count('class="line run-1"') == 4
    assert "<script" not in page
    assert not re.search(r"https?://|url\(", page)


def test_what_cannot_be_compared_is_refused(store):
    for names, what in (([OTHER], "1 runs"), ([OTHER, OTHER], "twice"), ([OTHER] * 7, "7 runs")):
        with pytest.raises(ConfigError, match=what):
            compare.gather(store, names)
    with pytest.raises(NotFoundError):
        compare.gather(store, [OTHER, "absent"])


def test_tensorboard_reads_every_epoch_and_transition(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    folder = export.to_tensorboard(story.summary(), story.history(), {"seed": 7}, tmp_path)
    assert folder == tmp_path / story.RUN
    [path] = folder.iterdir()
    data, scalars, texts = path.read_bytes(), {}, []
    while data:  # length, its checksum, the event, its checksum
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
            else:
                texts.append((event.step, value.tensor.string_val[0].decode()))
    for record in story.history().epochs:
        assert scalars["val_accuracy"][record.step] == pytest.approx(record.val_metric)
        assert scalars["params"][record.step] == record.params
    assert scalars["test_accuracy"] == {story.EPOCHS * story.STEPS: pytest.approx(0.881)}
    assert len(texts) == len(story.events()) + 1
    assert any(step == 374 and "FINE_TUNING to FOSSILIZED" in text for step, text in texts)
    with pytest.raises(ConfigError, match="doubled"):
        export.to_tensorboard(story.summary(), story.history(), {}, tmp_path)


@pytest.mark.parametrize("name", ["tensorboardX", "mlflow"])
def test_a_tool_that_is_not_installed_is_named_with_its_remedy(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    calls = {
        "mlflow": lambda *run: export.to_mlflow(*run, uri=None, experiment="e"),
        "tensorboardX": lambda *run: export.to_tensorboard(*run, tmp_path),
    }
    with pytest.raises(ConfigError, match="not installed") as caught:
        calls[name](story.summary(), story.history(), {})
    assert caught.value.remedy.startswith(f"pip install {name}")


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_has_the_run_once_with_all_its_figures(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match="MLflow refuses"):  # it wants a database or a server by now
        export.to_mlflow(story.summary(), story.history(), {"seed": 7}, uri=uri, experiment="e")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = export.to_mlflow(story.summary(), story.history(), {"seed": 7}, uri=uri, experiment="e")
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_run(run)
    assert found.data.params == {"seed": "7"}
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(run, "val_accuracy")
    assert [(m.step, m.value) for m in history] == [(r.step, r.val_metric) for r in story.history().epochs]
    with pytest.raises(ConfigError, match="already"):
        export.to_mlflow(story.summary(), story.history(), {}, uri=uri, experiment="e")


def test_a_configuration_is_flattened():
    assert export.flat({"a": {"b": {"c": 1}, "d": {}}, "e": [2]}) == {"a.b.c": 1, "a.d": {}, "e": [2]}
