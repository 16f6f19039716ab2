"""The host networks that a configuration can name: plain PyTorch, with nothing of Esper inside.

Blocks stand in `nn.Sequential` or `nn.ModuleList`, because that is where seeds are looked for. Each host tells by
`tail_of` what follows a block, so that a kernel can train there without a replay of what comes before. Shape suffixes:
B batch, C channels, H height, W width, T positions, D width of a transformer, V vocabulary.
"""
# ruff: noqa: N803, N806 -- shapes stand as suffixes

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from esper.config import CnnHost, GivenHost, GptHost, Host, ImportedHost, MlpHost, ResNetHost, RunHost, VitHost
from esper.leyline.chains import Tail, is_chain, rest_of
from esper.leyline.errors import ConfigError


def build_host(config: Host, *, input_shape: Sequence[int], num_outputs: int, seed: int) -> nn.Module:
    """Builds the network, with initial weights that depend on `seed` alone.

    The global CPU generator is left as it was, also by an imported host that draws from it.

    Args:
        config: which network.
        input_shape: of one sample: (features,), (C, H, W) or (T,) for tokens.
        num_outputs: classes, regression targets or vocabulary.
        seed: of the initial weights.

    Raises:
        ConfigError: if the network does not go with the data, or an imported one cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match config:
            case MlpHost():
                return Mlp(math.prod(input_shape), config.hidden, num_outputs)
            case CnnHost():
                return _build_cnn(config, input_shape, num_outputs)
            case ResNetHost():
                return _build_resnet(config, input_shape, num_outputs)
            case VitHost():
                return _build_vit(config, input_shape, num_outputs)
            case GptHost():
                return _build_gpt(config, input_shape, num_outputs)
            case ImportedHost():
                return _import_host(config)
            case RunHost():
                raise ConfigError(
                    "the network of a run is built from that run's checkpoint, not from a configuration alone",
                    field="host.type",
                    remedy="esper train takes it; in Python: esper.api.checkpoint_host and esper.kasmina.export",
                )
            case GivenHost():
                raise ConfigError(
                    "this model was handed over in Python and cannot be built from a configuration",
                    field="host.type",
                    remedy="call esper.grow, or name one of mlp, cnn, resnet, vit, gpt, import",
                )


class Mlp(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        num_inputs: features of a flattened sample.
        hidden: widths of the hidden layers.
        num_outputs: width of the last layer.
    """

    def __init__(self, num_inputs: int, hidden: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        widths = [num_inputs, *hidden]
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairs))
        self.head = nn.Linear(widths[-1], num_outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (B, outputs); samples are flattened."""
        return self.readout(self.blocks(x.flatten(1)))

    def readout(self, h: torch.Tensor) -> torch.Tensor:
        """What follows the blocks."""
        return self.head(h)

    def tail_of(self, site: str) -> Tail | None:
        """What follows a block."""
        return _tail(self, "blocks", site)


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU, and dropout of whole channels where asked for.

    No `nn.Sequential`, so that the block as a whole is one place for seeds.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_inputs, num_outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(num_outputs)
        self.act = nn.ReLU()
        self.drop = nn.Dropout2d(dropout) if dropout > 0 else None

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        x_BCHW = self.act(self.norm(self.conv(x_BCHW)))
        return x_BCHW if self.drop is None else self.drop(x_BCHW)


class Patches(nn.Module):
    """A convolution of squares that do not overlap, batch norm and ReLU: fewer positions, from the first layer on."""

    def __init__(self, num_inputs: int, num_outputs: int, *, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_inputs, num_outputs, side, stride=side, bias=False)
        self.norm = nn.BatchNorm2d(num_outputs)
        self.act = nn.ReLU()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, outputs, H / side, W / side)."""
        return self.act(self.norm(self.conv(x_BCHW)))


class Cnn(nn.Module):
    """Stages of `ConvBlock`; each but the first begins with stride 2. Global average pool and a linear head.

    Args:
        num_inputs: image channels.
        channels: channels of each stage.
        blocks_per_stage: blocks in each stage.
        num_outputs: width of the head.
        dropout: share of channels dropped after each block.
        patch: side of the `Patches` before the first stage; 1 is none.
    """

    def __init__(
        self,
        num_inputs: int,
        channels: Sequence[int],
        blocks_per_stage: int,
        num_outputs: int,
        *,
        dropout: float = 0.0,
        patch: int = 1,
    ) -> None:
        super().__init__()
        self.stem = Patches(num_inputs, channels[0], side=patch) if patch > 1 else None
        if self.stem is not None:
            num_inputs = channels[0]
        self.stages = nn.Sequential()
        for index, width in enumerate(channels):
            stage = nn.Sequential()
            for block in range(blocks_per_stage):
                stride = 2 if index > 0 and block == 0 else 1
                stage.append(ConvBlock(num_inputs, width, stride=stride, dropout=dropout))
                num_inputs = width
            self.stages.append(stage)
        self.head = nn.Linear(num_inputs, num_outputs)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, outputs)."""
        if self.stem is not None:
            x_BCHW = self.stem(x_BCHW)
        return self.readout(self.stages(x_BCHW))

    def readout(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        """What follows the stages."""
        return self.head(h_BCHW.mean(dim=(2, 3)))

    def tail_of(self, site: str) -> Tail | None:
        """What follows a block."""
        return _tail(self, "stages", site)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a skip around them (He et al. 2015, the basic block).

    Where the block changes its input's shape, the skip is a strided 1x1 convolution with batch norm.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_inputs, num_outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(num_outputs)
        self.conv2 = nn.Conv2d(num_outputs, num_outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(num_outputs)
        self.act = nn.ReLU()
        self.downsample = (
            nn.Sequential(nn.Conv2d(num_inputs, num_outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(num_outputs))
            if stride != 1 or num_inputs != num_outputs
            else None
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        skip_BCHW = x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        branch_BCHW = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x_BCHW)))))
        return self.act(branch_BCHW + skip_BCHW)


class ResNet(nn.Module):
    """A stem and stages of `ResidualBlock`; each stage but the first begins with stride 2. A pooled linear head.

    Args:
        num_inputs: image channels.
        channels: channels of each stage.
        blocks_per_stage: blocks in each stage.
        num_outputs: width of the head.
    """

    def __init__(self, num_inputs: int, channels: Sequence[int], blocks_per_stage: int, num_outputs: int) -> None:
        super().__init__()
        width = channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(num_inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential()
        for index, stage_width in enumerate(channels):
            stage = nn.Sequential()
            for block in range(blocks_per_stage):
                stage.append(ResidualBlock(width, stage_width, stride=2 if index > 0 and block == 0 else 1))
                width = stage_width
            self.stages.append(stage)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, outputs)."""
        return self.readout(self.stages(self.stem(x_BCHW)))

    def readout(self, h_BCHW: torch.Tensor) -> torch.Tensor:
        """What follows the stages."""
        return self.head(h_BCHW.mean(dim=(2, 3)))

    def tail_of(self, site: str) -> Tail | None:
        """What follows a block."""
        return _tail(self, "stages", site)


class Attention(nn.Module):
    """Multi-head self-attention; causal, a position sees itself and those before it only."""

    def __init__(self, width: int, heads: int, *, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Pre-norm attention and a 4x MLP, each with its own skip."""

    def __init__(self, width: int, heads: int, *, dropout: float, causal: bool = True) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout=dropout, causal=causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """(B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.drop(self.attention(self.attention_norm(x_BTD)))
        return x_BTD + self.drop(self.mlp(self.mlp_norm(x_BTD)))


class Gpt(nn.Module):
    """A decoder-only transformer with learned positions.

    Args:
        vocabulary: number of tokens.
        context: the longest sequence.
        width, depth, heads: of the transformer.
        dropout: after the embedding, in attention and after each branch.
        tied: whether the head shares the embedding's weights.
    """

    def __init__(
        self, *, vocabulary: int, context: int, width: int, depth: int, heads: int, dropout: float, tied: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout=dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialise(depth)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """(B, T) token numbers to (B, T, V) logits; T is at most the context."""
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.drop(self.tokens(tokens_BT) + self.positions(places_T))
        return self.readout(self.blocks(x_BTD))

    def readout(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """What follows the blocks."""
        return self.head(self.norm(h_BTD))

    def tail_of(self, site: str) -> Tail | None:
        """What follows a block."""
        return _tail(self, "blocks", site)

    def _initialise(self, depth: int) -> None:
        """GPT-2's scheme: normal of 0.02, and branches' last layers smaller by the root of their number."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                is_last = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if is_last else 0.02)


class Vit(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020): patches, learned positions, pre-norm blocks, mean over positions.

    Args:
        num_inputs: image channels.
        size: (H, W) of an image, multiples of `patch`.
        patch: side of a square patch.
        width, depth, heads: of the transformer.
        num_outputs: width of the head.
        dropout: after the embedding, in attention and after each branch.
    """

    def __init__(
        self,
        num_inputs: int,
        size: Sequence[int],
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        num_outputs: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(num_inputs, width, patch, stride=patch)
        self.positions_TD = nn.Parameter(torch.randn((size[0] // patch) * (size[1] // patch), width) * 0.02)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, heads, dropout=dropout, causal=False) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, outputs)."""
        x_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        return self.readout(self.blocks(self.drop(x_BTD + self.positions_TD)))

    def readout(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """What follows the blocks."""
        return self.head(self.norm(h_BTD).mean(dim=1))

    def tail_of(self, site: str) -> Tail | None:
        """What follows a block."""
        return _tail(self, "blocks", site)


def _tail(host: nn.Module, chain: str, site: str) -> Tail | None:
    """What follows a site within the host's chain of blocks; None for a place inside a block, or outside the chain."""
    path = site.removeprefix(f"{chain}.")
    if path == site or "#" in site or not is_chain(host.get_submodule(chain), path):
        return None
    return partial(_from_block, chain=chain, path=path)


def _from_block(host: Any, h: torch.Tensor, *_inputs: torch.Tensor, chain: str, path: str) -> torch.Tensor:
    return host.readout(rest_of(host.get_submodule(chain), path, h))


def _build_cnn(config: CnnHost, input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    _check_images(config.type, input_shape)
    _check_patches(config.patch, input_shape)
    _check_stages(config.channels, [input_shape[0], *(side // config.patch for side in input_shape[1:])])
    return Cnn(
        input_shape[0],
        config.channels,
        config.blocks_per_stage,
        num_outputs,
        dropout=config.dropout,
        patch=config.patch,
    )


def _build_resnet(config: ResNetHost, input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    _check_images(config.type, input_shape)
    _check_stages(config.channels, input_shape)
    return ResNet(input_shape[0], config.channels, config.blocks_per_stage, num_outputs)


def _build_vit(config: VitHost, input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    _check_images(config.type, input_shape)
    _check_heads(config.width, config.heads)
    _check_patches(config.patch, input_shape)
    return Vit(
        input_shape[0],
        input_shape[1:],
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_outputs=num_outputs,
        dropout=config.dropout,
    )


def _check_patches(patch: int, input_shape: Sequence[int]) -> None:
    if any(side % patch for side in input_shape[1:]):
        raise ConfigError(
            f"patches of {patch}x{patch} do not tile {input_shape[1]}x{input_shape[2]} pixels",
            field="host.patch",
            remedy="give a divisor of both sides",
        )


def _check_images(kind: str, input_shape: Sequence[int]) -> None:
    if len(input_shape) != 3:
        raise ConfigError(
            f"a {kind} takes images of (C, H, W), the data has samples of shape {tuple(input_shape)}",
            field="host.type",
            remedy="choose host.type=mlp, or data with images (digits: data.layout=image)",
        )


def _check_stages(channels: Sequence[int], input_shape: Sequence[int]) -> None:
    halvings = len(channels) - 1
    if min(input_shape[1:]) < 2**halvings:
        raise ConfigError(
            f"{len(channels)} stages halve {input_shape[1]}x{input_shape[2]} pixels to nothing",
            field="host.channels",
            remedy="give fewer stages",
        )


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ConfigError(
            f"{heads} heads do not divide a width of {width}",
            field="host.heads",
            remedy="give a divisor of host.width",
        )


def _build_gpt(config: GptHost, input_shape: Sequence[int], num_outputs: int) -> nn.Module:
    if len(input_shape) != 1:
        raise ConfigError(
            f"a gpt takes tokens of (T,), the data has samples of shape {tuple(input_shape)}",
            field="host.type",
            remedy="choose data.type=text, or another host",
        )
    _check_heads(config.width, config.heads)
    return Gpt(
        vocabulary=num_outputs,
        context=input_shape[0],
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        dropout=config.dropout,
        tied=config.tied,
    )


def _import_host(config: ImportedHost) -> nn.Module:
    module_name, _, function_name = config.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"cannot import {module_name}: {error}",
            field="host.target",
            remedy="write package.module:function of something on the Python path",
        ) from error
    build: Any = getattr(module, function_name, None)
    if not callable(build):
        raise ConfigError(
            f"{module_name} has no function {function_name}",
            field="host.target",
            remedy="write package.module:function",
        )
    try:
        host = build(**config.args)
    except TypeError as error:
        raise ConfigError(f"{config.target} was called with {config.args}: {error}", field="host.args") from error
    if not isinstance(host, nn.Module):
        raise ConfigError(
            f"{config.target} returned {type(host).__name__}", field="host.target", remedy="return an nn.Module"
        )
    return host
