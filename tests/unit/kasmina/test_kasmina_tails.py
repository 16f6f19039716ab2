"""Kernels that train from their site on: the gradients of a full replay, without what comes before the site."""

from __future__ import annotations

import pytest
import torch
from kasmina_support import DESIGNS, HOSTS, PUBLIC, SITES, Driver, Shelf, batches, build, class_loss
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from esper.config import CnnHost, GptHost, KasminaConfig, MlpHost, ResNetHost, VitHost
from esper.hosts import build_host
from esper.kasmina import wrap
from esper.leyline import SiteError


def after_stem(model, h, _x):
    return model.head(functional.relu(model.norm(model.conv(h))).mean((2, 3)))


def after_first_block(model, h, _tokens):
    return model.head(model.norm(model.blocks[1](h, scale=0.5)))


TAILS = {"mlp": {}, "cnn": {"stem.2": after_stem}, "transformer": {"blocks.0": after_first_block}}


def resting(model):
    """No dropout, so that two forwards are one."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def training(name, model=None, *, tails=None):
    """A driver with one seed in TRAINING at the kind's site."""
    shelf = Shelf()
    host = wrap(model or resting(build(name)), example=(batches(name, 1)[0][0],), tails=tails)
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver(name, host)
    site = SITES[name]
    seed_id = next(view.seed_id for view in host.seeds() if view.site == site)
    driver.to_training(site, shelf.put(DESIGNS[name], driver.signature(site)), seed_id)
    return driver


def step(driver, number, *, replays):
    """One step without the host's update; returns how often the host's first layer was called, and the losses."""
    calls = []
    first = next(
        module for module in driver.host.module.modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding))
    )
    handle = first.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = driver.batches[number]
    driver.host.prepare(number, epoch=0, steps_per_epoch=9, observe=False, replays=replays)
    class_loss(driver.host(x), y).backward()
    done = driver.host.train_shadows((x,), lambda out: class_loss(out, y))
    handle.remove()
    return len(calls), done.losses


def seeds_of(driver):
    return {key: t.clone() for key, t in driver.host.state_dict().items() if key.startswith("_esper.")}


@pytest.mark.parametrize("name", HOSTS)
def test_a_kernel_learns_bit_for_bit_what_a_full_replay_teaches_it(name):
    whole, part = (training(name, tails=tails) for tails in (None, TAILS[name]))
    before = seeds_of(part)
    for number in range(4):
        calls, losses = step(whole, number, replays=0)
        assert calls == 2, "the step, and the replay"
        fewer, same = step(part, number, replays=1)
        assert fewer == 1, "the step alone"
        assert same == losses
    ours, theirs = seeds_of(part), seeds_of(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert any(not torch.equal(ours[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("config", "shape", "site", "strangers"),
    [
        (MlpHost(hidden=(8, 8)), (8,), "blocks.0.1", ["head"]),
        (CnnHost(channels=(4, 4), blocks_per_stage=2), (1, 8, 8), "stages.0.1", ["stages.0.1.conv"]),
        (ResNetHost(channels=(4, 6)), (1, 8, 8), "stages.0.0", ["stem.2"]),
        (VitHost(patch=4, width=8, depth=2, heads=2), (1, 8, 8), "blocks.0", ["blocks.0.mlp", "patches"]),
        (GptHost(width=8, depth=2, heads=2, tied=True), (6,), "blocks.0", ["blocks.0#0"]),
    ],
    ids=lambda value: value.type if hasattr(value, "type") else None,
)
def test_the_hosts_of_configurations_know_what_follows_a_block(config, shape, site, strangers):
    model = build_host(config, input_shape=shape, num_outputs=7, seed=0).eval()
    seen = []
    handle = model.get_submodule(site).register_forward_hook(lambda _m, _a, h: seen.append(h))
    x = torch.randint(7, (3, *shape)) if len(shape) == 1 and config.type == "gpt" else torch.randn(3, *shape)
    expected = model(x)
    handle.remove()
    assert torch.equal(model.tail_of(site)(model, seen[0], x), expected)
    assert all(model.tail_of(place) is None for place in strangers)


def test_what_the_host_overwrites_behind_the_site_is_kept_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x = batches("mlp", 1)[0][0]
    host = wrap(model, example=(x,), sites="0")
    layer = host.module.get_submodule("_esper.0")
    layer.keep(model[0], on=True)
    host(x)
    assert torch.equal(layer.kept(), model[0](x))


def test_candidates_of_one_site_share_what_was_kept_and_parts_come_in_order():
    shelf = Shelf()
    model = build("mlp")
    x, y = batches("mlp", 1)[0]
    host = wrap(model, example=(x,), config=KasminaConfig(race=2))
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host)
    for number in range(2):
        driver.to_training("1", shelf.put("mlp_adapter", host.sites["1"], seed=number), f"s{number}")
    host.prepare(0, epoch=0, steps_per_epoch=9, observe=False, replays=2)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    expected = []
    for part, target in parts:
        loss = class_loss(host(part), target)
        loss.backward()
        expected.append(loss.item())
    for (part, target), loss in zip(parts, expected, strict=True):
        found = host.train_shadows((part,), lambda out, y=target: class_loss(out, y)).losses
        assert found["s0"] == pytest.approx(loss, abs=1e-2), "a kernel of zeros is the host"
        assert set(found) == {"s0", "s1"}


@pytest.mark.parametrize("sizes", [(3,), (16, 16)], ids=["another number of samples", "more forwards than announced"])
def test_a_batch_that_no_forward_is_known_to_have_seen_is_replayed_whole(sizes):
    whole, part = training("mlp"), training("mlp")
    x, y = part.batches[0]
    part.host.prepare(0, epoch=0, steps_per_epoch=9, observe=False, replays=1)
    for size in sizes:
        part.host(part.batches[1][0][:size])
    losses = [driver.host.train_shadows((x,), lambda out: class_loss(out, y)).losses for driver in (whole, part)]
    assert losses[0] == losses[1]
    ours, theirs = seeds_of(part), seeds_of(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_hook_around_the_site_asks_for_the_whole_replay():
    driver = training("mlp")
    driver.host.module.register_forward_hook(lambda _m, _a, out: 2 * out)
    assert step(driver, 0, replays=1)[0] == 2


class Checkpointed(nn.Module):
    """Runs its first block again in the backward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.rest = nn.Linear(8, 3)

    def forward(self, x):
        return self.rest(checkpoint(self.first, x, use_reentrant=False))


def test_a_forward_that_is_repeated_in_the_backward_counts_once():
    host = wrap(Checkpointed(), example=(torch.randn(2, 6),), sites="first")
    layer = host.module.get_submodule("_esper.first")
    layer.keep(host.module.first, on=True)
    x = torch.randn(4, 6, requires_grad=True)
    host(x).sum().backward()
    assert layer.num_kept == 1


@pytest.mark.parametrize(
    ("tails", "words"),
    [
        ({"stem.9": after_stem}, "no site of this model"),
        ({"stem.2": lambda model, h, _x: model.head(h.mean((2, 3)))}, "does not put out what the model does"),
        ({"stem.2": lambda model, h: h}, "raised TypeError"),
        ({"stem.2": lambda model, h, x: (model(x), h)}, "does not put out what the model does"),
    ],
    ids=["site", "arithmetic", "arguments", "outputs"],
)
def test_a_tail_that_does_not_hold_is_refused_and_the_model_left_as_it_was(tails, words):
    model = build("cnn")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(SiteError, match=words) as caught:
        wrap(model, example=(batches("cnn", 1)[0][0],), tails=tails)
    assert caught.value.field == "tails"
    assert caught.value.remedy
    assert not hasattr(model, "_esper")
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
