"""What the detectors promise one by one: no more than they were told, one alert a thing, an end, little memory."""

from __future__ import annotations

import math
import shlex

import numpy as np
import pytest
import typer.main

from esper.leyline.alerts import AlertKind
from esper.leyline.bus import BusStats, GroupStats
from esper.leyline.policies import PolicyChange, PolicyEvent
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import CircuitState, EpochRecord, LifecycleEvent, RunStarted, Severity, StepBatch
from esper.nissa.anomalies import Watch
from esper.nissa.anomalies.change import Cusum, RateCusum
from esper.nissa.anomalies.forest import FIRST_LOOK, KEEP, HealthForest, Odd
from esper.nissa.anomalies.outgoing import Outgoing, message_of
from esper.nissa.anomalies.robust import FAR, TO_SIGMA, Window

RUN = "run 1"
"""A blank, so that commands must quote it."""


def noisy(num, level=1.0, seed=0, noise=0.1):
    return level * np.exp(noise * np.random.default_rng(seed).standard_normal(num))


def told(watch, losses, *, first=0, marks=(), ms=10.0, size=20):
    """Tells losses in batches; returns the alerts."""
    found = []
    for begin in range(0, len(losses), size):
        part = losses[begin : begin + size]
        here = tuple(mark for mark in marks if first + begin <= mark < first + begin + len(part))
        body = StepBatch(
            run_id=RUN, first_step=first + begin, losses=tuple(map(float, part)), milliseconds=(ms,) * len(part),
            marks=here,
        )  # fmt: skip
        found += watch.apply(body, (first + begin + len(part)) * ms / 1e3)
    return found


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_a_window_has_the_median_and_mad_of_its_last_values(size):
    values = np.random.default_rng(size).standard_cauchy(200)
    window = Window(size, floor=1e-12)
    for number, value in enumerate(values, 1):
        window.add(value)
        last = values[max(0, number - size) : number]
        assert window.median == pytest.approx(np.median(last))
        assert window.scale == pytest.approx(max(TO_SIGMA * np.median(np.abs(last - np.median(last))), 1e-12))


def test_a_window_takes_any_finite_number():
    window = Window(4, floor=0.1)
    for value in (1.7e308, -1.7e308, 0.0, 5e-324, 1.7e308):
        window.add(value)
        assert math.isfinite(window.median)
        assert math.isfinite(window.score(1.7e308))
        assert math.isfinite(window.score(-1.7e308))
    constant = Window(4, floor=0.1)
    for _ in range(4):
        constant.add(3.0)
    assert (constant.score(3.0), constant.score(4.0), constant.score(1e300)) == (0.0, pytest.approx(10.0), FAR)


def test_no_single_score_is_a_change_and_a_small_one_that_lasts_is():
    cusum = Cusum(allowance=1.0, clip=4.0, limit=8.0)
    assert not cusum.add(1e9)
    assert not any(cusum.add(-1.0) for _ in range(9))
    assert cusum.total == 0.0
    changed = [cusum.add(2.0) for _ in range(8)]
    assert changed == [False] * 7 + [True]
    assert cusum.length == 8


def test_a_share_that_falls_is_told_and_one_that_was_always_low_is_not():
    usual = RateCusum(limit=5.0, learn=16)
    assert not any(usual.add(3, 1) for _ in range(20))
    assert any(usual.add(0, 2) for _ in range(6))
    low = RateCusum(limit=5.0, learn=16)
    assert not any(low.add(0, 4) for _ in range(50))


def test_a_forest_fits_when_it_is_needed_keeps_little_and_names_the_odd_one():
    rng = np.random.default_rng(0)
    usual = (0.2 * rng.standard_normal((700, 5)) * [1, 1, 1, 0.1, 0.1]).tolist()
    odd = [3.0, -3.0, 0.0, 0.0, 0.0]
    found = []
    for _ in range(2):
        forest = HealthForest()
        assert forest.see([odd]) == [None]  # nothing is known yet
        for begin in range(0, len(usual), 10):
            assert forest.see(usual[begin : begin + 10]) == [None] * 10
        assert (forest.num_fits, len(forest._vectors)) == (0, KEEP)
        found += forest.see([odd, [0.0] * 5, odd])
        assert forest.num_fits == 1
    assert found[:2] == [found[2], None]
    assert found[0].score > 0.5
    assert found[3:] == found[:3]  # the same seed


def test_a_run_whose_gradients_swing_by_themselves_is_not_odd_at_each_swing():
    """Of what a forest was fitted to it finds one in twenty odd; what is usual here must not be among them."""
    rng = np.random.default_rng(3)
    swings = np.array([0.05, 1.0, 1.5, 0.02, 0.02])
    forest = HealthForest()
    found = [forest.see((swings * rng.standard_normal((10, 5))).tolist()) for _ in range(100)]
    assert sum(odd is not None for each in found for odd in each) <= 10
    assert forest.num_fits > 0
    assert forest.see([[3.0, 5.0, 0.0, 0.0, 0.0]])[0] is not None


def test_two_figures_far_out_are_odd_before_there_is_a_forest_and_one_is_not():
    rng = np.random.default_rng(0)
    forest = HealthForest()
    pair, single, small = [3.0, -2.5, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.0, 0.0, 0.0]
    forest.see((0.1 * rng.standard_normal((FIRST_LOOK - 1, 5))).tolist())
    assert forest.see([pair]) == [None]  # that is one too few, and it is learned from
    assert forest.see([pair, single, small]) == [Odd(None, 2), None, None]
    assert forest.num_fits == 0
    wild = HealthForest()
    wild.see((2.0 * rng.standard_normal((2 * FIRST_LOOK, 5))).tolist())
    assert wild.see([pair]) == [None]  # where that is usual


def test_a_share_that_was_lucky_at_first_does_not_fall_by_chance():
    rng = np.random.default_rng(0)
    fallen = 0
    for _ in range(200):
        rate = RateCusum()
        rate.add(21, 3)  # 0.88 where 0.6 is true
        fallen += any(rate.add(hits, 3 - hits) for hits in rng.binomial(3, 0.6, 40).tolist())
    assert fallen <= 40


# ---------------------------------------------------------------- alerts


def test_a_jump_of_the_loss_is_one_alert_that_grows_and_ends():
    losses = noisy(400)
    losses[200:240] *= 20.0
    found = told(Watch(), losses)
    spikes = [alert for alert in found if alert.kind is AlertKind.LOSS_SPIKE]
    assert len({alert.alert_id for alert in spikes}) == 1
    first, last = spikes[0], spikes[-1]
    assert (first.run_id, first.severity, first.count, first.is_open) == (RUN, Severity.CRITICAL, 1, True)
    assert 198 <= first.since_step <= 202
    assert "where" in first.evidence
    assert first.figures["value"] > 10 > first.figures["usual"]
    assert [alert.count for alert in spikes[:-1]] == [2**i for i in range(len(spikes) - 1)]
    assert not last.is_open
    assert last.ending


def test_what_a_graft_does_to_a_loss_is_none():
    losses = noisy(400)
    losses[200:220] *= 2.0
    losses[220:] *= 1.3
    assert told(Watch(), losses) != []
    assert told(Watch(), losses, marks=(200,)) == []


def test_a_graft_that_explodes_is_one():
    losses = noisy(400)
    losses[205:] *= np.minimum(1.5 ** np.arange(195.0), 1e6)
    assert AlertKind.LOSS_SPIKE in {alert.kind for alert in told(Watch(), losses, marks=(200,))}


def test_a_single_hard_batch_is_none():
    losses = noisy(600)
    losses[100::40] *= 30.0
    assert told(Watch(), losses) == []


def test_steps_without_a_finite_loss_are_told_and_dropped_telemetry_is_not():
    watch = Watch()
    assert told(watch, noisy(100)) == []
    [alert] = told(watch, noisy(5), first=102)
    assert (alert.kind, alert.severity, alert.since_step) == (AlertKind.LOSS_SPIKE, Severity.CRITICAL, 100)
    dropped = Watch()
    assert told(dropped, noisy(100)) + told(dropped, noisy(20, seed=1), first=200) == []


def test_slow_steps_are_told_once_they_last_for_seconds():
    quick, slow = Watch(), Watch()
    for watch, ms in ((quick, 1.0), (slow, 50.0)):
        assert told(watch, noisy(300), ms=ms) == []
    assert told(quick, noisy(160), first=300, ms=3.0) == []  # half a second
    [alert, *_] = told(slow, noisy(160), first=300, ms=150.0)
    assert alert.kind is AlertKind.SLOW_STEPS
    assert alert.figures["value"] == pytest.approx(150.0)
    assert alert.since < (300 + 160) * 0.15
    event = LifecycleEvent(
        run_id=RUN, step=460, epoch=1, site="a", seed="s", from_stage=SeedStage.GERMINATED,
        to_stage=SeedStage.TRAINING, reason="r",
    )  # fmt: skip
    [ended] = slow.apply(event, 100.0)  # a shadow costs time: that explains it
    assert (ended.alert_id, ended.is_open) == (alert.alert_id, False)


def test_the_same_messages_give_the_same_alerts():
    losses = noisy(400)
    losses[200:240] *= 20.0
    assert told(Watch(), losses) == told(Watch(), losses)


def test_alerts_end_with_their_run_with_a_resume_and_with_silence():
    ends = {
        "the run ended": lambda w: w.apply(
            EpochRecord(run_id=RUN, epoch=4, num_epochs=5, step=220, train_loss=1.0), 50.0
        ),
        "the run was resumed": lambda w: w.apply(
            RunStarted(run_id=RUN, task="t", num_epochs=5, sites={}, params=1, directory="d", resumed_from_epoch=1),
            50.0,
        ),
        "not heard of for 15 minutes": lambda w: w.tick(2000.0),
    }
    for why, end in ends.items():
        watch = Watch()
        losses = noisy(220)
        losses[200:] *= 20.0
        assert told(watch, losses)
        [alert] = end(watch)
        assert why in alert.ending
        assert watch.open == ()


def lag(pending, delivered=0, name="g"):
    return BusStats(num_shards=1, groups=(GroupStats(group=name, topics=("t",), pending=pending, delivered=delivered),))


def test_a_group_that_joins_late_or_bursts_is_none_and_one_that_stands_still_is():
    watch, found = Watch(), []
    for look in range(40):
        pending = 50_000 >> look if look < 12 else 3_000 if look % 9 == 0 else 5
        found += watch.look(lag(pending, delivered=1000 * look), 5.0 * look)
    assert found == []
    for look in range(40, 60):
        found += watch.look(lag(100 * (look - 39), delivered=40_000), 5.0 * look)
    assert [alert.group for alert in found[:1]] == ["g"]
    [gone] = watch.look(BusStats(num_shards=1), 301.0)
    assert gone.ending == "the group is gone"


def test_a_trainer_that_does_not_ask_tamiyo_is_told_until_it_asks_again():
    watch, found = Watch(), []
    states = [CircuitState.CLOSED, CircuitState.OPEN, CircuitState.OPEN, CircuitState.HALF_OPEN, CircuitState.CLOSED]
    for epoch, state in enumerate(states):
        record = EpochRecord(run_id=RUN, epoch=epoch, num_epochs=9, step=epoch, train_loss=1.0, tamiyo=state)
        found += watch.apply(record, float(epoch))
    assert [alert.kind for alert in found] == [AlertKind.TAMIYO_SILENT] * 3
    assert [alert.is_open for alert in found] == [True, True, False]
    assert (found[0].since, found[-1].ended_at, found[-1].ending) == (1.0, 4.0, "Tamiyo answers again")
    assert "was open after epoch 2" in found[0].evidence
    assert watch.open == ()


def test_a_policy_that_is_refused_is_told_until_one_could_be_loaded():
    def event(change, version, reason=""):
        return PolicyEvent(change=change, version=version, reason=reason)

    watch, bad, good = Watch(), "b" * 64, "a" * 64
    assert watch.apply(event(PolicyChange.LOADED, good), 0.0) == []
    [alert] = watch.apply(event(PolicyChange.REFUSED, bad, "the weights are not its own"), 1.0)
    assert (alert.kind, alert.run_id, alert.place) == (AlertKind.POLICY_REFUSED, "", f"policy {bad[:12]}")
    assert alert.evidence == "the weights are not its own"
    assert watch.apply(event(PolicyChange.CANARY, good), 2.0) == []
    assert (
        watch.look(BusStats(num_shards=1, topics=(), groups=()), 3.0) == []
    )  # it is of no group: none that is gone ends it
    [over] = watch.apply(event(PolicyChange.LOADED, good), 4.0)
    assert (over.alert_id, over.ended_at) == (alert.alert_id, 4.0)
    assert watch.open == ()


def test_an_alert_of_an_earlier_life_is_adopted_and_ends():
    watch, found = Watch(), []
    for look in range(30):
        found += watch.look(lag(5 if look < 10 else 500 * look, delivered=look), 5.0 * look)
    later = Watch()
    assert later.apply(found[-1], 200.0) == []
    assert [alert.alert_id for alert in later.open] == [found[0].alert_id]
    ended = [alert for look in range(3) for alert in later.look(lag(0, delivered=100 + look), 205.0 + look)]
    assert [(alert.alert_id, alert.is_open) for alert in ended] == [(found[0].alert_id, False)]


def test_alerts_wait_until_they_are_seen_on_the_bus():
    losses = noisy(220)
    losses[200:] *= 20.0
    [alert, *_] = told(Watch(), losses)
    outgoing, message = Outgoing(), message_of(alert)
    outgoing.add(message)
    outgoing.add(message_of(alert))
    assert [waiting.event_id for waiting in outgoing.waiting()] == [message.event_id]
    outgoing.seen(message.event_id)
    assert outgoing.waiting() == []


def test_memory_does_not_grow_with_the_stream():
    import pickle

    watch = Watch()
    told(watch, noisy(3_000))
    early = len(pickle.dumps(watch))
    told(watch, noisy(6_000, seed=1), first=3_000)
    assert len(pickle.dumps(watch)) < 1.1 * early


def test_every_suggested_command_exists():
    from jobs.cli import app

    commands = set()
    watch = Watch()
    losses = noisy(900)
    losses[200:240] *= 20.0
    losses[500:800] *= 2.0
    for alert in told(watch, losses):
        commands.add(alert.command)
    watch = Watch()
    told(watch, noisy(300), ms=50.0)
    commands |= {alert.command for alert in told(watch, noisy(160), first=300, ms=150.0)}
    watch = Watch()
    event = LifecycleEvent(
        run_id=RUN, step=0, epoch=0, site="blocks.0 1", seed="s", from_stage=SeedStage.TRAINING,
        to_stage=SeedStage.GRAFTING, reason="r",
    )  # fmt: skip
    watch.apply(event, 0.0)
    losses = noisy(300)
    losses[200:] *= 20.0
    commands |= {alert.command for alert in told(watch, losses)}
    commands.add("esper bus stats")
    assert f"esper runs veto '{RUN}' 'blocks.0 1'" in commands
    assert len(commands) >= 4
    for line in commands:
        [program, *words] = shlex.split(line)
        assert program == "esper"
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        assert len(words) <= len([p for p in command.params if p.param_type_name == "argument"])
