from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from kasmina_support import Cnn, Transformer, assert_equal, mlp
from torch import nn

from esper.kasmina.sites import find_sites
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
