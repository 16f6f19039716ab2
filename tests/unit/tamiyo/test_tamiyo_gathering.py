"""Parts of many runs' epochs, in any order, become the packets that the runs themselves would have sent."""

from __future__ import annotations

import random

import pytest
from tamiyo_story import SIGNATURE, layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import OonaMessage, RunStarted, RunState, Topic
from esper.tamiyo.gathering import Gathering, StrangeHealthError

CONFIG = TamiyoConfig(policy="random")
SITES = ("a", "b", "c")


def parts(epoch, run_id="run", *, config=None):
    """A packet, and the bodies that a run tells instead of it."""
    layers = [layer(site, epoch, potential=0.1).model_copy(update={"run_id": run_id}) for site in SITES]
    seen = packet(epoch, *layers, options=[option("a", "conv")], embargoed=("b",), governor="ok")
    seen = seen.model_copy(update={"run_id": run_id, "epoch": seen.epoch.model_copy(update={"run_id": run_id})})
    state = RunState(
        run_id=run_id, epoch=epoch, sites=SITES, memory={"epoch": epoch},
        config=config or CONFIG.model_dump(mode="json"),
        options=seen.options, budget=seen.budget, embargoed=seen.embargoed,
    )  # fmt: skip
    return seen, [*seen.layers, seen.epoch, state]


def started(run_id="run"):
    return RunStarted(run_id=run_id, task="t", num_epochs=9, sites={}, params=1, directory="d")


def asked(gathering, bodies):
    return [question for question in map(gathering.take, bodies) if question is not None]


@pytest.mark.parametrize("shuffle", range(5))
def test_in_whatever_order_the_parts_come_each_run_gets_its_own_packet(shuffle):
    gathering, expected, bodies = Gathering(), {}, []
    for number in range(20):
        expected[f"run-{number}"], more = parts(3, f"run-{number}")
        bodies += more
    random.Random(shuffle).shuffle(bodies)
    questions = asked(gathering, bodies)
    assert {question.packet.run_id: question.packet for question in questions} == expected
    assert all((question.config, question.state) == (CONFIG, {"epoch": 3}) for question in questions)
    assert (gathering.counts.health, gathering.counts.questions, gathering.num_runs) == (60, 20, 20)


def test_nothing_is_asked_before_the_last_part_is_there():
    _, bodies = parts(0)
    for left_out in range(len(bodies)):
        gathering = Gathering()
        assert asked(gathering, bodies[:left_out] + bodies[left_out + 1 :]) == []
        assert len(asked(gathering, [bodies[left_out]])) == 1


def test_what_is_told_twice_or_too_late_is_counted_and_left_out():
    gathering = Gathering()
    _, old = parts(1)
    _, new = parts(2)
    assert len(asked(gathering, [*old[:-1], *new])) == 1
    assert asked(gathering, old) == []  # the run is further on
    assert asked(gathering, new) == []  # redelivered
    assert (gathering.counts.stale, gathering.counts.questions) == (len(old) + len(new), 1)


def test_an_epoch_that_a_newer_one_overtook_is_told_of():
    gathering = Gathering()
    _, old = parts(1)
    _, new = parts(2)
    assert len(asked(gathering, [*old[1:], *new])) == 1  # a report of epoch 1 was lost, its state was not
    assert gathering.counts.incomplete == 1


def test_a_run_that_is_resumed_may_tell_of_an_epoch_again():
    gathering = Gathering()
    _, bodies = parts(4)
    assert len(asked(gathering, bodies)) == 1
    _, again = parts(2)
    assert len(asked(gathering, [started(), *again])) == 1


def test_a_run_that_asks_tells_no_state_and_costs_little():
    gathering = Gathering()
    for epoch in range(50):
        _, bodies = parts(epoch)
        assert asked(gathering, bodies[:-1]) == []
    assert len(gathering._runs["run"].open) <= 5
    assert gathering.counts.incomplete == 0


def test_many_runs_are_kept_and_the_silent_ones_go_first():
    gathering = Gathering(max_runs=3)
    for number in range(6):
        asked(gathering, parts(0, f"run-{number}")[1])
    assert list(gathering._runs) == ["run-3", "run-4", "run-5"]


def test_health_of_a_site_that_the_run_does_not_have_is_left_out():
    gathering = Gathering()
    seen, bodies = parts(0)
    [question] = asked(gathering, [layer("nowhere", 0), *bodies])
    assert (question.packet, gathering.counts.strange) == (seen, 1)


def test_health_of_a_site_that_the_run_did_not_name_when_it_started_is_refused():
    gathering = Gathering()
    named = started().model_copy(update={"sites": dict.fromkeys(SITES, SIGNATURE)})
    assert gathering.take(named) is None
    with pytest.raises(StrangeHealthError, match="run run has no site 'nowhere'"):
        gathering.take(layer("nowhere", 0))
    seen, bodies = parts(0)
    [question] = asked(gathering, bodies)
    assert (question.packet, gathering.counts.strange) == (seen, 1)


def test_what_is_stale_is_told_once_for_each_decision(caplog):
    gathering = Gathering()
    for epoch in (1, 2):
        _, bodies = parts(epoch)
        asked(gathering, bodies)
        asked(gathering, parts(0)[1])
    told = [record for record in caplog.records if record.message == "part.stale"]
    assert [(record.epoch, record.decided) for record in told] == [(0, 1), (0, 2)]


def test_a_configuration_that_is_none_is_counted_and_the_next_epoch_is_asked_about():
    gathering = Gathering()
    assert asked(gathering, parts(0, config={"policy": "no such thing"})[1]) == []
    assert gathering.counts.unread == 1
    assert len(asked(gathering, parts(1)[1])) == 1


def test_health_that_is_no_number_is_no_health():
    message = OonaMessage.of(Topic.SEED_HEALTH, layer("a", 0, potential=0.5), sender_id="x", key="run")
    message.payload["seeds"][0]["grow_potential"] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        message.body()
