"""Folding a fossil into the linear layer whose output it grows: where both are linear, together they are one layer.

The layer puts out h = W x + b, the kernel r(h) = R h + c. So the site's h + r(h) is (I + R) W x + (I + R) b + c: a
linear layer of the same size. A replacement, k(h) alone, gives R W x + R b + c. Computed in float64, then rounded once.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from esper.kasmina.layer import Layer
from esper.kasmina.outputs import part_of
from esper.kasmina.seed import Seed
from esper.leyline.kernels import SiteKind, SiteSignature
from esper.leyline.seeds import SeedStage

AFFINE = frozenset({"linear", "add", "scale"})
"""Operations under which an affine map of the channels, position by position, stays one."""


@dataclass(frozen=True)
class Folding:
    """What becomes of a fossil when its model is folded.

    Attributes:
        refused: why its kernel stays; empty where it is folded.
    """

    site: str
    seed: str
    blueprint: str
    refused: str = ""


def fold(model: nn.Module, layer: Layer) -> list[Folding]:
    """Puts into the site's own layer what can be, and tells of each kernel on its live path, in the order they run in.

    Args:
        model: the host around the site; the layer's weights change, and one without a bias may get one.
        layer: of the site.
    """
    told: list[Folding] = []
    refused = _why_not_here(model, layer)
    for seed in layer.blended():
        assert seed.facts is not None
        refused = refused or _why_not(seed, layer.signature)
        told.append(Folding(layer.site, seed.seed_id, seed.facts.blueprint, refused))
        if refused:
            refused = f"{seed.facts.blueprint}, which runs before it, stays"
            continue
        linear = model.get_submodule(layer.path)
        assert isinstance(linear, nn.Linear)
        _put_into(linear, *_map_of(layer.kernel(seed), layer.signature), replaces=seed.facts.replaces)
    return told


def _why_not_here(model: nn.Module, layer: Layer) -> str:
    site = model.get_submodule(layer.path)
    if type(site) is not nn.Linear or part_of(layer.site) is not None:
        return f"{layer.site} is the output of {type(site).__name__}, which is no linear layer"
    weights = [name for name, one in model.named_parameters(remove_duplicate=False) if one is site.weight]
    if len(weights) > 1:
        others = ", ".join(name for name in weights if name != f"{layer.path}.weight")
        return f"{layer.site} shares its weights with {others}"
    if site._forward_hooks or site._forward_pre_hooks:  # noqa: SLF001 - torch has no public question
        return f"{layer.site} has hooks of its own, which may change what it puts out"
    return ""


def _why_not(seed: Seed, signature: SiteSignature) -> str:
    assert seed.facts is not None
    if seed.stage is not SeedStage.FOSSILIZED:
        return f"it is not permanent: it stands in {seed.stage}"
    other = next((node.op for node in seed.facts.ir.nodes if node.op not in AFFINE), None)
    if other is not None:
        return f"{other} is not linear"
    return "" if signature.kind is not SiteKind.FEATURE_MAP else "a linear layer puts out no feature map"


def _map_of(kernel: nn.Module, signature: SiteSignature) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's R (C, C) and c (C,), in float64, by what it makes of the basis."""
    kernel, channels = copy.deepcopy(kernel).double().eval(), signature.channels
    device = next((p.device for p in kernel.parameters()), torch.device("cpu"))
    basis = torch.cat([torch.eye(channels, dtype=torch.float64), torch.zeros(1, channels, dtype=torch.float64)])
    shape = (channels + 1, *(1,) * (len(signature.shape(1)) - 2), channels)
    with torch.no_grad():
        out = kernel(basis.to(device).view(shape)).view(channels + 1, channels)
    return (out[:-1] - out[-1]).T, out[-1]


def _put_into(linear: nn.Linear, r_cc: torch.Tensor, c_c: torch.Tensor, *, replaces: bool) -> None:
    weight, bias = linear.weight, linear.bias
    total_cc = r_cc if replaces else torch.eye(len(r_cc), dtype=r_cc.dtype, device=r_cc.device) + r_cc
    shift = c_c if bias is None else total_cc @ bias.detach().double() + c_c
    with torch.no_grad():
        weight.copy_(total_cc @ weight.double())
        if bias is not None:
            bias.copy_(shift)
        elif bool(shift.any()):
            linear.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
