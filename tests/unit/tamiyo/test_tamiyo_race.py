"""Several kernels at one site: the heuristic germinates one for each resting seed, and the best proven one goes on."""

from __future__ import annotations

import pytest
from tamiyo_story import SIGNATURE, option, packet

from esper.config import ScheduledGraft, TamiyoConfig
from esper.leyline import (
    Action,
    BlendStrategy,
    BudgetState,
    Evidence,
    EvidenceKind,
    HealthSignal,
    LayerHealthReport,
    SeedStage,
)
from esper.tamiyo import initial_state, step

OPTIONS = (option("a", "big", 900), option("a", "mid", 700), option("a", "small", 100))


def site(epoch, *seeds, name="a"):
    signals = tuple(
        HealthSignal(layer_id=name, epoch=epoch, grow_potential=1.0, **({"seed_id": f"s{i}"} | seed))
        for i, seed in enumerate(seeds)
    )
    return LayerHealthReport(
        run_id="run", layer_id=name, signature=SIGNATURE, epoch=epoch, step=10 * epoch, seeds=signals
    )


def resting():
    return {"stage": SeedStage.DORMANT}


def runner(gain, *, ready=True, **more):
    evidence = Evidence(kind=EvidenceKind.SHADOW, gain=gain, stderr=0.01, num_pairs=360)
    fields = {"stage": SeedStage.TRAINING, "evidence": evidence, "is_ready_for_transition": ready}
    return fields | {"gate": f"gain {gain}"} | more


def decide(*layers, epoch=9, config=None, state=None, **rest):
    config = config or TamiyoConfig()
    state = initial_state(config, 0) if state is None else state
    return step(state, packet(epoch, *layers, options=OPTIONS, **rest), config)


def begin(*, config, epoch=9, **rest):
    """A host that has stood still for a window, and then decides."""
    state = initial_state(config, 0)
    for earlier in range(epoch - 5, epoch):
        quiet = packet(earlier, val_loss=1.0)
        state, _ = step(state, quiet, config)
    return decide(site(epoch, resting(), resting(), resting()), epoch=epoch, config=config, state=state, **rest)


def orders(signal):
    return [(c.action, c.seed_id, c.blueprint) for c in signal.commands]


def test_the_heuristic_gives_every_resting_seed_a_design_of_its_own():
    state, signal = begin(config=TamiyoConfig(plateau_window=3))
    germinated = orders(signal)
    assert [(action, seed) for action, seed, _ in germinated] == [(Action.GERMINATE, f"s{i}") for i in range(3)]
    assert {blueprint for *_, blueprint in germinated} == {"big", "mid", "small"}
    assert state["num_adaptations"] == 1, "a race is one adaptation"
    assert "races with" in signal.reason


def test_only_as_many_race_as_the_budget_would_hold_together():
    budget = BudgetState(params_used=1000, params_limit=2050, flops_used=0, flops_limit=100_000)
    _, signal = begin(config=TamiyoConfig(), budget=budget)
    total = sum(next(o.num_parameters for o in OPTIONS if o.blueprint == name) for *_, name in orders(signal))
    assert 1 <= len(signal.commands) < 3
    assert total <= 1050


def test_direct_kernels_do_not_race():
    _, signal = begin(config=TamiyoConfig(strategy="direct"))
    assert len(signal.commands) == 1


def test_the_schedule_lets_kernels_race_that_it_names_for_one_epoch_and_site():
    entries = tuple(ScheduledGraft(epoch=9, site="a", blueprint=name) for name in ("mid", "small"))
    config = TamiyoConfig(policy="schedule", schedule=entries)
    state, signal = decide(site(9, resting(), resting()), config=config)
    assert orders(signal) == [(Action.GERMINATE, "s0", "mid"), (Action.GERMINATE, "s1", "small")]
    assert state["schedule_done"] == [0, 1]
    _, alone = decide(site(9, resting()), config=config)
    assert orders(alone) == [(Action.GERMINATE, "s0", "mid")]
    assert any("already got an order" in veto.reason for veto in alone.vetoes)


def test_the_best_evidence_wins_and_the_losers_go_first():
    _, signal = decide(site(9, runner(0.2), runner(0.5), runner(0.3)))
    assert orders(signal) == [(Action.CULL, "s0", None), (Action.CULL, "s2", None), (Action.ADVANCE, "s1", None)]
    assert signal.commands[0].reason == "lost the race to s1 (gain 0.2)"


def test_a_tie_goes_to_the_earlier():
    _, signal = decide(site(9, runner(0.2), runner(0.2)))
    assert orders(signal) == [(Action.CULL, "s1", None), (Action.ADVANCE, "s0", None)]


@pytest.mark.parametrize(
    "slow",
    [runner(0.1, ready=False), {"stage": SeedStage.GERMINATED, "gate": "its kernel is not loaded yet"}],
    ids=["not proven", "not loaded"],
)
def test_the_first_that_has_proven_itself_waits_for_the_others(slow):
    _, signal = decide(site(9, runner(0.5), slow))
    assert not signal.commands
    assert "a/s0 has proven itself (gain 0.5) and waits for s1" in signal.reason


def test_a_kernel_that_shows_no_gain_in_its_time_holds_nobody_up():
    _, signal = decide(site(9, runner(0.5), runner(-0.1, ready=False, should_cull=True)))
    assert orders(signal) == [(Action.CULL, "s1", None), (Action.ADVANCE, "s0", None)]


def test_races_at_two_sites_are_apart():
    _, signal = decide(site(9, runner(0.2), runner(0.5)), site(9, runner(0.1, seed_id="s7"), name="b"))
    assert (Action.ADVANCE, "s7", None) in orders(signal)
    assert (Action.ADVANCE, "s1", None) in orders(signal)


def test_a_person_is_asked_for_the_winner_alone_and_nobody_is_culled_before():
    config = TamiyoConfig(ask_before_graft=True)
    _, signal = decide(site(9, runner(0.2), runner(0.5)), config=config)
    assert not signal.commands
    assert "a/s1 waits for a person" in signal.reason
    assert "a/s0 is behind s1 in the race (0.2 to 0.5)" in signal.reason


def test_a_race_is_one_of_the_adaptations_at_a_time():
    entries = (ScheduledGraft(epoch=9, site="a", blueprint="mid"),)
    config = TamiyoConfig(policy="schedule", schedule=entries, max_concurrent=2)
    training = site(9, runner(0.2, ready=False, seed_id="s5"), runner(0.1, ready=False, seed_id="s6"), name="b")
    _, signal = decide(training, site(9, resting()), config=config)
    assert (Action.GERMINATE, "s0", "mid") in orders(signal)
    assert BlendStrategy.RAMP in {command.strategy for command in signal.commands}
