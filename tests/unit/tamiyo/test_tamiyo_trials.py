"""What Tamiyo makes of trials by fork: when it asks, what it compares, and who begins."""

from __future__ import annotations

import pytest
from tamiyo_story import layer, option, packet, told

from esper.config import TamiyoConfig
from esper.leyline import (
    Action,
    BlendStrategy,
    Evidence,
    EvidenceKind,
    ForkPrice,
    SeedStage,
    TrialOutcome,
    TrialResult,
    TrialState,
)
from esper.tamiyo import initial_state, step

PRICE = ForkPrice(step=10, samples=1, validation=0, val_samples=0)
OPTIONS = (option("a", "small", 100, 1), option("a", "wide", 900, 1), option("b", "small", 100, 1, zero=False))


def config(**trials):
    return TamiyoConfig.model_validate(
        {
            "warmup_epochs": 0,
            "plateau_window": 1,
            "trials": {"enabled": True, "steps": 10, **trials},
        }
    )


def at(epoch, trials, *, options=OPTIONS, **rest):
    return packet(epoch, layer("a", epoch, potential=2.0), layer("b", epoch, seed_id="s1", potential=1.0),
                  options=options, trials=trials, **rest)  # fmt: skip


def plateau(settings, trials, **rest):
    """The state and signal of the first decision at which the policy would grow."""
    state, _ = step(initial_state(settings, 0), at(0, None), settings)
    return step(state, at(1, trials, **rest), settings)


RICH = TrialState(idle=1, flops_left=10**9, price=PRICE)


def outcome(candidate, gain, stderr=0.01, failure=""):
    evidence = Evidence(kind=EvidenceKind.FORK, gain=gain, stderr=stderr, num_pairs=40)
    return TrialOutcome(candidate=candidate, evidence=None if failure else evidence, failure=failure)


def result(request, *outcomes, failure=""):
    return TrialResult(
        trial_id=request.trial_id, epoch=request.epoch, told=request.epoch + 1, steps=10, outcomes=outcomes,
        failure=failure,
    )  # fmt: skip


def test_where_trials_can_be_had_growth_waits_for_one():
    _, signal = plateau(config(), RICH)
    assert signal.commands == ()
    request = signal.trial
    assert request is not None
    assert len(request.candidates) == 3
    assert {(c.site, c.blueprint) for c in request.candidates} == {("a", "small"), ("a", "wide"), ("b", "small")}
    plain = config().model_copy(update={"trials": config(enabled=False).trials})
    _, alone = plateau(plain, None)
    first = alone.commands[0]
    assert (request.candidates[0].site, request.candidates[0].kernel_id) == (first.site, first.kernel_id)
    assert request.steps == 10
    assert "first a trial of" in signal.reason


def test_the_same_packet_asks_for_the_same_trial():
    assert plateau(config(), RICH) == plateau(config(), RICH)


def test_the_budget_trims_the_candidates():
    one = PRICE.limit(10, None) + PRICE.limit(10, plateau(config(), RICH)[1].trial.candidates[0])
    _, signal = plateau(config(), TrialState(idle=1, flops_left=one, price=PRICE))
    assert signal.trial.num_forks == 2
    _, seeds = plateau(config(seeds=2), TrialState(idle=1, flops_left=2 * one, price=PRICE))
    assert seeds.trial.num_forks == 4
    state, none = plateau(config(), TrialState(idle=1, flops_left=one - 1, price=PRICE))
    assert none.trial is None
    assert [command.action for command in none.commands] == [Action.GERMINATE]
    assert "on shadow evidence alone" in none.reason
    assert state["untried"]


@pytest.mark.parametrize("trials", [None, TrialState(reason="no CPU is idle")])
def test_without_resources_it_decides_on_shadow_evidence_alone(trials):
    _, signal = plateau(config(), trials)
    _, plain = plateau(config(enabled=False), None)
    assert signal.trial is None
    assert [(c.site, c.kernel_id) for c in signal.commands] == [(c.site, c.kernel_id) for c in plain.commands]
    assert "on shadow evidence alone" in signal.reason


def test_a_trial_whose_answer_would_come_too_late_is_not_asked_for():
    settings = config()
    last = 20  # of 30 epochs
    state, _ = step(initial_state(settings, 0), at(last - 1, None), settings)
    _, signal = step(state, at(last, RICH), settings)
    assert signal.trial is None
    assert [command.action for command in signal.commands] == [Action.GERMINATE]
    assert "when nothing may begin any more" in signal.reason
    state, _ = step(initial_state(settings, 0), at(last - 2, None), settings)
    assert step(state, at(last - 1, RICH), settings)[1].trial is not None


def test_each_kernel_is_tried_by_every_strategy_that_suits_it():
    _, signal = plateau(config(strategies=["ramp", "direct"], candidates=9), RICH)
    assert {(c.site, c.strategy) for c in signal.trial.candidates} == {
        ("a", BlendStrategy.RAMP), ("a", BlendStrategy.DIRECT), ("b", BlendStrategy.RAMP),
    }  # fmt: skip


def test_while_a_trial_runs_nothing_begins():
    settings = config()
    state, signal = plateau(settings, RICH)
    trial_id = signal.trial.trial_id
    state, waiting = step(state, at(2, TrialState(under_way=trial_id)), settings)
    assert (waiting.commands, waiting.trial) == ((), None)
    assert "is under way" in waiting.reason


def settle(settings, *gains, asked=RICH, epoch=2, **rest):
    state, signal = plateau(settings, asked)
    found = [outcome(c, *gain) for c, gain in zip(signal.trial.candidates, gains, strict=True)]
    return signal.trial, *step(state, at(epoch, TrialState(result=result(signal.trial, *found)), **rest), settings)


def test_the_largest_proven_gain_begins():
    request, state, signal = settle(config(), (0.1, 0.01), (0.3, 0.01), (0.9, 0.8))
    (command,) = signal.commands
    assert (command.site, command.kernel_id) == (request.candidates[1].site, request.candidates[1].kernel_id)
    assert command.trial_id == request.trial_id
    assert "has won a trial" in command.reason
    assert state["trial"] is None
    assert [attempt["kernel_id"] for attempt in state["under_way"]] == [command.kernel_id]


def test_what_is_not_proven_does_not_begin_and_is_not_tried_again():
    settings = config()
    request, state, signal = settle(settings, (0.01, 0.01), (-0.3, 0.01), (0.0, 0.0))
    assert signal.commands == ()
    assert "no candidate is proven" in signal.reason
    state, again = step(state, at(9, RICH), settings)
    assert (again.commands, again.trial) == ((), None), "all have failed"
    assert len(request.candidates) == 3


def test_where_the_winner_may_not_begin_the_next_one_does():
    request, _, signal = settle(config(), (0.1, 0.01), (0.2, 0.01), (0.9, 0.01), embargoed=("b",))
    if request.candidates[2].site == "b":
        expected = request.candidates[1].kernel_id
        assert [command.kernel_id for command in signal.commands] == [expected]
    request, _, none = settle(config(), (0.1, 0.01), (0.2, 0.01), (0.9, 0.01), embargoed=("a", "b"))
    assert none.commands == ()
    assert "none may begin" in none.reason


def test_a_winner_passes_the_gates_like_anybody():
    settings = config()
    state, signal = plateau(settings, RICH)
    found = [outcome(c, 0.5) for c in signal.trial.candidates]
    late = at(29, TrialState(result=result(signal.trial, *found)))
    _, refused = step(state, late, settings)
    assert refused.commands == ()
    assert "too late to begin" in refused.reason
    sick = at(2, TrialState(result=result(signal.trial, *found)), governor="rolled back at step 3: it diverged")
    _, held = step(state, sick, settings)
    assert held.commands == ()
    assert told(held) == []


@pytest.mark.parametrize("how", ["void", "lost"])
def test_a_trial_that_says_nothing_leaves_the_policys_choice(how):
    settings = config()
    state, signal = plateau(settings, RICH)
    void = TrialState(result=result(signal.trial, failure="its forks died"))
    state, after = step(state, at(2, void if how == "void" else RICH), settings)
    (command,) = after.commands
    assert command.trial_id == ""
    assert ("its forks died" if how == "void" else "lost with its trainer") in after.reason
    assert state["trial"] is None
    assert after.trial is None


def test_seeds_under_way_are_tended_meanwhile():
    settings = TamiyoConfig.model_validate(config().model_dump() | {"max_concurrent": 2})
    state, signal = plateau(settings, RICH)
    busy = layer("b", 2, seed_id="s1", stage=SeedStage.TRAINING, should_cull=True, gate="no gain in time")
    now = packet(2, layer("a", 2, potential=2.0), busy, options=OPTIONS,
                 trials=TrialState(under_way=signal.trial.trial_id))  # fmt: skip
    _, after = step(state, now, settings)
    assert [command.action for command in after.commands] == [Action.CULL]
