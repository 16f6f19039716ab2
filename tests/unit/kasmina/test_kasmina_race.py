"""Several kernels in TRAINING at one site: apart from each other, judged alike, and one alone enters the live path."""

from __future__ import annotations

import copy

import pytest
import torch
from kasmina_support import SHADOW_GAIN, Driver, Shelf, assert_equal, fingerprint, wrapped

from esper.config import KasminaConfig
from esper.kasmina import export
from esper.leyline import Action, BlendStrategy, SeedStage

SITE = "1"


def racing(num=3, *, only=None, **settings):
    """A driver with kernels in TRAINING at one site: s0, s1, ... with different initial weights."""
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf, sites=[SITE], config=KasminaConfig(race=num, embargo_epochs=1, **settings))
    driver = Driver("mlp", host)
    for index in range(num) if only is None else only:
        driver.to_training(SITE, shelf.put("mlp_adapter", host.sites[SITE], seed=index), f"s{index}")
    torch.manual_seed(1)
    return driver, shelf


def kernel(driver, seed_id):
    found = {k: t.clone() for k, t in driver.host.state_dict().items() if f".{seed_id}." in k}
    assert found
    return found


def prove(driver, **gains):
    """Two epochs of training, each with evidence."""
    for _ in range(2):
        driver.train(4)
        for seed_id, gain in gains.items():
            driver.host.record_evidence(seed_id, SHADOW_GAIN.model_copy(update={"gain": gain}))
        driver.close()
    return driver


def test_a_site_has_as_many_seeds_as_may_race():
    host = wrapped("mlp", config=KasminaConfig(race=3))
    assert [view.site for view in host.seeds()] == ["1"] * 3 + ["3"] * 3


@pytest.mark.parametrize("index", range(3))
def test_each_learns_what_it_would_learn_alone(index):
    together, alone = racing()[0].train(8), racing(only=[index])[0].train(8)
    assert_equal(kernel(together, f"s{index}"), kernel(alone, f"s{index}"))


def test_the_winner_enters_once_the_losers_are_gone_and_they_leave_no_trace():
    driver, _ = racing()
    prove(driver, s0=0.3, s1=0.5, s2=0.4)
    assert all(signal.is_ready_for_transition for signal in driver.reports[0].seeds)
    (refused,) = driver.command(Action.ADVANCE, SITE, "s1").events
    assert refused.refused
    assert "races with s0, s2" in refused.reason
    before = {k: t.clone() for k, t in fingerprint(driver).items()}
    for loser in ("s0", "s2"):
        driver.command(Action.CULL, SITE, loser)
    assert_equal(fingerprint(driver), before)
    driver.command(Action.ADVANCE, SITE, "s1")
    assert [driver.stage(s) for s in ("s0", "s1", "s2")] == [SeedStage.CULLED, SeedStage.GRAFTING, SeedStage.CULLED]
    assert not [k for k in driver.host.state_dict() if ".s0." in k or ".s2." in k]


def test_nothing_begins_beside_a_kernel_that_is_being_blended():
    driver, shelf = racing(2, only=[0])
    prove(driver, s0=0.5).command(Action.ADVANCE, SITE, "s0")
    kernel_id = shelf.put("mlp_adapter", driver.host.sites[SITE], seed=7)
    (event,) = driver.command(Action.GERMINATE, SITE, "s1", kernel_id=kernel_id).events
    assert event.refused
    assert "on its way into the live path" in event.reason


@pytest.mark.parametrize("direct_first", [True, False])
def test_a_direct_kernel_does_not_race(direct_first):
    driver, shelf = racing(2, only=[])
    for index, direct in enumerate((direct_first, not direct_first)):
        kernel_id = shelf.put("mlp_adapter", driver.host.sites[SITE], seed=index)
        strategy = BlendStrategy.DIRECT if direct else BlendStrategy.RAMP
        change = driver.command(Action.GERMINATE, SITE, f"s{index}", kernel_id=kernel_id, strategy=strategy)
    assert change.events[-1].refused
    assert "cannot race" in change.events[-1].reason


def test_a_restored_race_goes_on_as_it_would_have():
    first, _ = racing()
    first.train(4)
    growth, weights = first.host.growth_state(), copy.deepcopy(first.host.state_dict())
    optimizer, rng = copy.deepcopy(first.optimizer.state_dict()), torch.get_rng_state()
    first.train(4)
    second, _ = racing(only=[])
    second.host.load_growth_state(growth)
    second.host.load_state_dict(weights)
    second.optimizer.load_state_dict(optimizer)
    second.step = 4
    torch.set_rng_state(rng)
    second.train(4)
    assert_equal(dict(second.host.state_dict()), dict(first.host.state_dict()))
    assert [view.stage for view in second.host.seeds()] == [SeedStage.TRAINING] * 3


def test_kernels_run_in_the_order_of_their_grafts_and_not_of_their_seeds():
    """s1 wins the first race; s0, culled then, wins the next one and so stands behind s1."""
    driver, shelf = racing(2)
    prove(driver, s0=0.1, s1=0.5).command(Action.CULL, SITE, "s0")
    driver.command(Action.ADVANCE, SITE, "s1")
    for _ in range(4):
        driver.run_epoch()
        driver.command(Action.ADVANCE, SITE, "s1")
    assert driver.stage("s1") is SeedStage.FOSSILIZED
    driver.run_epoch()
    assert driver.stage("s0") is SeedStage.DORMANT
    driver.to_grafting(SITE, shelf.put("mlp_adapter", driver.host.sites[SITE], seed=9), "s0")
    driver.train(8)
    assert driver.seed("s0").alpha == 1.0
    layer = driver.host.module.get_submodule("_esper.1")
    x = driver.batches[0][0]
    driver.host.eval()
    with torch.no_grad():
        h = torch.relu(driver.host.module[0](x))
        by_graft = h + layer.get_submodule("s1")(h)
        by_graft = by_graft + layer.get_submodule("s0")(by_graft)
        seen = []
        handle = driver.host.module[1].register_forward_hook(lambda m, args, out: seen.append(out))
        expected = driver.host(x)
        handle.remove()
        assert torch.equal(seen[0], by_graft)
        assert torch.equal(export(driver.host)(x), expected)
