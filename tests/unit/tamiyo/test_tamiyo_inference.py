"""The network as it decides is the network as it is trained: the same numbers, and the same slopes."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_hosts import situations

from esper.tamiyo import attending
from esper.tamiyo.actions import Operation
from esper.tamiyo.attending import wire
from esper.tamiyo.batch import targets_of
from esper.tamiyo.considering import Draw, consider, largest
from esper.tamiyo.inference import Inference
from esper.tamiyo.net import Drawn, NetShape, PolicyNet, chosen_features, collate
from esper.tamiyo.observation import observe_graph

SHAPES = (
    NetShape(hidden=16, heads=4, members=3),
    NetShape(hidden=8, heads=1, layers=3, members=2, floor=0.0),
    NetShape(hidden=8, heads=2, layers=0, members=2),
)
KINDS = ("site", "seed", "run", "kernel")


@functools.cache
def net_of(shape, liked, seed):
    """A network whose heads have opinions; nothing here changes it."""
    net = PolicyNet(shape, seed=seed)
    with torch.no_grad():
        chance = torch.Generator().manual_seed(seed)
        for head in (net.operation, net.site, net.option, net.strategy, net.seed):
            weight = head.get_parameter("2.weight")
            weight.copy_(torch.randn(weight.shape, generator=chance))
        net.operation.get_parameter("2.bias")[liked] += 3.0
    return net.requires_grad_(requires_grad=False)


def by_torch(net, view, choice):
    """Log-probability, entropy, value, forecasts and effects of a choice, by autograd."""
    from dataclasses import replace

    batch = collate([view])
    inputs = {kind: getattr(batch, kind).clone().requires_grad_() for kind in KINDS}
    batch = replace(batch, **inputs)
    log_prob, entropy, value = net.evaluate(batch, [choice])
    slopes = torch.autograd.grad(log_prob.sum(), list(inputs.values()), allow_unused=True)
    effects = {
        kind: np.zeros(tuple(x.shape)) if slope is None else (slope * x.detach()).numpy()
        for (kind, x), slope in zip(inputs.items(), slopes, strict=True)
    }
    with torch.no_grad():
        forecasts = net.outcomes(chosen_features(batch, net.encoder(batch), targets_of(batch, [choice])))
    return float(log_prob.detach()), float(entropy.detach()), float(value.detach()), forecasts[0].numpy(), effects


STRETCHES = (1, 5, 1536)
"""A graph is worked on in stretches of so many nodes."""


@contextlib.contextmanager
def in_stretches_of(num):
    attending._wire.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attending, "_STRETCH", num)
        yield
    attending._wire.cache_clear()


@settings(max_examples=100, deadline=None)
@given(situations(max_sites=8), st.sampled_from(Operation), st.sampled_from(SHAPES), st.integers(0, 3))
def test_it_has_the_numbers_and_slopes_of_the_network_that_is_trained(situation, liked, shape, seed):
    state, seen, config = situation
    view = observe_graph(state, seen, config)
    net = net_of(shape, liked, seed)
    wanted = {}
    for stretch in STRETCHES:
        with in_stretches_of(stretch):
            (found,) = consider(Inference(net), [view], [Draw(None)])
        decided = found.decided
        if decided.choice not in wanted:
            wanted[decided.choice] = by_torch(net, view, decided.choice)
        log_prob, entropy, value, forecasts, effects = wanted[decided.choice]
        assert decided.log_prob == pytest.approx(log_prob, abs=2e-5)
        assert decided.entropy == pytest.approx(entropy, abs=2e-5)
        assert decided.value == pytest.approx(value, abs=2e-5)
        np.testing.assert_allclose(found.forecasts, forecasts, atol=2e-5)
        assert found.effects.keys() == (set(KINDS) if view.operations.sum() > 1 else set())
        for kind, table in found.effects.items():
            np.testing.assert_allclose(table, effects[kind], atol=1e-4, rtol=1e-3, err_msg=f"{kind}, {stretch}")


@settings(max_examples=60, deadline=None)
@given(situations(), st.sampled_from(Operation), st.integers(0, 3))
def test_it_chooses_as_the_network_that_is_trained(situation, liked, seed):
    state, seen, config = situation
    view, net = observe_graph(state, seen, config), net_of(SHAPES[0], liked, seed)
    inference = Inference(net)
    chosen = inference.decide(view, inference.judge(view), torch.Generator().manual_seed(seed), Drawn.ALL).decided
    (other,) = net.act(collate([view]), generator=torch.Generator().manual_seed(seed))
    assert chosen.choice == other.choice
    assert chosen.probabilities.keys() == other.probabilities.keys()
    for part, p in chosen.probabilities.items():
        np.testing.assert_allclose(p, other.probabilities[part], atol=2e-5, err_msg=part)


@settings(max_examples=60, deadline=None)
@given(situations(max_sites=8), st.integers(0, 2))
def test_every_edge_to_a_stretchs_own_stands_in_one_slot_and_no_node_twice_in_it(situation, reach):
    state, seen, config = situation
    view = observe_graph(state, seen, config)
    for stretch in STRETCHES:
        with in_stretches_of(stretch):
            assert_wired(view, reach)


def assert_wired(view, reach):
    sizes = {"site": len(view.site), "seed": len(view.seed)}
    found, owned = {}, {"site": [], "seed": []}
    for wiring in wire(view, reach):
        names = {"site": np.arange(sizes["site"])[wiring.sites], "seed": wiring.seeds}
        own = {
            "site": set(names["site"][wiring.own_sites].tolist()),
            "seed": set(wiring.seeds[wiring.own_seeds].tolist()),
        }
        for kind, nodes in own.items():
            owned[kind] += sorted(nodes)
        for kind, slots in wiring.slots.items():
            for slot in slots:
                source, target = names[slot.origin][slot.source], names[kind][slot.target]
                assert len(set(source)) == len(source) == len(target) == len(set(target))
                pairs = zip(source.tolist(), target.tolist(), strict=True)
                found.setdefault(slot.relation, []).extend(pair for pair in pairs if pair[1] in own[kind])
    assert owned == {kind: list(range(size)) for kind, size in sizes.items()}
    if not reach:  # then those at the ends do not see what lies beyond
        return
    here = list(zip(range(sizes["seed"]), view.seed_site.tolist(), strict=True))
    forward, stacked = (list(zip(*pairs.tolist(), strict=True)) for pairs in (view.forward, view.stacked))

    def turned(pairs):
        return [(target, source) for source, target in pairs]

    wanted = {"layer_forward": forward, "rev_layer_forward": turned(forward), "holds": here, "rev_holds": turned(here)}
    wanted |= {"sequential": stacked, "rev_sequential": turned(stacked)}
    wanted |= {f"{kind}_self": [(place, place) for place in range(size)] for kind, size in sizes.items()}
    assert {name: sorted(pairs) for name, pairs in found.items() if pairs} == {
        name: sorted(pairs) for name, pairs in wanted.items() if pairs
    }


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(0, 5), st.integers(0, 999))
def test_the_largest_effects_are_those_that_sorting_all_would_give(rows, columns, num, seed):
    chance = np.random.default_rng(seed)
    # few different sizes, so that many are equal; the first of them counts
    table = chance.integers(-3, 4, size=(rows, columns)).astype(np.float32)
    flat = np.abs(table).ravel()
    wanted = [place for place in np.argsort(-flat, kind="stable").tolist() if flat[place] > 0.0][: 1 + num]
    found = sorted(largest(table, 1 + num), key=lambda entry: -entry[0])[: 1 + num]
    assert found == [(flat[place], place) for place in wanted]
