"""Nissa's alerts in what Tamiyo sees: nothing begins while the loss runs away, and the reason says so."""

from __future__ import annotations

import pytest
from tamiyo_story import layer, option, packet, told

from esper.config import ScheduledGraft, TamiyoConfig
from esper.leyline import Action, Gate, RunState, SystemStatePacket
from esper.leyline.flags import AlertFlag, AlertKind, Severity
from esper.tamiyo import Order, initial_state, step
from esper.tamiyo.actions import Operation
from esper.tamiyo.memory import observe, read_state
from esper.tamiyo.observation import observation_of
from esper.tamiyo.safety import ALERT_EPOCHS, judge

CONFIG = TamiyoConfig(warmup_epochs=0, plateau_window=1)
OPTIONS = (option("a", "conv"),)


def flag(kind=AlertKind.LOSS_RISE, severity=Severity.WARNING, epoch=3, **rest):
    return AlertFlag(
        alert_id="0", kind=kind, severity=severity, epoch=epoch, summary="the loss rises", evidence="2 times", **rest
    )


def seen(epoch, *alerts):
    return packet(epoch, layer("a", epoch, potential=1.0), options=OPTIONS, alerts=alerts)


def after(epoch):
    """The memory of a host that has plateaued."""
    state = initial_state(CONFIG, 0)
    for past in range(epoch):
        state, _ = step(state, seen(past).model_copy(update={"options": ()}), CONFIG)
    return state


def test_nothing_begins_while_the_loss_rises():
    _, calm = step(after(4), seen(4), CONFIG)
    assert [command.action for command in calm.commands] == [Action.GERMINATE]
    _, held = step(after(4), seen(4, flag()), CONFIG)
    assert held.commands == ()
    assert "Nissa's alert stands: the loss rises (2 times): nothing grows until it is over" in held.reason


@pytest.mark.parametrize(
    ("alert", "holds"),
    [
        (flag(), True),
        (flag(AlertKind.LOSS_SPIKE, Severity.CRITICAL), True),
        (flag(AlertKind.LOSS_SPIKE), False),
        (flag(AlertKind.DEAD_CHANNELS, site="a"), False),
        (flag(AlertKind.SLOW_STEPS), False),
        (flag(epoch=30 - ALERT_EPOCHS), False),
        (flag(epoch=31 - ALERT_EPOCHS), True),
    ],
)
def test_what_holds_growth_back_and_for_how_long(alert, holds):
    epoch = 30 if alert.epoch > 3 else 4
    order = Order(Action.GERMINATE, "a", "s0", "why not", OPTIONS[0])
    state = observe(read_state(initial_state(CONFIG, 0)), seen(epoch, alert), CONFIG)
    now = seen(epoch, alert)
    now = now.model_copy(update={"epoch": now.epoch.model_copy(update={"num_epochs": 100})})
    verdict = judge(state, now, CONFIG, [order])
    assert [veto.gate for veto in verdict.vetoes] == ([Gate.ALERT] if holds else [])
    may = observation_of(initial_state(CONFIG, 0), now, CONFIG).operations[Operation.GERMINATE]
    assert may != holds, "the learned policy's masks are those of the gates"


def test_a_schedule_waits_as_well_and_says_why():
    entry = ScheduledGraft(epoch=0, site="a", blueprint="conv")
    config = CONFIG.model_copy(update={"policy": "schedule", "schedule": (entry,)})
    state, held = step(initial_state(config, 0), seen(0, flag(epoch=0)), config)
    assert held.commands == ()
    assert "Nissa's alert stands" in told(held)[0][1]
    _, begun = step(state, seen(1), config)
    assert [command.action for command in begun.commands] == [Action.GERMINATE]


def test_the_packet_and_the_state_that_a_run_tells_carry_them():
    one = seen(0, flag())
    assert SystemStatePacket.model_validate_json(one.model_dump_json()).alerts == (flag(),)
    state = RunState(
        run_id="run", epoch=0, sites=("a",), memory={}, config={}, budget=one.budget, alerts=(flag(site="a"),)
    )
    assert RunState.model_validate_json(state.model_dump_json()).alerts[0].site == "a"
