"""The policy's network: its distributions, their masks and floor, its gradients, and what it must not depend on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_hosts import situations
from tamiyo_story import SHADOW, layer, option, packet

from esper.config import TamiyoConfig
from esper.leyline import SeedStage, TamperedError
from esper.tamiyo import initial_state
from esper.tamiyo.actions import STRATEGIES, WAIT, ActionChoice, Operation
from esper.tamiyo.batch import options_of
from esper.tamiyo.encoder import RELATIONS, GraphAttention
from esper.tamiyo.net import NetShape, PolicyNet, collate
from esper.tamiyo.observation import TENDED, observation_of, observe_graph

CONFIG = TamiyoConfig(warmup_epochs=0, max_concurrent=3)
SHAPE = NetShape(hidden=16, heads=4, members=3)


def sharp_net(shape=SHAPE, seed=0):
    """A network that is far from even in its choices."""
    net = PolicyNet(shape, seed=seed)
    with torch.no_grad():
        for head in (net.operation, net.site, net.option, net.strategy, net.seed, net.value):
            head[-1].weight.mul_(100.0)
    return net.eval()


SHARP = sharp_net()
"""For whoever changes nothing about it."""


def seed(site, name, stage, **health):
    return layer(site, 5, seed_id=name, stage=stage, **health).seeds[0]


def site(name, *seeds):
    return layer(name, 5).model_copy(update={"seeds": tuple(seeds)})


READY = {"is_ready_for_transition": True, "evidence": SHADOW, "gate": "gain"}
RICH = packet(
    5,
    site("a", seed("a", "a0", SeedStage.FOSSILIZED), seed("a", "a1", SeedStage.DORMANT, potential=0.3)),
    site("b", seed("b", "b0", SeedStage.TRAINING, **READY)),
    site("c", seed("c", "c0", SeedStage.FINE_TUNING, alpha=1.0, **READY)),
    site("d", seed("d", "d0", SeedStage.DORMANT, potential=0.1)),
    options=[
        option("a", "conv"),
        option("a", "norm", 16, zero=False),
        option("d", "conv", 900),
        option("d", "wide", 3),
    ],
)
BARE = packet(5)
LONE = packet(5, site("a", seed("a", "a1", SeedStage.DORMANT, potential=0.3)), options=[option("a", "conv")])


def view_of(seen, config=CONFIG):
    return observation_of(initial_state(config, 0), seen, config)


VIEWS = [view_of(RICH), view_of(BARE), view_of(LONE)]


def every_choice(view):
    """All that the masks hold."""
    places = range(-1, 8)
    grid = itertools.product(range(len(view.option_site)), range(len(STRATEGIES)))
    begun = [ActionChoice(Operation.GERMINATE, site=int(view.option_site[o]), option=o, strategy=s) for o, s in grid]
    tended = [ActionChoice(operation, seed=place) for operation in TENDED for place in places]
    return [WAIT, *(choice for choice in (*begun, *tended) if view.allows(choice))]


@settings(max_examples=100, deadline=None)
@given(st.lists(situations(), min_size=1, max_size=3), st.integers(0, 2**31))
def test_what_is_drawn_is_allowed_and_has_the_log_probability_that_is_evaluated(many, chance):
    views = [observe_graph(*situation) for situation in many]
    net, batch = SHARP, collate(views)
    decided = net.act(batch, generator=torch.Generator().manual_seed(chance))
    for view, one in zip(views, decided, strict=True):
        assert view.allows(one.choice)
        path = {"operation": int(one.choice.operation)}
        if one.choice.operation is Operation.GERMINATE:
            nth = one.choice.option - int(np.searchsorted(view.option_site, one.choice.site))
            path |= {"site": one.choice.site, "option": nth, "strategy": one.choice.strategy}
        elif one.choice.operation is not Operation.WAIT:
            path |= {"seed": one.choice.seed}
        assert path.keys() == one.probabilities.keys()
        told = sum(np.log(one.probabilities[part][place]) for part, place in path.items())
        assert told == pytest.approx(one.log_prob, abs=1e-4)
    log_prob, entropy, value = net.evaluate(batch, [one.choice for one in decided])
    assert log_prob.tolist() == [one.log_prob for one in decided]
    assert entropy.tolist() == [one.entropy for one in decided]
    assert value.tolist() == [one.value for one in decided]


@pytest.mark.parametrize("view", VIEWS, ids=["rich", "bare", "lone"])
def test_the_probabilities_of_all_allowed_choices_sum_to_one_and_their_entropy_is_the_mean_of_the_told(view):
    choices = every_choice(view)
    net = sharp_net()
    with torch.no_grad():
        log_prob, entropy, _ = net.evaluate(collate([view] * len(choices)), choices)
    chances = log_prob.double().exp()
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-5)
    # the entropy that is told counts kernel and strategy where they were chosen: right on the average
    assert float((chances * entropy).sum()) == pytest.approx(float(-(chances * log_prob).sum()), abs=1e-4)


def test_chance_draws_as_often_as_the_probabilities_say():
    net, view = sharp_net(), VIEWS[0]
    generator = torch.Generator().manual_seed(1)
    num = 3000
    drawn = [one.choice for one in net.act(collate([view] * num), generator=generator)]
    choices = every_choice(view)
    with torch.no_grad():
        chances = net.evaluate(collate([view] * len(choices)), choices)[0].double().exp().tolist()
    for choice, chance in zip(choices, chances, strict=True):
        error = (chance * (1 - chance) / num) ** 0.5
        assert abs(drawn.count(choice) / num - chance) < 4.5 * error + 1e-3


def test_greedy_takes_the_most_probable_part_each_time():
    net, batch = sharp_net(), collate(VIEWS)
    first, again = net.act(batch, greedy=True), net.act(batch, greedy=True)
    assert [one.choice for one in first] == [one.choice for one in again]
    for one in first:
        assert one.probabilities["operation"].argmax() == one.choice.operation
        for part, p in one.probabilities.items():
            if part in {"site", "seed", "strategy"}:
                assert p.argmax() == getattr(one.choice, part)


@settings(max_examples=50, deadline=None)
@given(situations(), st.floats(0.001, 0.5))
def test_nothing_that_is_allowed_falls_below_the_floor_and_nothing_else_has_a_chance(situation, floor):
    view = observe_graph(*situation)
    net = sharp_net(SHAPE.model_copy(update={"floor": floor}))
    with torch.no_grad():
        net.operation[-1].bias[Operation.WAIT] = 60.0
        judged = net.judge(collate([view]))
    chances = judged.operation[0].exp()
    allowed = torch.from_numpy(view.operations)
    assert (chances[allowed] >= floor / int(allowed.sum()) * (1 - 1e-4)).all()
    assert (chances[~allowed] == 0.0).all()
    for column in range(len(TENDED)):
        chances, allowed = judged.seed[:, column].exp(), torch.from_numpy(view.can[:, column])
        assert (chances[allowed] >= floor / max(1, int(allowed.sum())) * (1 - 1e-4)).all()
        assert (chances[~allowed] == 0.0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(situations(), min_size=1, max_size=3), st.sampled_from([0.0, 0.02]))
def test_gradients_are_finite_under_heavy_masks(many, floor):
    batch = collate([observe_graph(*situation) for situation in many])
    net = sharp_net(SHAPE.model_copy(update={"floor": floor}))
    with torch.no_grad():
        net.operation[-1].weight.mul_(50.0)  # some probabilities underflow
    choices = [one.choice for one in net.act(batch, greedy=True)]
    log_prob, entropy, value = net.evaluate(batch, choices)
    (log_prob.sum() + entropy.sum() + value.sum()).backward()
    assert torch.isfinite(log_prob).all()
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert net.value[-1].weight.grad is not None


def test_every_head_and_the_encoder_learn_from_a_batch_of_all_choices():
    view = VIEWS[0]
    choices = every_choice(view)
    net = sharp_net()
    log_prob, _, value = net.evaluate(collate([view] * len(choices)), choices)
    weights = torch.linspace(-1.0, 1.0, len(choices))
    ((weights * log_prob).sum() + value.sum()).backward()
    untouched = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [name for name in untouched if not name.startswith("outcomes.")] == []


def test_the_value_does_not_depend_on_the_operation():
    view = VIEWS[0]
    choices = every_choice(view)
    assert len({choice.operation for choice in choices}) == len(Operation)
    net, batch = sharp_net(), collate([view])
    assert len({net.evaluate(batch, [choice])[2].item() for choice in choices}) == 1


def test_a_batch_gives_what_its_rows_give_alone():
    views = [*VIEWS, VIEWS[0]]
    net = sharp_net()
    choices = [one.choice for one in net.act(collate(views), generator=torch.Generator().manual_seed(5))]
    with torch.no_grad():
        together = net.evaluate(collate(views), choices)
        alone = [net.evaluate(collate([view]), [choice]) for view, choice in zip(views, choices, strict=True)]
        forecasts = net.forecasts(collate(views), choices)
        lone = [net.forecasts(collate([view]), [choice]) for view, choice in zip(views, choices, strict=True)]
    for part, rows in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forecasts, torch.cat(lone), atol=1e-4, rtol=1e-4)


def test_the_order_of_seeds_at_a_site_changes_nothing():
    racing = [seed("a", f"s{i}", SeedStage.TRAINING, potential=0.1, train_loss=0.5 + i) for i in range(4)]
    order = [2, 0, 3, 1]
    views = [
        view_of(packet(5, site("a", *racing), site("b", seed("b", "b0", SeedStage.DORMANT)))),
        view_of(packet(5, site("a", *(racing[i] for i in order)), site("b", seed("b", "b0", SeedStage.DORMANT)))),
    ]
    with torch.no_grad():
        first, second = (sharp_net().judge(collate([view])) for view in views)
    torch.testing.assert_close(first.operation, second.operation, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first.value, second.value, atol=1e-5, rtol=1e-5)
    places = [*order, 4]
    torch.testing.assert_close(first.seed[places], second.seed, atol=1e-5, rtol=1e-5)
    assert first.seed[0].exp().max() != first.seed[1].exp().max()


def test_attention_is_that_of_torch_geometric_where_edges_are_of_one_kind():
    from torch_geometric.nn import GATv2Conv

    torch.manual_seed(0)
    ours, reference = GraphAttention(16, 4), GATv2Conv(16, 4, heads=4)
    with torch.no_grad():
        for name in ("layer_forward", "site_self"):
            ours.source[name].load_state_dict(reference.lin_l.state_dict())
            ours.attention[name].copy_(reference.att[0])
        ours.target["site"].load_state_dict(reference.lin_r.state_dict())
    nodes = torch.randn(7, 16)
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 2, 0], [1, 2, 3, 4, 5, 6, 0, 5, 5]])
    none = (torch.zeros(0, dtype=torch.int64),) * 2
    typed = dict.fromkeys(RELATIONS, none) | {"layer_forward": (edges[0], edges[1])}
    found = ours({"site": nodes, "seed": torch.zeros(0, 16)}, typed)
    torch.testing.assert_close(found["site"], reference(nodes, edges) - reference.bias, atol=1e-6, rtol=1e-5)


def test_every_kind_of_edge_matters():
    """A network that dropped a relation would give the same for another graph."""
    batch = collate([VIEWS[0]])
    net = sharp_net()
    with torch.no_grad():
        whole = net.judge(batch).operation
        for name in RELATIONS:
            none = torch.zeros(0, dtype=torch.int64)
            assert len(batch.edges[name][0]), name
            cut = replace(batch, edges={**batch.edges, name: (none, none)})
            assert not torch.equal(net.judge(cut).operation, whole), name


def test_the_weights_come_back_and_torn_or_broken_ones_are_refused():
    net = PolicyNet(SHAPE, seed=3)
    data = net.to_bytes()
    again = PolicyNet.from_bytes(data, SHAPE)
    assert again.to_bytes() == data
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))
    for torn in (b"", data[:5], data[: len(data) // 2], data[:-1], b"x" * 100):
        with pytest.raises(TamperedError):
            PolicyNet.from_bytes(torn, SHAPE)
    with pytest.raises(TamperedError):
        PolicyNet.from_bytes(data, SHAPE.model_copy(update={"hidden": 32}))
    with torch.no_grad():
        net.value[-1].bias.fill_(float("nan"))
    with pytest.raises(TamperedError, match="not finite"):
        PolicyNet.from_bytes(net.to_bytes(), SHAPE)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = PolicyNet(SHAPE, seed=3).to_bytes()
    before = torch.random.get_rng_state()
    assert PolicyNet(SHAPE, seed=3).to_bytes() == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert PolicyNet(SHAPE, seed=4).to_bytes() != first


def test_a_choice_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="masks"):
        sharp_net().evaluate(collate([VIEWS[1]]), [ActionChoice(Operation.ADVANCE, seed=0)])
    with pytest.raises(ValueError, match="at least"):
        collate([])


def test_options_of_several_sites_are_found_in_a_batch():
    batch = collate([VIEWS[0], VIEWS[2]])
    places, owner = options_of(batch, torch.tensor([3, 4, 0]))
    assert places.tolist() == [2, 3, 4, 0, 1]
    assert owner.tolist() == [0, 0, 1, 2, 2]
