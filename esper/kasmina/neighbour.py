"""Initial weights from the block next door: what `init: neighbour` in a design means at a graft.

Depth by stacking starts from a copy of the neighbouring layer. The neighbour is sought inside the site first, then in
ever wider surroundings; there, the layers just before the site come first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from esper.leyline.blueprints import BlueprintIR
from esper.leyline.errors import KernelRejectedError
from esper.leyline.growth import PREFIX
from esper.leyline.kernels import SiteSignature
from esper.leyline.lower import lower
from esper.leyline.ops import neighbour_nodes


def copy_neighbours(host: nn.Module, site: str, kernel: nn.Module, ir: BlueprintIR) -> None:
    """Copies the host's neighbouring weights into every node of the kernel that asks for them.

    Args:
        host: the wrapped module; only read.
        site: module path of the site.
        kernel: the lowered design; changed in place.
        ir: the design.

    Raises:
        KernelRejectedError: if the host has no layer of the same kind and shape for one of them.
    """
    for theirs, ours in _pairs(host, site, kernel, ir):
        _copy(theirs, ours)


def has_neighbours(host: nn.Module, site: str, ir: BlueprintIR, signature: SiteSignature) -> bool:
    """Whether `copy_neighbours` would find them all."""
    try:
        _pairs(host, site, lower(ir, signature), ir)
    except KernelRejectedError:
        return False
    return True


def _pairs(host: nn.Module, site: str, kernel: nn.Module, ir: BlueprintIR) -> list[tuple[nn.Module, nn.Module]]:
    """What is copied: the host's layer, and the kernel's."""
    nodes = neighbour_nodes(ir)
    used: set[str] = set()
    pairs: list[tuple[nn.Module, nn.Module]] = []
    # the last node takes the nearest layer, so that a stack of several keeps the host's order
    for node in reversed(nodes):
        layer = kernel.get_submodule(node)
        found = next(
            ((path, m) for path, m in _nearest(host, site) if path not in used and _alike(m, layer)),
            None,
        )
        if found is None:
            shape = tuple(layer.get_parameter("weight").shape)
            raise KernelRejectedError(
                f"node {node} starts from a neighbour, and the host has no {type(layer).__name__} of shape {shape}"
            )
        used.add(found[0])
        pairs.append((found[1], layer))
    return pairs


def _nearest(host: nn.Module, site: str) -> Iterator[tuple[str, nn.Module]]:
    """All submodules of the host: in the site, then before and after it in each of its ancestors, inner first."""
    seen: set[str] = set()
    order = [path for path, _ in host.named_modules() if path and path.partition(".")[0] != PREFIX]
    place = order.index(site)
    scope = site
    while True:
        inside = [path for path in order if not scope or path == scope or path.startswith(f"{scope}.")]
        before = [path for path in inside if order.index(path) < place]
        after = [path for path in inside if order.index(path) >= place]
        # within the site itself all layers lie "after" it: the last is the one nearest to its output
        near = reversed(after) if scope == site else (*reversed(before), *after)
        for path in near:
            if path not in seen:
                seen.add(path)
                yield path, host.get_submodule(path)
        if not scope:
            return
        scope = scope.rpartition(".")[0]


def _alike(theirs: nn.Module, ours: nn.Module) -> bool:
    if not isinstance(theirs, type(ours)) or not isinstance(ours, (nn.Linear, nn.Conv2d)):
        return False
    if isinstance(ours, nn.Conv2d) and isinstance(theirs, nn.Conv2d) and ours.groups != theirs.groups:
        return False
    return theirs.weight.shape == ours.weight.shape


@torch.no_grad()
def _copy(theirs: nn.Module, ours: nn.Module) -> None:
    ours.get_parameter("weight").copy_(theirs.get_parameter("weight"))
    if getattr(ours, "bias", None) is not None:
        bias = getattr(theirs, "bias", None)
        if bias is None:
            ours.get_parameter("bias").zero_()
        else:
            ours.get_parameter("bias").copy_(bias)
