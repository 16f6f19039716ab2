from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from kasmina_support import PUBLIC, Cnn, Driver, Shelf, Transformer, assert_equal, mlp
from torch import nn

from esper.kasmina import export, wrap
from esper.kasmina.sites import SiteWarning, find_sites
from esper.leyline import SiteError, SiteKind, SiteSignature

TOKENS = torch.randint(11, (2, 5))


def test_an_mlp_grows_after_its_activations_and_not_at_its_logits():
    assert find_sites(mlp(), (torch.randn(4, 6),)) == {
        "1": SiteSignature(kind=SiteKind.VECTOR, channels=8),
        "3": SiteSignature(kind=SiteKind.VECTOR, channels=8),
    }


def test_a_cnn_grows_after_activation_or_norm():
    image = torch.randn(2, 1, 6, 6)
    expected = SiteSignature(kind=SiteKind.FEATURE_MAP, channels=4, extent=(6, 6))
    # the second run's activation is a function, so the norm closes it
    assert find_sites(Cnn(), (image,)) == {"stem.2": expected, "norm": expected}


def test_a_transformer_grows_at_its_blocks():
    signature = SiteSignature(kind=SiteKind.SEQUENCE, channels=8, extent=(5,), causal=True)
    assert find_sites(Transformer(), (TOKENS,), causal=True) == {"blocks.0": signature, "blocks.1": signature}


def test_a_pool_after_the_activation_closes_the_run_unless_it_leaves_one_position():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    assert list(find_sites(net, (torch.randn(2, 1, 12, 12),))) == ["2", "4"]


def test_blocks_inside_a_frame_are_found():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return F.relu(self.conv(x) + self.shortcut(x))

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Sequential(Residual(), Residual()), Residual()])

        def forward(self, x):
            for stage in self.stages:
                x = stage(x)
            return x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)  # registered first, called last
            self.backbone = Backbone()

        def forward(self, x):
            return self.head(self.backbone(x).mean((2, 3)))

    assert list(find_sites(Net(), (torch.randn(2, 4, 6, 6),))) == [
        "backbone.stages.0.0",
        "backbone.stages.0.1",
        "backbone.stages.1",
    ]


def test_what_is_called_twice_is_no_site():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.head(self.relu(self.two(self.relu(self.one(x)))))

    assert list(find_sites(Shared(), (torch.randn(2, 4),))) == ["one", "two"]
    with pytest.raises(SiteError, match="calls it 2 times"):
        find_sites(Shared(), (torch.randn(2, 4),), sites=["relu"])


def test_globs_stay_within_one_part_of_a_path():
    sites = find_sites(Transformer(), (TOKENS,), sites=["blocks.*", "blocks.0.mlp.1"])
    assert list(sites) == ["blocks.0.mlp.1", "blocks.0", "blocks.1"]


class Output(OrderedDict):
    """What blocks of Hugging Face's models put out: entries are attributes too, and nothing is updated."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def update(self, *args, **kwargs):
        raise TypeError("update is refused")


class Pair(nn.Module):
    """A block with two inputs and two outputs."""

    def __init__(self, form):
        super().__init__()
        self.one, self.two, self.form = nn.Linear(4, 4), nn.Linear(4, 4), form

    def forward(self, x, memory):
        x, memory = self.one(x + memory).relu(), self.two(memory).relu()
        if self.form is tuple:
            return x, memory, "kept"
        out = self.form()
        out["x"], out["memory"], out["note"] = x, memory, "kept"
        return out


class Pairs(nn.Module):
    def __init__(self, form=tuple):
        super().__init__()
        self.blocks = nn.ModuleList(Pair(form) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        memory = x
        for block in self.blocks:
            out = block(x, memory)
            if isinstance(out, Output):
                x, memory, note = out.x, out.memory, out.note
            else:
                x, memory, note = out.values() if isinstance(out, dict) else out
            assert note == "kept"
        return self.head(x + memory)


@pytest.mark.parametrize(("form", "names"), [(tuple, ("0", "1")), (dict, ("x", "memory")), (Output, ("x", "memory"))])
def test_of_several_outputs_one_tensor_is_named(form, names):
    net, x = Pairs(form), (torch.randn(2, 4),)
    vector = SiteSignature(kind=SiteKind.VECTOR, channels=4)
    first, second = names
    assert find_sites(net, x, sites=[f"blocks.1#{second}"]) == {f"blocks.1#{second}": vector}
    assert list(find_sites(net, x, sites=[f"blocks.*#{first}"])) == [f"blocks.0#{first}", f"blocks.1#{first}"]
    assert list(find_sites(net, x)) == [f"blocks.0#{first}", f"blocks.1#{first}"], "auto takes the first that fits"
    with pytest.raises(SiteError, match=f"not one tensor; name one of it: blocks.0#{first}, blocks.0#{second}"):
        find_sites(net, x, sites=["blocks.0"])
    with pytest.raises(SiteError, match=f"has no '7'; it has blocks.0#{first}"):
        find_sites(net, x, sites=["blocks.0#7"])
    with pytest.raises(SiteError, match="has no '0'"):
        find_sites(net, x, sites=["head#0"])


@pytest.mark.parametrize(("form", "part"), [(tuple, "1"), (dict, "memory"), (Output, "memory")])
def test_a_kernel_grows_on_the_named_tensor_and_lets_the_others_pass(form, part):
    torch.manual_seed(0)
    net, x = Pairs(form), torch.randn(8, 4)
    site = f"blocks.0#{part}"
    host = wrap(net, example=(x,), sites=site)
    shelf = Shelf()
    host.attach(shelf, PUBLIC, wait=True)
    driver = Driver("mlp", host)
    driver.batches = [(x, torch.randint(3, (8,)))]
    driver.to_fossil(site, shelf.put("mlp_adapter", host.sites[site]))
    seen = []
    handle = net.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out))
    before = nn.ReLU()(net.blocks[0].two(x))
    kernel = net.get_submodule(f"_esper.blocks/0#{part}.s0")
    host.eval()
    with torch.no_grad():
        expected = host(x)
        ((value, memory, note),) = [out if form is tuple else out.values() for out in seen]
        assert torch.equal(memory, before + kernel(before)), "the kernel's own arithmetic reached the tensor"
        assert torch.equal(value, net.blocks[0].one(x + x).relu())
        assert note == "kept"
        handle.remove()
        plain = pickle.loads(pickle.dumps(export(host)))
        assert torch.equal(plain(x), expected)
        assert not any("esper" in type(m).__module__ for m in plain.modules())


class Fixed(dict):
    """A dict of a class of its own; what `|` makes of it is a plain one."""


def test_no_tensor_is_taken_out_of_a_class_that_would_lose_its_form():
    with pytest.raises(SiteError, match="it puts out Fixed"):
        find_sites(Pairs(Fixed), (torch.randn(2, 4),), sites=["blocks.0"])


class Answer(NamedTuple):
    logits: torch.Tensor


@dataclass
class Record:
    logits: torch.Tensor


@pytest.mark.parametrize("form", [dict, Output, Answer, Record])
def test_what_the_model_puts_out_is_no_site_however_it_is_wrapped(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = self.head(self.body(x))
            if issubclass(form, dict):
                out = form()
                out["logits"] = h
                return out
            return form(h)

    with pytest.raises(SiteError, match="own output"):
        find_sites(Net(), (torch.randn(2, 4),), sites=["head"])


def test_sites_by_the_name_of_a_class():
    assert list(find_sites(Transformer(), (TOKENS,), sites=["Block"])) == ["blocks.0", "blocks.1"]
    assert list(find_sites(Pairs(), (torch.randn(2, 4),), sites=["Pair#1"])) == ["blocks.0#1", "blocks.1#1"]
    with pytest.raises(SiteError, match=r"'MultiheadAttention' .*blocks.0.attention: it puts out tuple"):
        find_sites(Transformer(), (TOKENS,), sites=["MultiheadAttention"])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("block.0", "did you mean blocks.0"),
        ("nowhere", "it has embed, blocks.0"),
        ("head", "own output"),
        ("blocks", "does not call it"),
        ("blocks.0.attention", "puts out tuple"),
    ],
)
def test_a_wrong_site_is_named_with_its_reason(pattern, words):
    with pytest.raises(SiteError) as raised:
        find_sites(Transformer(), (TOKENS,), sites=[pattern])
    assert words in str(raised.value)
    assert raised.value.field == "sites"


def test_a_model_without_a_place_says_so():
    with pytest.raises(SiteError, match="no place"):
        find_sites(nn.Linear(3, 2), (torch.randn(2, 3),))


def test_probing_changes_nothing():
    class Noisy(Cnn):
        def forward(self, x):
            return super().forward(x + torch.rand(()) + random.random())

    torch.manual_seed(0)
    model = Noisy()
    model.drop.eval()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    find_sites(model, (torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)),))
    assert_equal(dict(model.state_dict()), before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert all(not m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


class Frame(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_a_model_that_only_frames_another_has_the_sites_of_that_one():
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    own = list(find_sites(inner, (x,)))
    assert own == ["1", "3"]
    assert list(find_sites(Frame(Frame(inner)), (x,))) == [f"inner.inner.{name}" for name in own]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.blocks[1](self.blocks[1](self.blocks[0](x)))
        return self.head(self.blocks[2](h))


def test_a_pattern_says_which_of_its_modules_it_leaves_out():
    with pytest.warns(SiteWarning, match=r"blocks\.1: the forward calls it 2 times"):
        found = find_sites(Twice(), (torch.randn(2, 4),), sites=["blocks.*"])
    assert list(found) == ["blocks.0", "blocks.2"]


class Listing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return [self.linear(x)]


class OfLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Listing(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x)[0])


def test_a_model_without_a_place_is_told_why_of_its_blocks():
    with pytest.raises(SiteError) as refused:
        find_sites(OfLists(), (torch.randn(2, 4),))
    assert "block: it puts out list, not one tensor; of a plain tuple or a dict one could be named" in str(
        refused.value
    )
