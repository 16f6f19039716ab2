"""The fold: what it makes of a run, and that redelivery, disorder and size change nothing."""

from __future__ import annotations

import pickle
import random

import nissa_story as story
import pytest
from pydantic import ValidationError

from esper.leyline.alerts import AlertKind
from esper.leyline.messages import OonaMessage, Topic
from esper.leyline.native import Rung
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import AdaptationSignal, EpochRecord, EvidenceKind, Outcome, Severity, StepBatch
from esper.nissa.live import Live
from esper.nissa.viewmodel import NUM_ALERTS, NUM_NOTES, NUM_POINTS, LiveView, Tone


def fold(messages) -> LiveView:
    live = Live()
    for message in messages:
        live.apply(message)
    view = live.view(story.RUN)
    assert view is not None
    return view


def test_a_whole_run_ends_as_it_was():
    view = fold(story.messages())
    assert view.is_done
    assert view.progress == 1.0
    assert view.seconds_left(view.updated_at) == 0.0
    assert view.step == story.EPOCHS * story.STEPS
    assert view.params == story.START_PARAMS + story.GAINED
    assert (view.kernels_ready, view.kernels_pending) == (21, 0)
    assert view.outcomes == {Outcome.CULLED: 1, Outcome.FOSSILIZED: 1}
    seeds = {seed.site: seed for seed in view.seeds.values()}
    assert set(seeds) == set(story.SITES)
    assert seeds["stages.1"].stage is SeedStage.FOSSILIZED
    assert seeds["stages.1"].alpha == 1.0
    assert seeds["stages.1"].blueprint == story.WINNER
    assert seeds["stages.0"].stage is SeedStage.DORMANT


def test_evidence_of_worth_is_not_replaced_by_a_later_harm_check():
    seed = next(s for s in fold(story.messages()).seeds.values() if s.site == "stages.1")
    assert seed.evidence is not None
    assert seed.evidence.kind is EvidenceKind.SHADOW


def test_every_transition_is_one_note_with_its_reason_and_waits_are_none():
    view = fold(story.messages())
    [rung] = story.rungs()  # the last thing that happens
    assert [note.reason for note in view.notes] == [e.reason for e in story.events_by_epoch()] + [rung.reason]
    assert view.decision.startswith("wait")
    tones = {note.text.rsplit(" ", 1)[-1]: note.tone for note in view.notes}
    assert tones["fossilized"] is Tone.GOOD
    assert tones["culled"] is Tone.WARNING


def test_what_a_kernel_runs_from_is_a_note_and_stands_beside_its_seed():
    view = fold(story.messages())
    assert view.notes[-1].text == f"{story.WINNER} runs from its native code"
    assert {seed.site: seed.rung for seed in view.seeds.values()}["stages.1"] is Rung.NATIVE
    assert all(seed.rung is None for seed in fold(story.messages(22)).seeds.values())


def test_redelivery_changes_nothing():
    messages = story.messages(20)
    once = fold(messages)
    rng = random.Random(1)
    live = Live()
    for i, message in enumerate(messages):
        assert live.apply(message)
        assert not live.apply(messages[rng.randrange(i + 1)])
    assert live.view(story.RUN) == once
    assert [live.apply(message) for message in messages] == [False] * len(messages)
    assert live.view(story.RUN) == once


@pytest.mark.parametrize("seed", range(5))
def test_topics_that_overtake_each_other_end_the_same(seed):
    """Order holds within a topic only: any merge of the topics must show the same state in the end."""
    messages = story.messages()
    queues = {topic: [m for m in messages if m.topic is topic] for topic in Topic}
    rng = random.Random(seed)
    merged = []
    while any(queues.values()):
        merged.append(queues[rng.choice([topic for topic, queue in queues.items() if queue])].pop(0))
    view, straight = fold(merged), fold(messages)
    for name in ("epochs_done", "step", "params", "points", "best", "outcomes", "sites", "task", "num_notes"):
        assert getattr(view, name) == getattr(straight, name), name
    assert {k: (s.stage, s.blueprint, s.evidence) for k, s in view.seeds.items()} == {
        k: (s.stage, s.blueprint, s.evidence) for k, s in straight.seeds.items()
    }


def test_kernels_are_counted_before_the_first_epoch_ends_and_before_the_run_is_heard_of():
    messages = story.messages(0)
    kernels = [m for m in messages if m.topic in {Topic.BLUEPRINT_SUBMITTED, Topic.KERNEL_READY}]
    started = [m for m in messages if m.topic is Topic.RUN_STARTED]
    for order in (started + kernels, kernels + started):
        view = fold(order)
        assert (view.kernels_ready, view.kernels_pending) == (3, 3)


def test_a_resumed_run_replaces_the_epochs_that_come_again():
    message = OonaMessage.of(Topic.RUN_STARTED, story.run_started(resumed_from=4), sender_id="t", key=story.RUN)
    message = message.model_copy(update={"timestamp": story.STARTED + 100.0})
    again = [
        m.model_copy(update={"event_id": f"again-{m.event_id}", "timestamp": m.timestamp + 90.0})
        for m in story.messages(5)
        if (m.topic in {Topic.EPOCH, Topic.SEED_HEALTH} and m.payload["epoch"] >= 4)
        or (m.topic is Topic.STEPS and m.payload["first_step"] >= 4 * story.STEPS)
    ]
    view = fold([*story.messages(9), message, *again])
    assert [point.epoch for point in view.points] == [0, 1, 2, 3, 4, 5]
    assert view.epochs_done == 6
    assert view.step == 6 * story.STEPS
    assert view.best == view.points[-1]
    # germinated in epoch 5, which had not come again yet when the report of its end was taken
    assert all(seed.stage is SeedStage.DORMANT for seed in view.seeds.values())
    assert view.notes[-1].text == "the run was resumed from epoch 4"


def test_time_left_follows_the_pace_of_the_last_epochs():
    view = fold(story.messages(9))
    assert view.seconds_left(view.updated_at) == pytest.approx(20 * 3.1, rel=0.02)
    assert view.seconds_left(view.updated_at + 10) == pytest.approx(20 * 3.1 - 10, rel=0.02)
    assert fold(story.messages(0)[:1]).seconds_left(story.STARTED) is None


def test_a_grave_decision_is_a_note():
    signal = AdaptationSignal(
        run_id=story.RUN, epoch=3, policy="heuristic", severity=Severity.CRITICAL, reason="the loss exploded"
    )
    view = fold([OonaMessage.of(Topic.KASMINA_COMMANDS, signal, sender_id="tamiyo", key=story.RUN)])
    assert view.notes[0].tone is Tone.BAD
    assert view.notes[0].reason == "the loss exploded"


def test_a_payload_that_is_not_its_contract_is_refused_and_changes_nothing():
    live = Live()
    for message in story.messages(3):
        live.apply(message)
    before = live.view(story.RUN)
    bad = OonaMessage(sender_id="x", trace_id="t", topic=Topic.EPOCH, key=story.RUN, payload={"epoch": "four"})
    with pytest.raises(ValidationError):
        live.apply(bad)
    assert live.view(story.RUN) == before


def test_a_view_stays_small_and_pickles():
    live = Live()
    for epoch in range(500):
        record = story.epoch_record(5).model_copy(update={"epoch": epoch, "num_epochs": 5_000})
        steps = StepBatch(run_id=story.RUN, first_step=epoch, losses=(1.0,), milliseconds=(1.0,))
        event = story.events()[0].model_copy(update={"epoch": epoch, "step": epoch})
        for topic, body in ((Topic.EPOCH, record), (Topic.STEPS, steps), (Topic.LIFECYCLE, event)):
            live.apply(OonaMessage.of(topic, body, sender_id="t", key=story.RUN))
    view = live.view(story.RUN)
    assert view is not None
    assert (len(view.points), len(view.notes), view.num_notes) == (NUM_POINTS, NUM_NOTES, 500)
    data = pickle.dumps(view)
    assert len(data) < 64_000
    assert pickle.loads(data) == view


def test_old_runs_are_forgotten():
    live = Live(max_runs=2)
    for name in ("a", "b", "c"):
        record = EpochRecord(run_id=name, epoch=0, num_epochs=1, step=1, train_loss=1.0)
        live.apply(OonaMessage.of(Topic.EPOCH, record, sender_id="t", key=name))
    assert live.run_ids() == ("b", "c")
    assert live.view("a") is None


def test_an_alert_is_told_once_at_its_begin_and_once_at_its_end():
    grown = story.alert(count=7, updated_at=story.STARTED + 9.9)
    ended = grown.model_copy(update={"ended_at": story.STARTED + 10, "ended_step": 60, "ending": "as before"})
    late = story.told(grown, 3)
    view = fold([*story.messages(2), *(story.told(body, i) for i, body in enumerate((story.alert(), grown)))])
    assert view.open_alerts == (grown,)
    assert view.num_alerts == {AlertKind.LOSS_SPIKE: 1}
    assert [(note.subject, note.text, note.tone) for note in view.notes[-1:]] == [
        (story.RUN, "the loss jumped", Tone.WARNING)
    ]
    view = fold([*story.messages(2), story.told(story.alert()), story.told(ended, 2), late])
    assert (view.open_alerts, view.alerts["a1"]) == ((), ended)
    assert [(note.text, note.reason) for note in view.notes[-2:]] == [
        ("the loss jumped", story.alert().evidence),
        ("the loss jumped: over", "as before"),
    ]


def test_an_alert_of_the_platform_is_seen_with_every_run_it_may_trouble():
    lag = story.alert(alert_id="lag", kind=AlertKind.BUS_LAG, run_id="", group="slow", since_step=None)
    live = Live()
    other = EpochRecord(run_id="other", epoch=0, num_epochs=2, step=1, train_loss=1.0)
    done = other.model_copy(update={"run_id": "done", "num_epochs": 1})
    for body in (done, other, lag, other.model_copy(update={"run_id": "later"})):
        topic = Topic.ALERTS if body is lag else Topic.EPOCH
        live.apply(OonaMessage.of(topic, body, sender_id="t", key="k"))
    assert live.platform_alerts() == (lag,)
    views = {run_id: live.view(run_id) for run_id in live.run_ids()}
    assert {name: view.open_alerts for name, view in views.items()} == {"done": (), "other": (lag,), "later": (lag,)}
    ended = lag.model_copy(update={"ended_at": lag.updated_at + 1, "ending": "it caught up"})
    live.apply(OonaMessage.of(Topic.ALERTS, ended, sender_id="t", key="k"))
    assert [view.open_alerts for run_id in live.run_ids() if (view := live.view(run_id))] == [(), (), ()]


def test_alerts_stay_few_and_those_that_last_stay_longest():
    ended = [story.alert(alert_id=f"e{i}", ended_at=story.STARTED + 20, ending="over") for i in range(NUM_ALERTS)]
    view = fold([story.told(story.alert()), *(story.told(body) for body in ended)])
    assert len(view.alerts) == NUM_ALERTS
    assert view.open_alerts == (story.alert(),)
    assert view.num_alerts == {AlertKind.LOSS_SPIKE: 1 + NUM_ALERTS}
