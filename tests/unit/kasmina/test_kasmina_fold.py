"""Fossils folded into the linear layer whose output they grow: the same function, fewer parts."""

from __future__ import annotations

import pytest
import torch
from kasmina_support import PUBLIC, Driver, Shelf, batches, build, grown, random_ir
from torch import nn

from esper.config import KasminaConfig
from esper.kasmina import export, export_folded, wrap
from esper.leyline import BlueprintIR, Node, SiteKind

SITE = "2"
REPLACES = random_ir().model_copy(update={"replaces": True})
AFFINE = BlueprintIR(
    fit=(SiteKind.VECTOR,),
    nodes=(
        Node(id="a", op="linear", params={"out": "max(1, C//2)"}),
        Node(id="b", op="linear", params={"out": "C"}, inputs=("a",)),
        Node(id="s", op="scale", inputs=("b",)),
        Node(id="sum", op="add", inputs=("s", "h")),
    ),
    output="sum",
)


def driver_of(*designs, bias=True):
    """A multilayer perceptron whose middle layer carries these designs as fossils, and has trained with them."""
    model = build("mlp")
    if not bias:
        model[int(SITE)].bias = None
    shelf = Shelf()
    host = wrap(model, example=(batches("mlp", 1)[0][0],), sites=SITE, config=KasminaConfig())
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host)
    for design in designs:
        seed = host.seeds()[-1].seed_id
        driver.to_fossil(SITE, shelf.put(design, host.sites[SITE]), seed)
    return driver


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "designs", [["low_rank_adapter"], [AFFINE], [REPLACES], ["low_rank_adapter", AFFINE, REPLACES]]
)
def test_linear_into_linear_is_one_layer(designs, bias):
    host = driver_of(*designs, bias=bias).host.eval()
    before = {name: tensor.clone() for name, tensor in host.module.state_dict().items()}
    plain, told = export_folded(host)
    assert [folding.refused for folding in told] == [""] * len(designs)
    assert [type(module) for module in plain] == [type(module) for module in build("mlp")]
    assert not any("grown" in name for name, _ in plain.named_modules())
    for x, _ in batches("mlp", 3, seed=99):
        with torch.no_grad():
            close(plain(x), host(x))
            assert not torch.equal(plain(x), export(build_without(host))(x)), "the kernels had no part in it"
    assert all(torch.equal(tensor, before[name]) for name, tensor in host.module.state_dict().items())


def build_without(host):
    """The wrapped model, its kernels zeroed."""
    import copy

    model = copy.deepcopy(host.module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("_esper."):
                parameter.zero_()
    return model


def test_gradients_reach_the_folded_layer():
    plain, _ = export_folded(driver_of(AFFINE).host)
    x, target = batches("mlp", 1)[0]
    nn.functional.cross_entropy(plain(x), target).backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


def test_what_is_not_linear_stays_and_keeps_what_runs_after_it():
    host = driver_of("low_rank_adapter", "mlp_adapter", "low_rank_adapter").host.eval()
    plain, told = export_folded(host)
    assert [folding.refused for folding in told] == [
        "", "layernorm is not linear", "mlp_adapter, which runs before it, stays",
    ]  # fmt: skip
    assert len(list(plain.get_submodule(SITE).grown.children())) == 2
    x = batches("mlp", 1, seed=99)[0][0]
    with torch.no_grad():
        close(plain(x), host(x))


@pytest.mark.parametrize(("name", "words"), [("mlp", "is the output of ReLU"), ("cnn", "is the output of ReLU")])
def test_a_site_that_is_no_linear_layer_is_named(name, words):
    driver, _, _ = grown(name)
    plain, [folding] = export_folded(driver.host.eval())
    assert words in folding.refused
    x = batches(name, 1, seed=99)[0][0]
    with torch.no_grad():
        assert torch.equal(plain(x), driver.host(x))


def test_a_layer_that_shares_its_weights_is_left_alone():
    driver = driver_of("low_rank_adapter")
    driver.host.module.twin = nn.Linear(8, 8)
    driver.host.module.twin.weight = driver.host.module[int(SITE)].weight
    _, [folding] = export_folded(driver.host)
    assert folding.refused == "2 shares its weights with twin.weight"
