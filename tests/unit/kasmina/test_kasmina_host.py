"""Wrapping: exactly the host's function, its keys, and nothing on its way while it is dormant."""

from __future__ import annotations

import copy
from itertools import groupby

import pytest
import torch
from kasmina_support import DESIGNS, HOSTS, SITES, Driver, Shelf, assert_equal, batches, build, class_loss, wrapped
from torch import nn

from esper.kasmina import Host, wrap
from esper.leyline import Action, ConflictError, SiteError
from esper.leyline.growth import Growable


def grafted(name="mlp"):
    shelf = Shelf()
    host = wrapped(name, hub=shelf)
    driver = Driver(name, host)
    site = SITES[name]
    seed_id = next(v.seed_id for v in host.seeds() if v.site == site)
    return driver.to_grafting(site, shelf.put(DESIGNS[name], host.sites[site]), seed_id)


def test_the_handle_fulfils_the_port():
    host: Growable = wrapped("mlp")
    assert isinstance(host, Host)


@pytest.mark.parametrize("name", HOSTS)
def test_wrapping_preserves_the_function_and_the_keys(name):
    plain, host = build(name), wrapped(name)
    assert type(host.module) is type(plain)
    assert_equal(dict(host.state_dict()), dict(plain.state_dict()))
    for module in (plain, host.module):
        module.train()
    x, y = batches(name, 1)[0]
    outs = []
    for model in (plain, host):
        torch.manual_seed(3)
        out = model(x)
        class_loss(out, y).backward()
        outs.append(out)
    assert torch.equal(*outs)
    for (n, ours), theirs in zip(host.module.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), n


@pytest.mark.parametrize("name", HOSTS)
def test_a_dormant_host_has_no_hook(name):
    host = wrapped(name)
    host.prepare(0, epoch=0, steps_per_epoch=4, observe=False)
    host.train_shadows((batches(name, 1)[0][0],), lambda out: out.sum())
    assert all(not m._forward_hooks for m in host.module.modules())


def test_hooks_stand_only_where_there_is_something_to_do():
    driver = grafted()
    hooked = [n for n, m in driver.host.module.named_modules() if m._forward_hooks]
    assert hooked == ["1"]
    driver.host.prepare(99, epoch=9, steps_per_epoch=4, observe=True)
    assert [n for n, m in driver.host.module.named_modules() if m._forward_hooks] == ["1", "3"]
    driver.host.prepare(100, epoch=9, steps_per_epoch=4, observe=False)
    assert [n for n, m in driver.host.module.named_modules() if m._forward_hooks] == ["1"]


def test_wrapping_twice_is_refused():
    host = wrapped("mlp")
    with pytest.raises(ConflictError, match="wrapped already"):
        wrap(host.module, example=(torch.randn(2, 6),))


def test_a_host_that_torch_cannot_call_functionally_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.type = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.type(x))

    with pytest.raises(SiteError, match="rename"):
        wrap(Odd(), example=(torch.randn(2, 4),), sites="type")


@pytest.mark.parametrize("name", HOSTS)
def test_state_dicts_fit_both_ways_before_and_after_growth(name):
    plain = build(name, seed=5)
    host = wrapped(name)
    host.load_state_dict(plain.state_dict())
    assert_equal(dict(host.state_dict()), dict(plain.state_dict()))
    build(name, seed=1).load_state_dict(host.state_dict(), strict=True)

    driver = grafted(name).train(4)
    grown = {k: t.clone() for k, t in driver.host.state_dict().items()}
    kernels = {k for k in grown if k.startswith("_esper.")}
    site = SITES[name].replace(".", "/")
    assert kernels
    assert all(k.startswith(f"_esper.{site}.s") for k in kernels)
    build(name).load_state_dict({k: t for k, t in grown.items() if k not in kernels}, strict=True)

    driver.host.load_state_dict(plain.state_dict())
    now = dict(driver.host.state_dict())
    assert_equal({k: now[k] for k in kernels}, {k: grown[k] for k in kernels})
    assert_equal({k: now[k] for k in now if k not in kernels}, dict(plain.state_dict()))

    driver.host.load_state_dict(grown)
    assert_equal(dict(driver.host.state_dict()), grown)


def test_a_state_dict_with_only_some_kernels_is_an_error():
    driver = grafted()
    state = dict(driver.host.state_dict())
    missing = min(k for k in state if k.startswith("_esper."))
    del state[missing]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{missing}"):
        driver.host.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_esper"):
        wrapped("mlp").load_state_dict(driver.host.state_dict())


def test_a_grown_host_inside_a_larger_model_loads_too():
    driver = grafted()
    outer = nn.ModuleDict({"inner": driver.host.module})
    state = {k: t.clone() for k, t in outer.state_dict().items()}
    outer.load_state_dict({k: t for k, t in state.items() if "_esper" not in k}, strict=True)
    assert_equal(dict(outer.state_dict()), state)


def test_a_deep_copy_is_a_grown_model_of_its_own():
    driver = grafted().train(4)
    model = driver.host.module
    twin = copy.deepcopy(model)
    x = driver.batches[0][0]
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        before = model(x).clone()
        for name, parameter in twin.named_parameters():
            if name.startswith("_esper."):
                parameter.normal_()
        assert torch.equal(model(x), before)
        assert not torch.equal(twin(x), before)


def test_live_parameters_are_the_hosts_own_and_then_the_kernels_by_age():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    own = [n for n, _ in host.module.named_parameters()]
    driver = Driver("mlp", host)
    kernel_id = shelf.put("mlp_adapter", host.sites["3"])
    driver.to_training("1", kernel_id, "s0")
    assert [n for n, _ in host.live_parameters()] == own
    driver.to_grafting("3", kernel_id, "s1")
    host.record_evidence("s0", driver.seed("s1").evidence)
    driver.command(Action.ADVANCE, "1", "s0")
    live = [n for n, _ in host.live_parameters()]
    names = dict(host.module.named_parameters())
    assert live[: len(own)] == own
    assert [seed_id for seed_id, _ in groupby(n.split(".")[2] for n in live[len(own) :])] == ["s1", "s0"]
    assert all(parameter is names[name] for name, parameter in host.live_parameters())


def test_the_handle_delegates_to_the_model():
    host = wrapped("cnn")
    assert host.eval() is host
    assert not any(m.training for m in host.module.modules())
    assert host.train() is host
    assert all(m.training for m in host.module.modules())
    assert [id(p) for p in host.parameters()] == [id(p) for p in host.module.parameters()]
    assert host.to(torch.float64) is host
    assert next(host.parameters()).dtype is torch.float64


def test_a_kernel_in_training_moves_with_the_host():
    shelf = Shelf()
    host = wrapped("mlp", hub=shelf)
    driver = Driver("mlp", host).to_training("1", shelf.put("mlp_adapter", host.sites["1"])).train(2)
    host.to(torch.float64)
    x, y = driver.batches[0]
    assert "s0" in host.train_shadows((x.double(),), lambda out: class_loss(out, y)).losses
