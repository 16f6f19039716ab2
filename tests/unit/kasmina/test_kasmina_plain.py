"""The exported model: plain torch, equal to the grown one, picklable."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from kasmina_support import (
    HOSTS,
    PUBLIC,
    Driver,
    Shelf,
    assert_equal,
    batches,
    grown,
    order,
    random_ir,
    wrapped,
)
from torch import nn

from esper.config import KasminaConfig
from esper.kasmina import export, wrap
from esper.leyline import Action, BlendStrategy, ConflictError, SeedStage


@pytest.mark.parametrize("name", HOSTS)
def test_a_grown_model_exports_to_the_same_function(name):
    driver, site, seed_id = grown(name)
    host = driver.host
    inputs = [x for x, _ in batches(name, 3, seed=99)]
    host.eval()
    plain = export(host)
    assert not any("esper" in type(m).__module__ for m in plain.modules())
    assert not any("_esper" in key for key in plain.state_dict())
    with torch.no_grad():
        assert all(torch.equal(plain(x), host(x)) for x in inputs)
        kernel = plain.get_submodule(f"{site}.grown.{seed_id}")
        seen = []
        handle = plain.get_submodule(site).register_forward_hook(lambda m, args, out: seen.append((args, out)))
        with_kernel = plain(inputs[0])
        for parameter in kernel.parameters():
            parameter.zero_()
        without = plain(inputs[0])
        handle.remove()
    assert not torch.equal(with_kernel, without), "the kernel's own arithmetic did not reach the output"
    pickled = io.BytesIO()
    torch.save(plain, pickled)
    pickled.seek(0)
    again = torch.load(pickled, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(inputs[0]), without)


def test_the_sites_output_is_h_plus_r_of_h():
    driver, site, seed_id = grown("cnn")
    plain = export(driver.host).eval()
    seen = []
    plain.get_submodule(site).register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        plain(driver.batches[0][0])
        ((before, out),) = seen
        h = torch.relu(before)
        r = plain.get_submodule(f"{site}.grown.{seed_id}")(h)
        assert torch.equal(out, h + r)
        assert r.abs().max() > 0


def test_the_host_is_not_changed_by_an_export():
    driver, _, _ = grown("mlp")
    before = copy.deepcopy(driver.host.state_dict())
    export(driver.host)
    assert_equal(dict(driver.host.state_dict()), dict(before))
    assert driver.seed().stage is SeedStage.FOSSILIZED
    driver.run_epoch()


def test_a_half_blended_and_a_replacing_kernel_export_with_their_alpha():
    for design, site in ((random_ir(), "1"), (random_ir().model_copy(update={"replaces": True}), "3")):
        shelf = Shelf()
        host = wrapped("mlp", hub=shelf, config=KasminaConfig(ramp_epochs=2))
        seed_id = next(v.seed_id for v in host.seeds() if v.site == site)
        driver = Driver("mlp", host).to_grafting(site, shelf.put(design, host.sites[site]), seed_id)
        driver.train(3)
        assert 0 < driver.seed(seed_id).alpha < 1
        x = driver.batches[0][0]
        with torch.no_grad():
            assert torch.equal(export(host)(x), host(x))


def test_a_grown_block_stays_reachable():
    """nn.TransformerEncoder reads attributes of its first layer on every forward."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))
    x = torch.randn(2, 5, 8)
    host = wrap(model, example=(x,))
    assert list(host.sites) == ["0.layers.0", "0.layers.1"]
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    site = "0.layers.0"
    kernel_id = shelf.put("mlp_adapter", host.sites[site])
    host.close_epoch(run_id="r", epoch=0, step=0, val_loss=1.0)
    germinate = order(Action.GERMINATE, site, "s0", kernel_id=kernel_id, strategy=BlendStrategy.DIRECT)
    host.apply(germinate, run_id="r", epoch=0, step=0)
    host.apply(order(Action.ADVANCE, site, "s0"), run_id="r", epoch=0, step=0)
    with torch.no_grad():
        for name, parameter in host.live_parameters():
            if name.startswith("_esper."):
                parameter.normal_()
    host.eval()
    with torch.no_grad():
        assert torch.equal(export(host)(x), host(x))


def test_a_sequential_site_runs_its_kernels_as_its_last_child():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3))
    x = torch.randn(4, 6)
    host = wrap(model, example=(x,), sites="0")
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    host.close_epoch(run_id="r", epoch=0, step=0, val_loss=1.0)
    kernel_id = shelf.put("mlp_adapter", host.sites["0"])
    germinate = order(Action.GERMINATE, "0", "s0", kernel_id=kernel_id, strategy=BlendStrategy.DIRECT)
    host.apply(germinate, run_id="r", epoch=0, step=0)
    host.apply(order(Action.ADVANCE, "0", "s0"), run_id="r", epoch=0, step=0)
    with torch.no_grad():
        for name, parameter in host.live_parameters():
            if name.startswith("_esper."):
                parameter.normal_()
        plain = export(host)
        assert torch.equal(plain(x), host(x))
        assert [type(m).__name__ for m in plain[0]] == ["Linear", "ReLU", "Grown"]


def test_a_model_that_is_not_wrapped_cannot_be_exported():
    with pytest.raises(ConflictError, match="not wrapped"):
        export(nn.Linear(2, 2))
