"""Adaptations as spans, from what is told of them."""

from __future__ import annotations

import pytest

from esper.leyline.alerts import Alert, AlertKind
from esper.leyline.kernels import SiteKind, SiteSignature
from esper.leyline.native import Rung, RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Evidence, EvidenceKind, FieldReport, LifecycleEvent, Outcome, RunStarted
from esper.nissa.spans import MAX_WAYS, Spans

RUN, TRACE = "run-1", "c0ffee" + "0" * 25 + "1"
S = SeedStage
LIFE = [S.DORMANT, S.GERMINATED, S.TRAINING, S.GRAFTING, S.STABILIZING, S.EVALUATING, S.FINE_TUNING, S.FOSSILIZED]


def moved(before, after, at, *, trace=TRACE, refused=False, evidence=None, site="a.b", run=RUN):
    return LifecycleEvent(
        run_id=run, step=int(at), epoch=1, site=site, seed="s0", from_stage=before, to_stage=after, refused=refused,
        blueprint="se" if after is not S.GERMINATED else None, kernel_id="k1" if after is S.TRAINING else None,
        evidence=evidence, reason=f"to {after.value}", trace_id=trace, timestamp=at,
    )  # fmt: skip


def rung(at, which=Rung.NATIVE):
    return RungChange(
        run_id=RUN, step=int(at), epoch=1, site="a.b", seed="s0", rung=which, reason="1.4 times as fast",
        trace_id=TRACE, timestamp=at,
    )  # fmt: skip


def alert(alert_id="x", *, site=None, run=RUN, since=2.5, **over):
    return Alert(
        alert_id=alert_id, kind=AlertKind.LOSS_SPIKE, run_id=run, site=site, since=since, updated_at=since,
        summary="spike", evidence="9 deviations", detector="z", command="esper runs show run-1", **over,
    )  # fmt: skip


def through(*bodies):
    spans = Spans()
    return [span for body in bodies for span in spans.take(body, getattr(body, "timestamp", 99.0))]


def life(until=S.FOSSILIZED):
    last = LIFE.index(until)
    return [moved(*LIFE[i : i + 2], float(i + 1)) for i in range(last)]


def test_a_root_with_a_child_for_each_stage():
    *children, root = through(*life())
    assert (root.name, root.trace_id, root.parent_id, root.start, root.end) == ("adaptation", TRACE, None, 1.0, 7.0)
    assert [(c.name, c.start, c.end) for c in children] == [
        (stage.value.lower(), float(i + 1), float(i + 2)) for i, stage in enumerate(LIFE[1:-1])
    ]
    assert {c.parent_id for c in children} == {root.span_id}
    assert {c.trace_id for c in children} == {TRACE}
    assert len({c.span_id for c in children} | {root.span_id}) == 7
    assert root.attributes["esper.outcome"] == "fossilized"
    assert (root.attributes["esper.site"], root.attributes["esper.blueprint"]) == ("a.b", "se")
    assert root.attributes["esper.kernel_id"] == "k1"
    training = children[1]
    assert training.attributes["esper.begun_because"] == "to TRAINING"
    assert training.attributes["esper.ended_because"] == "to GRAFTING"
    assert root.error is None


def test_a_refusal_is_an_event_of_its_stage_and_of_the_whole_with_its_evidence():
    evidence = Evidence(kind=EvidenceKind.SHADOW, gain=-0.1, stderr=0.2, num_pairs=7)
    refused = moved(S.TRAINING, S.GRAFTING, 2.5, refused=True, evidence=evidence)
    spans = through(*life(S.TRAINING), refused, moved(S.TRAINING, S.CULLED, 3.0))
    training, root = spans[1:]
    [event] = training.events
    assert (event.name, event.at, event.attributes["esper.evidence.gain"]) == ("refused", 2.5, -0.1)
    assert list(root.events) == [event]
    assert root.attributes["esper.outcome"] == "culled"
    assert root.error is None  # it went as it should


def test_a_rollback_is_an_error():
    *_, grafting, root = through(*life(S.GRAFTING), moved(S.GRAFTING, S.ROLLED_BACK, 9.0))
    assert grafting.error == root.error == "to ROLLED_BACK"
    assert [event.name for event in root.events] == ["rolled_back"]


def test_native_code_is_an_event_and_after_the_end_a_span_of_no_length():
    *_, root, late = through(*life(S.GRAFTING), rung(3.5), *life()[3:], rung(30.0, Rung.IR))
    assert [(event.name, event.at) for event in root.events] == [("native_code", 3.5)]
    assert (late.name, late.parent_id, late.start, late.end) == ("back_to_ir", root.span_id, 30.0, 30.0)


def test_an_alert_is_an_event_of_what_is_under_way_at_its_place_once():
    other = moved(S.DORMANT, S.GERMINATED, 1.0, trace="d" * 32, run="run-2")
    told = [alert(), alert(), alert("y", site="elsewhere"), alert("z", site="a.b"), alert(ended_at=2.8, ending="calm")]
    spans = through(other, *life(S.TRAINING), *told, moved(S.TRAINING, S.CULLED, 3.0))
    events = [(event.name, event.attributes["esper.alert_id"]) for event in spans[-1].events]
    assert events == [("alert.loss_spike", "x"), ("alert.loss_spike", "z"), ("alert.loss_spike.over", "x")]
    assert spans[-1].events[0].attributes["esper.command"] == "esper runs show run-1"
    assert spans[-1].events[2].attributes["esper.ending"] == "calm"


def test_a_run_that_is_resumed_tells_its_last_epochs_again_as_the_same_spans():
    resumed = RunStarted(
        run_id=RUN, task="classification", num_epochs=9, sites={}, params=1, directory="d", resumed_from_epoch=2
    )
    spans = through(*life(S.STABILIZING), resumed, moved(S.TRAINING, S.GRAFTING, 13.0), *life()[3:])
    first, again = (span for span in spans if span.name == "grafting")
    assert (first.span_id, first.start) == (again.span_id, 3.0)
    assert again.start == 13.0
    assert [event.name for event in spans[-1].events] == ["run_resumed"]
    assert (spans[-1].name, spans[-1].start) == ("adaptation", 1.0)


def test_what_its_run_left_unfinished_ends_with_its_report():
    report = FieldReport(
        run_id=RUN, trace_id=TRACE, site="a.b", seed_id="s0", blueprint_id="b", blueprint="se", kernel_id="k1",
        signature=SiteSignature(kind=SiteKind.VECTOR, channels=4), outcome=Outcome.UNFINISHED, failure_reason="the end",
    )  # fmt: skip
    *_, training, root = through(*life(S.TRAINING), report)
    assert (training.name, training.end, root.end) == ("training", 99.0, 99.0)
    assert (root.attributes["esper.outcome"], root.attributes["esper.reason"]) == ("unfinished", "the end")
    assert through(*life(), report)[-1].attributes["esper.outcome"] == "fossilized"


@pytest.mark.parametrize("odd", ["short", "0" * 32, "UPPER" * 6 + "AB", "x" * 32])
def test_a_trace_id_that_is_none_of_opentelemetrys_gives_one(odd):
    [_, root] = through(
        moved(S.DORMANT, S.GERMINATED, 1.0, trace=odd), moved(S.GERMINATED, S.CANCELLED, 2.0, trace=odd)
    )
    assert len(root.trace_id) == 32
    assert int(root.trace_id, 16) > 0
    assert root.attributes["esper.trace_id"] == odd


def test_what_no_adaptation_goes_by_makes_no_span_and_memory_is_bounded():
    assert through(moved(S.DORMANT, S.GERMINATED, 1.0, trace=""), rung(1.0), alert()) == []
    assert through(moved(S.DORMANT, S.GERMINATED, 1.0, refused=True)) == []
    assert through(moved(S.CULLED, S.DORMANT, 1.0)) == []
    spans = Spans()
    for number in range(MAX_WAYS + 1):
        spans.take(moved(S.DORMANT, S.GERMINATED, 1.0, trace=f"{number + 1:032x}"), 1.0)
    spans.take(rung(2.0), 2.0)
    [root] = spans.take(moved(S.GERMINATED, S.CANCELLED, 2.0, trace=f"{1:032x}"), 2.0)[-1:]
    assert root.start == 2.0  # the first is forgotten


def test_a_stage_whose_beginning_is_not_kept_makes_no_span_and_the_root_says_so():
    """The bus lets old messages go; a Nissa that starts anew reads what is left."""
    whole = through(*life())
    *children, root = through(*life()[3:])
    assert [child.name for child in children] == [stage.value.lower() for stage in LIFE[4:-1]]
    known = {span.span_id: span for span in whole}
    for child in children:  # the same spans as those of a Nissa that saw it all
        assert (child.start, child.end) == (known[child.span_id].start, known[child.span_id].end)
        assert child.attributes["esper.beginning_lost"]
    assert root.attributes["esper.beginning_lost"] is True
    assert (root.span_id, root.start, root.end) == (whole[-1].span_id, 4.0, 7.0)
    assert "esper.beginning_lost" not in whole[-1].attributes
    [only] = through(moved(S.TRAINING, S.CULLED, 5.0))
    assert (only.name, only.start, only.end, only.attributes["esper.outcome"]) == ("adaptation", 5.0, 5.0, "culled")
