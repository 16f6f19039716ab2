"""Saving and restoring growth: the restored host goes on bit for bit, whatever stood there before."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from kasmina_support import DESIGNS, PUBLIC, SHADOW_GAIN, SITES, Driver, Shelf, assert_equal, fingerprint, wrapped

from esper.config import KasminaConfig
from esper.leyline import Action, ConflictError, SeedStage

CONFIG = KasminaConfig(ramp_epochs=3, embargo_epochs=2)


def save(driver):
    state = {
        "module": driver.host.state_dict(),
        "growth": driver.host.growth_state(),
        "optimizer": driver.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "step": driver.step,
        "epoch": driver.epoch,
    }
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def load(saved, driver):
    # weights_only: nothing in a growth state needs a pickle
    state = torch.load(io.BytesIO(saved), weights_only=True)
    driver.host.load_growth_state(state["growth"])
    driver.host.load_state_dict(state["module"])
    driver.optimizer = torch.optim.AdamW([p for _, p in driver.host.live_parameters()], lr=1e-2)
    groups = state["optimizer"]["param_groups"]
    while len(driver.optimizer.param_groups) < len(groups):
        # the saved optimizer has one group a graft; the rebuilt one has them all in its first
        taken = [len(g["params"]) for g in groups]
        parameters = [p for _, p in driver.host.live_parameters()]
        driver.optimizer = torch.optim.AdamW(parameters[: taken[0]], lr=1e-2)
        for start, count in zip(_starts(taken)[1:], taken[1:], strict=True):
            driver.optimizer.add_param_group({"params": parameters[start : start + count]})
    driver.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    driver.step, driver.epoch = state["step"], state["epoch"]
    return driver


def _starts(counts):
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts[:-1]


def everything(driver):
    found = fingerprint(driver)
    found |= {k: t.clone() for k, t in driver.host.state_dict().items()}
    found |= {f"shadow {k}": t for k, t in _tensors(driver.host.growth_state())}
    return found


def _tensors(value, path=""):
    if isinstance(value, torch.Tensor):
        yield path, value.double()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}/{index}")


def play(driver, site, seed_id, upto):
    """A script of ten epochs; the same calls whether or not a restore happened between two of them."""
    while driver.epoch < upto:
        epoch = driver.epoch
        driver.train(driver.steps_per_epoch)
        if driver.stage(seed_id) is SeedStage.TRAINING:
            driver.host.record_evidence(seed_id, SHADOW_GAIN)
        driver.close(1.0)
        if epoch == 7:
            driver.command(Action.RETIRE, site, seed_id)
        elif driver.stage(seed_id) is SeedStage.DORMANT:
            driver.command(Action.GERMINATE, site, seed_id, kernel_id=driver.kernel_id)
            driver.command(Action.ADVANCE, site, seed_id)
        elif driver.stage(seed_id).is_active:
            driver.command(Action.ADVANCE, site, seed_id)
    return driver


def fresh(name, shelf):
    host = wrapped(name, hub=shelf, config=CONFIG)
    driver = Driver(name, host, observe_every=3)
    site = SITES[name]
    driver.kernel_id = shelf.put(DESIGNS[name], host.sites[site])
    return driver, site, next(v.seed_id for v in host.seeds() if v.site == site)


# in TRAINING, in a ramp, in a retirement
@pytest.mark.parametrize(("name", "cut"), [("mlp", 2), ("mlp", 4), ("transformer", 4), ("mlp", 9)])
def test_a_restored_host_goes_on_bit_for_bit(name, cut):
    shelf = Shelf()
    driver, site, seed_id = fresh(name, shelf)
    torch.manual_seed(1)
    play(driver, site, seed_id, cut)
    saved = save(driver)
    play(driver, site, seed_id, 12)
    expected, views = everything(driver), driver.host.seeds()

    again, _, _ = fresh(name, shelf)
    torch.manual_seed(99)
    load(saved, again)
    play(again, site, seed_id, 12)
    assert_equal(everything(again), expected)
    assert again.host.seeds() == views


@pytest.mark.parametrize("then", [6, 12])  # grafted meanwhile; retired and removed meanwhile
def test_a_rollback_over_another_topology_restores_bit_for_bit(then):
    shelf = Shelf()
    driver, site, seed_id = fresh("mlp", shelf)
    torch.manual_seed(1)
    play(driver, site, seed_id, 3)
    growth = driver.host.growth_state()
    module = {k: t.clone() for k, t in driver.host.state_dict().items()}
    views = driver.host.seeds()
    kept = copy.deepcopy(dict(_tensors(growth)))
    version = driver.host.topology_version
    play(driver, site, seed_id, then)
    assert_equal(dict(_tensors(growth)), kept)
    driver.host.load_growth_state(growth)
    driver.host.load_state_dict(module)
    assert driver.host.seeds() == views
    assert driver.host.topology_version > version
    assert_equal(dict(_tensors(driver.host.growth_state())), kept)
    assert_equal(dict(driver.host.state_dict()), module)
    driver.optimizer = torch.optim.AdamW([p for _, p in driver.host.live_parameters()], lr=1e-2)
    driver.train(4)
    assert_equal(dict(_tensors(growth)), kept)


def test_a_state_is_json_and_tensors():
    shelf = Shelf()
    driver, site, seed_id = fresh("mlp", shelf)
    play(driver, site, seed_id, 2)

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    assert json.loads(json.dumps(plain(driver.host.growth_state())))["layers"][0]["site"] == "1"


def test_a_seed_that_still_waits_for_its_kernel_asks_again():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf, wait=False)
    driver = Driver("mlp", host)
    kernel_id = shelf.put("mlp_adapter", host.sites["1"])
    driver.command(Action.GERMINATE, "1", "s0", kernel_id=kernel_id)
    state = host.growth_state()
    host.close()
    shelf.fetched.clear()

    again = wrapped("mlp")
    again.load_growth_state(state)
    assert again.seeds()[0].stage is SeedStage.GERMINATED
    again.attach(shelf, PUBLIC, wait=False)
    for future in [load.future for load in again._life.arrivals._loading.values()]:
        future.exception(timeout=30)
    again.prepare(0, epoch=0, steps_per_epoch=1, observe=False)
    assert shelf.fetched == [kernel_id]
    assert again.seeds()[0].num_parameters > 0
    again.close()


def test_a_state_of_another_host_is_refused_and_changes_nothing():
    shelf = Shelf()
    driver, site, seed_id = fresh("mlp", shelf)
    play(driver, site, seed_id, 2)
    before = driver.host.seeds()
    with pytest.raises(ConflictError, match="sites"):
        driver.host.load_growth_state(wrapped("cnn").growth_state())
    with pytest.raises(ConflictError, match="version"):
        driver.host.load_growth_state(driver.host.growth_state() | {"version": 99})
    assert driver.host.seeds() == before
