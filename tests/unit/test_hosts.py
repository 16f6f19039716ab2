import math

import pytest
import torch
from torch import nn

from esper.config import CnnHost, GivenHost, GptHost, ImportedHost, MlpHost, ResNetHost, VitHost
from esper.hosts import Gpt, TransformerBlock, build_host
from esper.kasmina.sites import find_sites
from esper.leyline import ConfigError


def build(config, shape=(1, 8, 8), outputs=10, seed=0):
    return build_host(config, input_shape=shape, num_outputs=outputs, seed=seed)


def test_mlp_64_8_10():
    host = build(MlpHost(hidden=(8,)), shape=(64,))
    assert host(torch.randn(3, 64)).shape == (3, 10)
    assert sum(p.numel() for p in host.parameters()) == 64 * 8 + 8 + 8 * 10 + 10
    assert list(host.state_dict()) == ["blocks.0.0.weight", "blocks.0.0.bias", "head.weight", "head.bias"]


def test_mlp_flattens_images():
    assert build(MlpHost())(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_cnn_halves_every_stage_but_the_first():
    host = build(CnnHost(channels=(4, 8, 16), blocks_per_stage=2))
    shapes, x = [], torch.randn(2, 1, 8, 8)
    for stage in host.stages:
        x = stage(x)
        shapes.append(tuple(x.shape))
    assert shapes == [(2, 4, 8, 8), (2, 8, 4, 4), (2, 16, 2, 2)]
    assert host(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert [len(stage) for stage in host.stages] == [2, 2, 2]


def test_cnn_reads_patches_first_only_where_asked_for():
    host, x = build(CnnHost(patch=4, channels=(4, 8)), shape=(1, 16, 16)), torch.randn(2, 1, 16, 16)
    assert host.stages(host.stem(x)).shape == (2, 8, 2, 2)
    assert host(x).shape == (2, 10)
    assert list(find_sites(host, (x,))) == ["stem", "stages.0.0", "stages.1.0"]
    assert not [name for name in build(CnnHost()).state_dict() if name.startswith("stem")]


def test_cnn_dropout_is_a_module_only_where_asked_for():
    def dropouts(host):
        return [m for m in host.modules() if isinstance(m, nn.Dropout2d)]

    assert not dropouts(build(CnnHost()))
    assert len(dropouts(build(CnnHost(channels=(4,), blocks_per_stage=3, dropout=0.1)))) == 3


def test_resnet_downsamples_where_a_block_changes_the_shape():
    host = build(ResNetHost(channels=(4, 8), blocks_per_stage=2))
    blocks = [block for stage in host.stages for block in stage]
    assert [block.downsample is not None for block in blocks] == [False, False, True, False]
    assert host.stages(host.stem(torch.randn(2, 1, 8, 8))).shape == (2, 8, 4, 4)
    assert host(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_a_residual_block_adds_its_branch_to_its_input():
    block = build(ResNetHost(channels=(4,))).stages[0][0].eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(block(x), x)


def test_vit_sees_every_patch_from_every_other():
    host = build(VitHost(width=16, heads=2)).eval()
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    assert host.positions_TD.shape == (16, 16)
    seen = []
    host.blocks.register_forward_hook(lambda m, args, out: seen.append(out))
    assert host(x).shape == (1, 10)
    first_position = torch.autograd.grad(seen[0][0, 0].sum(), x)[0]
    assert first_position[..., -1, -1].abs() > 0, "the last patch reaches the first position"


def gpt(**overrides):
    return build(GptHost(width=16, depth=2, heads=4, **overrides), shape=(12,), outputs=30)


def test_gpt_gives_logits_for_every_position():
    host = gpt()
    assert host(torch.randint(30, (2, 12))).shape == (2, 12, 30)
    assert host(torch.randint(30, (2, 5))).shape == (2, 5, 30)
    assert all(isinstance(block, TransformerBlock) for block in host.blocks)


def test_gpt_sees_no_later_position():
    host = gpt().eval()
    tokens = torch.randint(30, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (tokens[0, 8:] + 1) % 30
    before, after = host(tokens), host(changed)
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_gpt_starts_at_the_loss_of_a_uniform_guess():
    host, tokens = gpt(), torch.randint(30, (8, 12))
    loss = nn.functional.cross_entropy(host(tokens).flatten(0, 1), torch.randint(30, (96,)))
    assert abs(loss.item() - math.log(30)) < 0.1


def test_tied_head_shares_the_embedding():
    tied, untied = gpt(tied=True), gpt()
    assert isinstance(tied, Gpt)
    assert tied.head.weight is tied.tokens.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 30 * 16


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MlpHost(), (64,)),
        (CnnHost(), (1, 8, 8)),
        (ResNetHost(), (1, 8, 8)),
        (VitHost(), (1, 8, 8)),
        (GptHost(width=8, heads=2), (6,)),
    ],
)
def test_weights_depend_on_the_seed_alone(config, shape):
    torch.manual_seed(1)
    first = build(config, shape, seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(config, shape, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build(config, shape, seed=8).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_imported_host_is_called_with_its_args_and_seeded():
    config = ImportedHost(target="torch.nn:Linear", args={"in_features": 3, "out_features": 2})
    host = build(config)
    assert isinstance(host, nn.Linear)
    assert torch.equal(host.weight, build(config).weight)


@pytest.mark.parametrize(
    ("config", "shape", "words"),
    [
        (CnnHost(), (64,), r"host.type: a cnn takes images .*data.layout=image"),
        (CnnHost(channels=(4, 4, 4, 4, 4)), (1, 8, 8), r"host.channels: 5 stages halve 8x8"),
        (CnnHost(patch=3), (1, 8, 8), "host.patch: patches of 3x3 do not tile 8x8"),
        (CnnHost(patch=4, channels=(4, 4, 4)), (1, 8, 8), r"host.channels: 3 stages halve 2x2"),
        (ResNetHost(), (64,), r"host.type: a resnet takes images"),
        (ResNetHost(channels=(4, 4, 4, 4, 4)), (1, 8, 8), r"host.channels: 5 stages halve 8x8"),
        (VitHost(), (64,), r"host.type: a vit takes images"),
        (VitHost(patch=3), (1, 8, 8), "host.patch: patches of 3x3 do not tile 8x8"),
        (VitHost(width=10), (1, 8, 8), "host.heads: 4 heads do not divide"),
        (GivenHost(), (8,), "host.type: this model was handed over in Python"),
        (GptHost(), (1, 8, 8), "host.type: a gpt takes tokens"),
        (GptHost(width=10, heads=4), (8,), "host.heads: 4 heads do not divide"),
        (ImportedHost(target="no.such.place:f"), (8,), "host.target: cannot import no.such.place"),
        (ImportedHost(target="torch.nn:NoSuchLayer"), (8,), "host.target: torch.nn has no function NoSuchLayer"),
        (ImportedHost(target="torch.nn:Linear", args={"width": 3}), (8,), "host.args: torch.nn:Linear was called"),
        (ImportedHost(target="math:sqrt", args={}), (8,), "host.args"),
        (ImportedHost(target="builtins:dict"), (8,), "host.target: builtins:dict returned dict"),
    ],
)
def test_an_unfit_host_names_the_key_and_the_remedy(config, shape, words):
    with pytest.raises(ConfigError, match=words):
        build(config, shape)
