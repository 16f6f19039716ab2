"""The learned policy as a policy: it goes the whole way, waits where it must, explains itself, and is never harmful."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_hosts import situations
from tamiyo_story import SHADOW, PaperHost, layer, option, packet

from esper.config import GnnConfig, TamiyoConfig
from esper.leyline import (
    Action,
    BlendStrategy,
    Gate,
    PermanentError,
    PolicyCard,
    SeedStage,
    SystemStatePacket,
    TamperedError,
)
from esper.tamiyo import gnn, initial_state, step
from esper.tamiyo.actions import STRATEGIES, Operation
from esper.tamiyo.deciders import LOADERS, Question
from esper.tamiyo.gnn import Loaded, propose_all
from esper.tamiyo.net import NetShape, PolicyNet
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.tamiyo.step import case_of, conclude

SHAPE = NetShape(hidden=16, heads=4, members=3)
OPTIONS = (option("a", "conv"), option("a", "norm", 16), option("b", "conv"))


def net_that(*likes, calibrated=True, seed=0, sharp=8.0):
    """A network with these operations' scores raised, in their order."""
    net = PolicyNet(SHAPE, seed=seed)
    with torch.no_grad():
        for place, operation in enumerate(likes):
            net.operation[-1].bias[operation] += sharp - place
        if calibrated:
            net.outcomes.get_buffer("num_calibrated").fill_(100)
            net.outcomes.get_buffer("scale").fill_(0.1)
    return net


def stored(net, **fields):
    weights = net.to_bytes()
    given = {"name": "test", "shape": SHAPE.model_dump(), "observation_version": OBSERVATION_VERSION, **fields}
    return PolicyCard.of(weights, **given), weights


def served(net, **settings):
    """A configuration that names this network, and who holds it."""
    card, weights = stored(net)
    chosen = GnnConfig(version=card.version, **settings)
    config = TamiyoConfig(policy="gnn", warmup_epochs=0, max_adaptations=2, gnn=chosen)
    return config, {card.version: (card, weights)}.__getitem__


GROWER = net_that(Operation.FOSSILIZE, Operation.ADVANCE, Operation.GERMINATE)
SEEN = packet(5, layer("a", 5, potential=0.4), layer("b", 5, potential=0.2), options=OPTIONS)


def decide(net, seen=SEEN, **settings):
    config, policies = served(net, **settings)
    return step(initial_state(config, 0), seen, config, policies)[1]


def test_it_goes_the_whole_way_to_a_fossil_and_through_every_gate(monkeypatch):
    config, policies = served(GROWER)
    host = PaperHost(config, OPTIONS, {"a": 0.2, "b": 0.4}, [1.0] * 25)
    monkeypatch.setattr("tamiyo_story.step", lambda *arguments: step(*arguments, policies))
    host.run()
    assert sum(host.fossils.values()) == 0  # PaperHost leaves fossils where they are
    assert len(host.germinated) == 2
    assert set(host.stages.values()) == {SeedStage.FOSSILIZED}
    assert host.most_active == 1


def test_one_that_likes_to_wait_leaves_a_ready_seed_where_it_is():
    ready = layer("a", 5, stage=SeedStage.TRAINING, is_ready_for_transition=True, evidence=SHADOW, gate="gain")
    signal = decide(net_that(Operation.WAIT), packet(5, ready))
    assert signal.commands == ()
    assert "chose WAIT" in signal.reason
    assert [c.action for c in decide(net_that(Operation.ADVANCE), packet(5, ready)).commands] == [Action.ADVANCE]


@pytest.mark.parametrize(("stage", "action"), [("TRAINING", Action.CULL), ("STABILIZING", Action.RETIRE)])
def test_it_may_give_a_seed_up(stage, action):
    seed = layer("a", 5, stage=SeedStage(stage), alpha=1.0, kernel_id="k", gate="not yet")
    net = net_that(Operation.CULL)
    config, policies = served(net)
    state, signal = step(initial_state(config, 0), packet(5, seed), config, policies)
    assert [c.action for c in signal.commands] == [action]
    _, again = step(state, packet(6, layer("a", 6, **seed.seeds[0].model_dump(include={"stage", "alpha"}))), config,
                    policies)  # fmt: skip
    assert bool(again.commands) == (action is Action.CULL)  # one that retires is on its way


def test_what_must_go_goes_whatever_it_likes():
    bad = layer("a", 5, stage=SeedStage.TRAINING, should_cull=True, gate="no gain in time")
    signal = decide(net_that(Operation.WAIT), packet(5, bad))
    assert [c.action for c in signal.commands] == [Action.CULL]
    assert "no gain in time" in signal.reason


def test_who_loses_a_race_goes_with_the_advance():
    def racing(name, gain):
        evidence = SHADOW.model_copy(update={"gain": gain})
        health = {"is_ready_for_transition": True, "evidence": evidence, "gate": "gain"}
        return layer("a", 5, seed_id=name, stage=SeedStage.TRAINING, **health).seeds[0]

    both = layer("a", 5).model_copy(update={"seeds": (racing("s0", 0.1), racing("s1", 0.3))})
    commands = decide(net_that(Operation.ADVANCE), packet(5, both)).commands
    assert [(c.action, c.seed_id) for c in commands] == [(Action.CULL, "s0"), (Action.ADVANCE, "s1")]


def test_too_little_certainty_is_a_veto_with_its_figures():
    wild = net_that(Operation.GERMINATE)
    with torch.no_grad():
        wild.outcomes.get_buffer("scale").fill_(50.0)
    signal = decide(wild, max_uncertainty=0.4)
    (veto,) = signal.vetoes
    assert (veto.gate, veto.action, signal.commands) == (Gate.UNCERTAINTY, Action.GERMINATE, ())
    assert f"{signal.explanation.uncertainty:.2f}, above 0.40" in veto.reason
    assert signal.explanation.log_prob is None
    assert veto.in_words in signal.reason
    assert decide(wild, max_uncertainty=None).commands


def test_a_certainty_that_was_never_measured_is_none():
    unknown = net_that(Operation.GERMINATE, calibrated=False)
    signal = decide(unknown, max_uncertainty=0.5)
    assert [veto.gate for veto in signal.vetoes] == [Gate.UNCERTAINTY]
    assert signal.explanation.uncertainty is None
    assert decide(unknown, max_uncertainty=None).commands


def test_too_little_confidence_is_a_veto():
    torn = net_that(Operation.GERMINATE, sharp=0.2)
    signal = decide(torn, min_confidence=0.9, choice="likeliest")
    assert [veto.gate for veto in signal.vetoes] == [Gate.CONFIDENCE]
    assert decide(torn, min_confidence=0.5, choice="likeliest").commands


def test_a_doubt_begins_nothing_and_leaves_seeds_under_way_to_the_rule():
    wild = net_that(Operation.CULL)
    with torch.no_grad():
        wild.outcomes.get_buffer("scale").fill_(50.0)
    ready = layer("a", 5, stage=SeedStage.TRAINING, is_ready_for_transition=True, evidence=SHADOW, gate="gain")
    signal = decide(wild, packet(5, ready), max_uncertainty=0.4)
    assert [(veto.gate, veto.action) for veto in signal.vetoes] == [(Gate.UNCERTAINTY, Action.CULL)]
    assert [command.action for command in signal.commands] == [Action.ADVANCE]
    assert [command.action for command in decide(wild, packet(5, ready), max_uncertainty=None).commands] == [
        Action.CULL
    ]


@pytest.mark.parametrize("part", ["operation", "outcomes"])
def test_figures_that_run_over_begin_nothing_and_leave_seeds_under_way_to_the_rule(part):
    """Weights that are finite pass the store, whatever they come to."""
    huge = net_that(Operation.GERMINATE)
    with torch.no_grad():
        weight = huge.operation[-1].weight if part == "operation" else huge.outcomes.second
        weight.copy_(3e38 if part == "operation" else torch.sign(weight) * 3e38)
    asked = decide(huge)
    assert asked.commands == ()
    assert "not finite" in asked.reason
    ready = layer("a", 5, stage=SeedStage.TRAINING, is_ready_for_transition=True, evidence=SHADOW, gate="gain")
    other = decide(huge, packet(5, ready, layer("b", 5, potential=0.4), options=OPTIONS))
    assert "not finite" in other.reason
    assert [command.action for command in other.commands] == [Action.ADVANCE]


def test_the_error_that_a_person_reads_is_the_calibrated_one():
    narrow, wide = net_that(Operation.GERMINATE), net_that(Operation.GERMINATE)
    with torch.no_grad():
        wide.outcomes.get_buffer("scale").fill_(0.3)  # three times narrow's
    one, other = (decide(net, choice="likeliest", max_uncertainty=None).explanation for net in (narrow, wide))
    assert other.forecast == one.forecast
    assert other.forecast_error == pytest.approx(3.0 * one.forecast_error)
    assert other.uncertainty > one.uncertainty
    assert f"± {other.forecast_error:.2g}" in other.in_words


def test_what_is_done_is_drawn_and_how_is_the_likeliest():
    torn = net_that(sharp=0.0)
    config, policies = served(torn, max_uncertainty=None)
    found = {}
    for seed in range(40):
        state = initial_state(config, seed)
        first, again = step(state, SEEN, config, policies), step(state, SEEN, config, policies)
        assert first == again
        assert first[0]["rng_counter"] == 1
        told = first[1].explanation
        found.setdefault(told.operation, set()).add((told.site, told.blueprint, told.strategy))
    assert found.keys() == {"WAIT", "GERMINATE"}
    assert len(found["GERMINATE"]) == 1


def test_the_floor_is_not_drawn_from():
    shape = SHAPE.model_copy(update={"floor": 0.9})
    still = PolicyNet(shape, seed=0)
    with torch.no_grad():
        still.operation[-1].weight.zero_()
        still.operation[-1].bias[Operation.WAIT] += 100.0
    card, weights = stored(still, shape=shape.model_dump())
    chosen = GnnConfig(version=card.version, max_uncertainty=None)
    config = TamiyoConfig(policy="gnn", warmup_epochs=0, max_adaptations=2, gnn=chosen)
    policies = {card.version: (card, weights)}.__getitem__
    for seed in range(30):
        assert step(initial_state(config, seed), SEEN, config, policies)[1].commands == ()
    bold = config.model_copy(update={"gnn": chosen.model_copy(update={"explore": True})})
    drawn = [step(initial_state(bold, seed), SEEN, bold, policies)[1].commands for seed in range(30)]
    assert any(drawn)


def test_a_decision_explains_itself_in_numbers_and_words():
    signal = decide(GROWER)
    told, (command,) = signal.explanation, signal.commands
    assert (told.operation, told.site, told.blueprint) == ("GERMINATE", command.site, command.blueprint)
    assert told.strategy == command.strategy
    assert sum(told.chances.values()) == pytest.approx(1.0, abs=1e-5)
    assert told.chances.keys() == {"WAIT", "GERMINATE"}
    assert told.confidence == max(told.chances.values())
    assert sum(told.attention.values()) == pytest.approx(1.0, abs=1e-5)
    assert told.value == signal.value
    assert len(told.attributions) == 5
    assert [abs(a.effect) for a in told.attributions] == sorted(
        (abs(a.effect) for a in told.attributions), reverse=True
    )
    for words in (f"GERMINATE {command.blueprint} at {command.site}", "looked at", told.attributions[0].in_words):
        assert words in signal.reason
        assert words in command.reason


def test_an_attribution_is_the_slope_of_the_log_probability():
    """Checked by differences: the features are moved a little one by one."""
    from dataclasses import replace

    from esper.tamiyo.considering import Draw, consider
    from esper.tamiyo.inference import Inference
    from esper.tamiyo.net import collate
    from esper.tamiyo.observation import RUN_FEATURES, observation_of

    config, _ = served(GROWER)
    view = observation_of(initial_state(config, 0), SEEN, config)
    net = PolicyNet.from_bytes(GROWER.to_bytes(), SHAPE).requires_grad_(requires_grad=False)
    (found,) = consider(Inference(net), [view], [Draw(None)])
    for place in (0, RUN_FEATURES.index("may_grow"), RUN_FEATURES.index("params")):
        moved = []
        for step_size in (1e-2, -1e-2):
            run = view.run.copy()
            run[place] += step_size
            moved.append(float(net.evaluate(collate([replace(view, run=run)]), [found.decided.choice])[0]))
        slope = (moved[0] - moved[1]) / 2e-2
        assert found.effects["run"][0, place] == pytest.approx(slope * view.run[place], abs=2e-3)


def test_where_nothing_else_is_allowed_it_says_so():
    signal = decide(GROWER, packet(5, layer("a", 5, potential=0.4)))
    assert "nothing else is allowed" in signal.reason
    assert signal.explanation.attributions == ()


def test_the_same_version_decides_the_same_and_chance_hangs_on_the_run_alone():
    torn = net_that(sharp=0.0)
    config, policies = served(torn, explore=True)
    signals = {}
    for seed in range(30):
        state = initial_state(config, seed)
        first, again = step(state, SEEN, config, policies), step(state, SEEN, config, policies)
        assert first == again
        assert first[0]["rng_counter"] == 1
        signals[seed] = (first[1].explanation.operation, first[1].explanation.site)
    assert {operation for operation, _ in signals.values()} == {"WAIT", "GERMINATE"}
    assert {site for _, site in signals.values()} == {None, "a", "b"}
    greedy, policies = served(torn, choice="likeliest")
    assert len({step(initial_state(greedy, s), SEEN, greedy, policies)[1].explanation.operation for s in range(5)}) == 1


def test_what_was_drawn_comes_with_its_log_probability():
    from esper.tamiyo.actions import choice_of
    from esper.tamiyo.net import collate
    from esper.tamiyo.observation import observation_of

    torn = net_that(sharp=0.0)
    config, policies = served(torn, explore=True)
    for seed in range(10):
        state = initial_state(config, seed)
        _, signal = step(state, SEEN, config, policies)
        view = observation_of(state, SEEN, config)
        with torch.no_grad():
            log_prob, _, value = torn.evaluate(collate([view]), [choice_of(view, signal)])
        assert signal.explanation.log_prob == pytest.approx(float(log_prob), abs=1e-5)
        assert signal.value == pytest.approx(float(value), abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(situations(), st.sampled_from(Operation), st.integers(0, 3))
def test_no_order_of_it_is_ever_refused_by_the_gates(situation, liked, seed):
    """Whatever the state of the run: unknown sites, stale epochs, health that is missing, a governor that shouts."""
    state, seen, config = situation
    net = net_that(liked, seed=seed)
    config = config.model_copy(update={"policy": "gnn"})
    case = case_of(state.to_json(), seen, config)
    (proposal,) = propose_all(Loaded("0" * 64, net), [case])
    _, signal = conclude(case, proposal)
    assert {veto.gate for veto in signal.vetoes} <= {Gate.UNCERTAINTY, Gate.CONFIDENCE, Gate.GOVERNOR}
    stale = {s.seed_id for one in seen.layers for s in one.seeds if min(one.epoch, s.epoch) != seen.epoch.epoch}
    assert not stale & {command.seed_id for command in signal.commands if command.action is Action.ADVANCE}
    if seen.governor.startswith("critical"):
        assert signal.commands == ()
    germinated = [c for c in signal.commands if c.action is Action.GERMINATE]
    assert {c.site for c in germinated} <= {one.layer_id for one in seen.layers if one.epoch == seen.epoch.epoch}


def test_health_that_is_no_number_never_comes_in():
    text = SEEN.model_dump_json().replace('"grow_potential":0.4', '"grow_potential":NaN')
    with pytest.raises(ValueError, match="grow_potential"):
        SystemStatePacket.model_validate_json(text)


def test_figures_that_overflow_are_a_wait_for_that_run_alone():
    broken = net_that(Operation.GERMINATE)
    with torch.no_grad():
        broken.encoder.kernel[0].weight.fill_(3e38)
        broken.encoder.kernel[2].weight.fill_(3e38)
    config, policies = served(broken)
    signal = step(initial_state(config, 0), SEEN, config, policies)[1]
    assert signal.commands == ()
    assert "not finite" in signal.reason
    bare = packet(5, layer("a", 5, potential=0.4))
    decider = LOADERS["gnn"](*policies(config.gnn.version))
    first, second = decider.decide([Question(initial_state(config, 0), seen, config) for seen in (SEEN, bare)])
    assert "not finite" in first.signal.reason
    assert "nothing else is allowed" in second.signal.reason


def test_many_questions_at_once_are_answered_as_each_alone():
    config, policies = served(GROWER)
    decider = LOADERS["gnn"](*policies(config.gnn.version))
    late = packet(6, layer("a", 6, potential=0.1), options=OPTIONS)
    questions = [Question(initial_state(config, i), seen, config) for i, seen in enumerate([SEEN, late, SEEN])]
    torn = Question({"version": 7}, SEEN, config)
    answers = decider.decide([*questions, torn])
    assert "state" in str(answers.pop())
    for question, answer in zip(questions, answers, strict=True):
        state, signal = step(*question, policies)
        assert answer.state == state
        assert answer.signal.commands == signal.commands
        assert answer.signal.value == pytest.approx(signal.value, abs=1e-5)
    assert decider.decide([]) == []


def test_without_weights_it_says_what_to_do():
    config = TamiyoConfig(policy="gnn")
    with pytest.raises(PermanentError, match=r"tamiyo\.gnn\.version.*esper policy train"):
        step(initial_state(config, 0), SEEN, config)
    _, policies = served(GROWER)
    with pytest.raises(PermanentError, match="not the whole of a version"):
        step(initial_state(config, 0), SEEN, config, policies)


def test_a_policy_that_is_not_what_it_says_is_refused():
    card, weights = stored(GROWER)
    with pytest.raises(TamperedError):
        gnn.ready(card, net_that(seed=5).to_bytes())
    with pytest.raises(PermanentError, match="kind"):
        gnn.ready(*stored(GROWER, kind="bandit"))
    with pytest.raises(PermanentError, match="version 99"):
        gnn.ready(*stored(GROWER, observation_version=99))
    with pytest.raises(PermanentError, match="shape"):
        gnn.ready(*stored(GROWER, shape={"hidden": "wide"}))
    with pytest.raises(TamperedError, match="asked for"):
        gnn.load("f" * 64, lambda _: (card, weights))


def test_a_run_pins_the_version_that_it_began_with():
    class Shelf:
        def promoted(self):
            return "a" * 64

        def ls(self):
            return [stored(GROWER)[0]]

    config = TamiyoConfig(policy="gnn")
    assert gnn.pin(config, Shelf()).gnn.version == "a" * 64
    version = stored(GROWER)[0].version
    short = config.model_copy(update={"gnn": GnnConfig(version=version[:8])})
    assert gnn.pin(short, Shelf()).gnn.version == version
    assert gnn.pin(TamiyoConfig(), Shelf()) == TamiyoConfig()


def test_strategies_are_those_that_the_run_allows():
    seen = {
        decide(net_that(Operation.GERMINATE, seed=seed), strategies=("drift_controlled",)).commands[0].strategy
        for seed in range(4)
    }
    assert seen <= {BlendStrategy.RAMP, BlendStrategy.DRIFT_CONTROLLED}
    assert len(STRATEGIES) == 5
    assert math.isclose(sum(decide(GROWER).explanation.chances.values()), 1.0, abs_tol=1e-5)


def test_a_veto_that_lasts_is_one_though_its_figures_differ():
    torn = [net_that(Operation.GERMINATE, sharp=sharp) for sharp in (0.2, 0.6)]
    (first,), (again,) = (decide(net, min_confidence=0.9, choice="likeliest").vetoes for net in torn)
    assert first.reason != again.reason
    assert first.subject == again.subject
    assert first.subject != first.model_copy(update={"site": "elsewhere"}).subject
