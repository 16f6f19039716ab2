"""What a learned policy sees: its masks are what the gates let pass, its figures are figures, and its bytes hold."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_hosts import situations
from tamiyo_story import SHADOW, PaperHost, layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import Action, BlendStrategy, SeedStage, TamperedError
from esper.tamiyo import initial_state, step
from esper.tamiyo.actions import STRATEGIES, WAIT, ActionChoice, Operation, choice_of
from esper.tamiyo.candidates import find_candidates, reason_to_wait
from esper.tamiyo.memory import observe, read_state
from esper.tamiyo.observation import TENDED, Observation, observation_of, observe_graph
from esper.tamiyo.orders import Order
from esper.tamiyo.safety import judge
from esper.tamiyo.tending import tend

CONFIG = TamiyoConfig(warmup_epochs=0)


def passes(order, state, seen, config):
    return bool(judge(state, seen, config, [order]).accepted)


def assert_equal(first, second):
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            np.testing.assert_array_equal(value, other, strict=True)
        elif name not in {"operations", "by_rule"}:
            assert value == other


@settings(max_examples=300, deadline=None)
@given(situations())
def test_a_germination_is_in_the_masks_exactly_where_every_gate_lets_it_pass(situation):
    state, seen, config = situation
    view = observe_graph(state, seen, config)
    every_kernel = config.model_copy(update={"strategy": "ramp"})
    found = {c.site: c for c in find_candidates(state, seen, every_kernel).candidates}
    rests = reason_to_wait(state, seen, config) is not None
    held = {
        (view.site_names[site], view.kernel_names[kernel][0], name)
        for place, (site, kernel) in enumerate(zip(view.option_site, view.option_kernel, strict=True))
        for strategy, name in enumerate(STRATEGIES)
        if view.allows(ActionChoice(Operation.GERMINATE, site=int(site), option=place, strategy=strategy))
    }
    expected, num = set(), {}
    ways = [strategy for strategy in STRATEGIES if strategy.value in {*config.gnn.strategies, config.strategy}]
    for place, one in enumerate(seen.layers):
        candidate = found.get(one.layer_id)
        seed_id = candidate.seed.seed_id if candidate else "nobody"
        for ready in [o for o in seen.options if o.site == one.layer_id]:
            for strategy in ways:
                order = Order(Action.GERMINATE, one.layer_id, seed_id, "try", ready, strategy)
                fine = candidate is not None and ready in candidate.options and not rests
                if fine and passes(order, state, seen, config):
                    expected.add((one.layer_id, ready.kernel_id, strategy))
                    assert view.seed_names[view.resting[place]] == (one.layer_id, seed_id)
        num[one.layer_id] = len({kernel for site, kernel, _ in expected if site == one.layer_id})
    # beyond the top k nothing is held, and nothing is held that does not pass
    assert held <= expected
    for site, passing in num.items():
        assert len({kernel for where, kernel, _ in held if where == site}) == min(passing, config.gnn.top_k)
    if all(passing <= config.gnn.top_k for passing in num.values()):
        assert held == expected


@settings(max_examples=300, deadline=None)
@given(situations())
def test_seeds_may_be_tended_exactly_where_the_gates_and_the_rule_let_it_pass(situation):
    state, seen, config = situation
    view = observe_graph(state, seen, config)
    care = tend(state, seen, config)
    ready = {(order.site, order.seed_id) for order, *_ in care.advances}
    gone = {(order.site, order.seed_id) for order in care.removals}
    assert view.by_rule == gone
    for one in seen.layers:
        for seed in one.seeds:
            key = (one.layer_id, seed.seed_id)
            allowed = dict(zip(TENDED, view.can[view.seed_names.index(key)], strict=True))
            advance = Order(Action.ADVANCE, *key, "try")
            may_advance = key in ready and passes(advance, state, seen, config)
            assert (allowed[Operation.ADVANCE] or allowed[Operation.FOSSILIZE]) == may_advance
            assert allowed[Operation.FOSSILIZE] == (may_advance and seed.stage is SeedStage.FINE_TUNING)
            action = Action.RETIRE if seed.stage.is_blended else Action.CULL
            fresh = min(one.epoch, seed.epoch) == seen.epoch.epoch
            may_cull = seed.stage.is_active and fresh and key not in gone
            assert allowed[Operation.CULL] == (may_cull and passes(Order(action, *key, "try"), state, seen, config))


@settings(max_examples=100, deadline=None)
@given(situations())
def test_figures_are_finite_and_small_and_the_bytes_bring_them_back(situation):
    view = observe_graph(*situation)
    for name in ("site", "seed", "run", "kernel"):
        table = getattr(view, name)
        assert np.isfinite(table).all()
        assert (np.abs(table) <= 1.0).all()
    assert_equal(Observation.from_bytes(view.to_bytes()), view)


GROWN = packet(
    5,
    layer("a", 5, potential=0.5),
    layer("b", 5, stage=SeedStage.TRAINING, is_ready_for_transition=True, evidence=SHADOW, gate="gain"),
    options=[option("a", "conv"), option("a", "norm", 16)],
)


def view_of(seen=GROWN, config=CONFIG, state=None):
    return observation_of(state or initial_state(config, 0), seen, config)


def test_torn_bytes_are_refused():
    data = view_of().to_bytes()
    for end in range(0, len(data), max(1, len(data) // 60)):
        with pytest.raises(TamperedError):
            Observation.from_bytes(data[:end])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_bytes_are_refused(data):
    whole = bytearray(view_of().to_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TamperedError):
        Observation.from_bytes(bytes(whole))


def test_other_bytes_with_their_own_hash_are_refused():
    for packed in (b"", b"text", b"PK\x05\x06" + b"\0" * 18):
        with pytest.raises(TamperedError, match="no observation"):
            Observation.from_bytes(hashlib.sha256(packed).digest() + packed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed_site", np.array([0, 9])),
        ("run", np.full(21, np.nan, dtype=np.float32)),
        ("site", np.zeros((3, 2), dtype=np.float32)),
        ("can", np.zeros((2, 3), dtype=np.int64)),
    ],
)
def test_bytes_that_hold_no_observation_are_refused(name, value):
    with pytest.raises(TamperedError, match=name):
        Observation.from_bytes(replace(view_of(), **{name: value}).to_bytes())


def test_another_version_is_told():
    with np.load(io.BytesIO(view_of().to_bytes()[32:])) as archive:
        held = dict(archive)
    held["version"] = np.array(99)
    into = io.BytesIO()
    np.savez(into, **held)
    with pytest.raises(ValueError, match="version 99"):
        Observation.from_bytes(hashlib.sha256(into.getvalue()).digest() + into.getvalue())


def test_one_that_is_retiring_cannot_be_retired_again():
    live = layer("b", 5, stage=SeedStage.STABILIZING, alpha=0.5, gate="retiring, alpha 0.50")
    state = read_state(initial_state(CONFIG, 0))
    before = observe(state, packet(5, live), CONFIG)
    assert view_of(packet(5, live)).can[0, TENDED.index(Operation.CULL)]
    retired = before.under_way[0].model_copy(update={"retiring": True})
    after = before.model_copy(update={"under_way": (retired,)})
    assert not observe_graph(after, packet(5, live), CONFIG).can.any()


@pytest.mark.parametrize("policy", ["heuristic", "bandit", "random"])
def test_what_other_policies_do_is_told_as_choices_that_the_masks_hold(policy):
    config = TamiyoConfig(policy=policy, warmup_epochs=0, plateau_window=2, max_adaptations=2)
    options = (option("a", "conv"), option("a", "norm", 16), option("b", "conv"))
    host = PaperHost(config, options, {"a": 0.2, "b": 0.4}, [1.0] * 25)
    state, told = initial_state(config, 0), []
    for epoch in range(25):
        seen = host.packet(epoch)
        view = observation_of(state, seen, config)
        state, signal = step(state, seen, config)
        for command in signal.commands:
            host._obey(command, epoch)
        choice = choice_of(view, signal)
        assert choice is not None
        assert view.allows(choice)
        told.append(choice)
        if choice.operation is Operation.GERMINATE:
            (command,) = signal.commands
            kernel = view.kernel_names[view.option_kernel[choice.option]]
            assert (view.site_names[choice.site], *kernel) == (command.site, command.kernel_id, command.blueprint)
            assert STRATEGIES[choice.strategy] is command.strategy
            assert view.seed_names[view.resting[choice.site]] == (command.site, command.seed_id)
        elif choice is not WAIT:
            (command,) = signal.commands
            assert view.seed_names[choice.seed] == (command.site, command.seed_id)
    seen_kinds = {choice.operation for choice in told}
    assert seen_kinds == {Operation.WAIT, Operation.GERMINATE, Operation.ADVANCE, Operation.FOSSILIZE}


def test_what_is_removed_by_rule_is_nobodys_choice():
    seen = packet(5, layer("b", 5, stage=SeedStage.TRAINING, should_cull=True, gate="no gain in time"))
    config = TamiyoConfig(warmup_epochs=0)
    _, signal = step(initial_state(config, 0), seen, config)
    assert [command.action for command in signal.commands] == [Action.CULL]
    assert choice_of(view_of(seen, config), signal) == WAIT


def test_a_choice_that_the_masks_do_not_hold_is_none():
    config = TamiyoConfig(warmup_epochs=0, policy="schedule", schedule=[{"epoch": 5, "site": "a", "blueprint": "norm"}])
    seen = packet(5, layer("a", 5, potential=0.5), options=[option("a", "conv"), option("a", "norm", 16)])
    _, signal = step(initial_state(config, 0), seen, config)
    narrow = config.model_copy(update={"gnn": config.gnn.model_copy(update={"top_k": 1})})
    assert choice_of(view_of(seen, narrow), signal) is None
    assert choice_of(view_of(seen, config), signal).operation is Operation.GERMINATE
    direct = signal.commands[0].model_copy(update={"strategy": BlendStrategy.DIRECT})
    ramps = config.model_copy(update={"gnn": config.gnn.model_copy(update={"strategies": (BlendStrategy.RAMP,)})})
    assert choice_of(view_of(seen, ramps), signal).operation is Operation.GERMINATE
    assert choice_of(view_of(seen, ramps), signal.model_copy(update={"commands": (direct,)})) is None
