"""The grown model as a plain `nn.Module`: a copy that needs Esper neither to run, nor to pickle, nor to load.

The kernels of a site become one `torch.fx.GraphModule` called `grown`, a child of the site's own module, that computes
`h + a * r(h)` for each kernel in graft order. A plain `nn.Sequential` runs it as its last child. Any other module has
it as a forward hook, and so keeps its class, its attributes and the keys of its weights: hosts reach into their blocks
(`nn.TransformerEncoder` asks its first layer for `self_attn`), which a replacement of the block would break.

So `plain.get_submodule(site)` puts out `h + a * r(h)`, and `plain.get_submodule(site).grown.<seed>` is `r`. Where a
site is one tensor of several (`path#0`), `grown` stands at `path`, lets the others pass, and is called `grown_0`. What
an exported model grows at the same site when it is wrapped again is called `regrown`, and so on.
"""

from __future__ import annotations

import copy
import operator

from torch import fx, nn

from esper.kasmina.fold import Folding, fold
from esper.kasmina.host import Host
from esper.kasmina.layer import Layer, Layers, all_layers
from esper.kasmina.outputs import part_of
from esper.kasmina.seed import Seed
from esper.leyline.errors import ConflictError
from esper.leyline.growth import PREFIX

NAME = "grown"


def plain_module(host: Host | nn.Module) -> nn.Module:
    """Copies a wrapped model without Esper. Kernels that are not on the live path are left out.

    Args:
        host: the handle, or the wrapped model itself; not changed.

    Returns:
        A module that computes what the host computes now, with the same device, mode and open parameters; gradients
        are not copied. A kernel that is still being blended keeps its present alpha.

    Raises:
        ConflictError: if the model is not wrapped, or a grown site is a container with a forward of its own, which
            would run the kernels as if they were its children.
    """
    return _plain(host, folds=False)[0]


def folded_module(host: Host | nn.Module) -> tuple[nn.Module, list[Folding]]:
    """As `plain_module`, with each fossil put into the linear layer whose output it grows, where both are linear.

    Returns:
        The module, which computes what the host computes to rounding, with fewer parameters and operations; and for
        each kernel on the live path whether it was folded, and why not.

    Raises:
        ConflictError: as `plain_module`.
    """
    return _plain(host, folds=True)


def _plain(host: Host | nn.Module, *, folds: bool) -> tuple[nn.Module, list[Folding]]:
    model = host.module if isinstance(host, Host) else host
    plain = copy.deepcopy(model)
    layers = plain._modules.pop(PREFIX, None)  # noqa: SLF001 - nn.Module has no public way to drop a child
    if not isinstance(layers, Layers):
        raise ConflictError("this model is not wrapped")
    told: list[Folding] = []
    for layer in all_layers(layers):
        layer.release()
    for layer in all_layers(layers):
        seeds = layer.blended()
        if folds:
            found = fold(plain, layer)
            told += found
            seeds = [seed for seed, folding in zip(seeds, found, strict=True) if folding.refused]
        if seeds:
            _install(plain.get_submodule(layer.path), layer, seeds)
    plain.zero_grad(set_to_none=True)
    return plain, told


def _install(site: nn.Module, layer: Layer, seeds: list[Seed]) -> None:
    in_sequence = type(site).forward is nn.Sequential.forward
    if not in_sequence and isinstance(site, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ConflictError(f"site {layer.site} is a {type(site).__name__} with a forward of its own: not exportable")
    part = part_of(layer.site)
    name = NAME if part is None else f"{NAME}_{part}"
    while hasattr(site, name):
        name = f"re{name}"
    grown = _graph_of(layer, seeds, in_sequence=in_sequence)
    grown.train(site.training)
    site.add_module(name, grown)
    if not in_sequence:
        site.register_forward_hook(grown)


def _graph_of(layer: Layer, seeds: list[Seed], *, in_sequence: bool) -> fx.GraphModule:
    """One module for all kernels of a site; its forward has a hook's arguments unless it stands in a sequence."""
    root, graph = nn.Module(), fx.Graph()
    if not in_sequence:
        graph.placeholder("site")
        graph.placeholder("inputs")
    output = graph.placeholder("h")
    part = part_of(layer.site)
    h = output if part is None else graph.call_function(operator.getitem, (output, part))
    for seed in seeds:
        root.add_module(seed.seed_id, layer.kernel(seed))
        h = _blend(graph, h, graph.call_module(seed.seed_id, (h,)), seed)
    graph.output(_whole(graph, output, part, h))
    graph.lint()
    return fx.GraphModule(root, graph, class_name="Grown")


def _whole(graph: fx.Graph, output: fx.Node, part: int | str | None, h: fx.Node) -> fx.Node:
    """What `outputs.put` does, in nodes that need nothing of Esper."""
    if part is None:
        return h
    if isinstance(part, str):
        return graph.call_function(operator.or_, (output, {part: h}))
    before = graph.call_function(operator.getitem, (output, slice(0, part)))
    after = graph.call_function(operator.getitem, (output, slice(part + 1, None)))
    return graph.call_function(operator.add, (graph.call_function(operator.add, (before, (h,))), after))


def _blend(graph: fx.Graph, h: fx.Node, y: fx.Node, seed: Seed) -> fx.Node:
    """The arithmetic of `blending.blend`, operation for operation."""
    assert seed.facts is not None
    alpha = seed.alpha
    if seed.facts.replaces:
        if alpha == 1.0:
            return y
        h = graph.call_function(operator.mul, (1.0 - alpha, h))
    if alpha != 1.0:
        y = graph.call_function(operator.mul, (alpha, y))
    return graph.call_function(operator.add, (h, y))
