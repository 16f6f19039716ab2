"""`esper trace`: the way of an adaptation of a real run, told from its files."""

from __future__ import annotations

import json
import logging

import pytest
from tolaria_support import BLUEPRINT, SITE, config, kernel_hub, train
from typer.testing import CliRunner

from esper.leyline import Action, Gate, RunHistory, SeedStage
from esper.leyline.messages import Topic
from esper.nissa.trace import traces, way_of
from esper.oona.memory import MemoryBus
from esper.tamiyo.controller import LocalController
from jobs.cli import app
from jobs.trace import told


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A storage with one run that grew one kernel; its summary and history."""
    storage = tmp_path_factory.mktemp("storage")
    folder = storage / "runs" / "grown"
    summary, _ = train(folder, config(), run_id="grown")
    return storage, summary, RunHistory.model_validate_json((folder / "history.json").read_bytes())


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_one_id_goes_from_what_was_seen_to_the_end(ran):
    _, summary, history = ran
    [trace_id] = traces(summary)
    hub, _ = kernel_hub()
    kernel = hub.kernel(summary.field_reports[0].kernel_id)
    way = way_of(trace_id, summary, history, kernel)
    assert [stop.at for stop in way.stops] == sorted(stop.at for stop in way.stops)
    assert (way.site, way.blueprint, way.kernel_id) == (SITE, BLUEPRINT, kernel.kernel_id)
    systems = [stop.system for stop in way.stops]
    assert systems[:3] == ["Tezzeret", "Tamiyo", "Kasmina"]
    assert systems[-1] == "Tolaria"
    assert "seen of 3: health" in way.stops[1].why
    whats = [stop.what for stop in way.stops]
    assert whats[1] == "chosen by schedule"
    assert whats[2] == "dormant to germinated"
    assert whats[-2].endswith(" to fossilized")
    assert whats[-1] == "reported as fossilized"
    assert any("shadow" in stop.why and "gain" in stop.why for stop in way.stops)
    assert {event.trace_id for event in summary.events if event.to_stage is not SeedStage.DORMANT} == {trace_id}
    assert summary.field_reports[0].trace_id == trace_id
    text = told(way)
    assert text.startswith(f"trace {trace_id}: {BLUEPRINT} at {SITE}")
    assert "+0.00 s  step 3" in text


def test_the_command_takes_an_id_a_beginning_of_one_or_a_run(ran):
    storage, summary, _ = ran
    [trace_id] = traces(summary)
    for name in (trace_id, trace_id[:6], "grown", "latest"):
        result = invoke("trace", name, "--storage", storage)
        assert result.exit_code == 0, result.output
        assert "to fossilized" in result.output
    [way] = json.loads(invoke("trace", trace_id, "--storage", storage, "--json").stdout)
    assert way["trace_id"] == trace_id
    assert way["stops"][0]["system"] == "Tamiyo"  # no catalogue lies here
    assert Action.GERMINATE not in way["stops"][0]["what"]


class Watchful(LocalController):
    """Takes the governor for worried in two epochs, as after a rollback amid a step."""

    def decide(self, state, packet):
        worried = packet.epoch.epoch in {2, 3}
        return super().decide(state, packet.model_copy(update={"governor": "a spike"}) if worried else packet)


def test_vetoes_stand_in_the_summary_and_on_the_way(tmp_path):
    """A seed that has proven itself may not join the host while the governor worries: said once, and how often."""
    summary, _ = train(tmp_path / "run", config(), controller=Watchful(config().tamiyo, seed=0))
    [record] = summary.vetoes
    [trace_id] = traces(summary)
    assert (record.trace_id, record.policy, record.veto.gate) == (trace_id, "schedule", Gate.GOVERNOR)
    assert (record.epoch, record.last_epoch, record.num) == (2, 3, 2)
    assert record.veto.in_words == (
        f"advance {SITE}/s0: the governor reports a spike: nothing new joins the host or becomes permanent"
    )
    history = RunHistory.model_validate_json((tmp_path / "run" / "history.json").read_bytes())
    assert f"vetoed: {record.veto.in_words}" in dict(history.decisions)[2]
    [stop] = [stop for stop in way_of(trace_id, summary, history).stops if stop.what.startswith("vetoed")]
    assert stop.what == "vetoed by the governor gate (2 times, until epoch 3)"
    assert stop.why == f"schedule: {record.veto.in_words}"
    assert (tmp_path / "run" / "summary.json").read_text().count('"gate": "governor"') == 1


def test_messages_and_lines_of_the_log_carry_it(tmp_path, caplog):
    bus = MemoryBus()
    logging.getLogger("esper").addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "esper")
    try:
        summary, _ = train(tmp_path / "run", config(), bus=bus)
        subscription = bus.subscribe((Topic.LIFECYCLE, Topic.FIELD_REPORTS), group="test", from_start=True)
        told = [delivery.message for delivery in subscription.poll(max_messages=512, timeout_s=5.0)]
    finally:
        logging.getLogger("esper").removeHandler(caplog.handler)
        bus.close()
    [trace_id] = traces(summary)
    assert {message.topic for message in told} == {Topic.LIFECYCLE, Topic.FIELD_REPORTS}
    assert {message.trace_id for message in told if message.payload["trace_id"]} == {trace_id}
    lines = {record.message: vars(record) for record in caplog.records}
    assert lines["seed.fossilized"]["trace"] == lines["seed.germinated"]["trace"] == trace_id
    assert {"run", "site", "seed", "step", "reason"} <= lines["seed.fossilized"].keys()


def test_an_id_that_nobody_knows_is_refused(ran):
    storage, *_ = ran
    result = invoke("trace", "zz", "--storage", storage)
    assert result.exit_code != 0
    assert "no adaptation has the trace id 'zz'" in str(result.exception)
