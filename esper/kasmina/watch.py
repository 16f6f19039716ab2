"""What the modules at the sites put out in one step of the host, looked at without changing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from esper.kasmina.layer import Layer, Layers, all_layers
from esper.leyline.growth import SiteTensor


@contextmanager
def watched(module: nn.Module, layers: Layers) -> Iterator[Mapping[str, SiteTensor]]:
    """See `Growable.watched`."""
    watch = _Watch()
    with ExitStack() as hooks:
        for layer in all_layers(layers):
            site = module.get_submodule(layer.path)
            # before the layer's own hook: the tensor is the host's, not yet grown
            handle = site.register_forward_hook(partial(watch.look, layer), prepend=True)
            hooks.callback(handle.remove)
        yield watch.found
    for site in watch.found.keys() - watch.reached:
        del watch.found[site]


class _Watch:
    def __init__(self) -> None:
        self.found: dict[str, SiteTensor] = {}
        self.reached: set[str] = set()
        self._calls: Counter[str] = Counter()

    def look(self, layer: Layer, _module: nn.Module, _args: Any, output: Any) -> None:
        h = layer.own(output)
        self._calls[layer.site] += 1
        if self._calls[layer.site] > 1:
            self.found.pop(layer.site, None)
        elif h.requires_grad and not _is_recomputed():
            self.found[layer.site] = SiteTensor(tuple(h.shape), h.dtype)
            h.register_hook(lambda _gradient: self.reached.add(layer.site))


def _is_recomputed() -> bool:
    """Whether what runs now is run again in the backward, or what it saves is kept elsewhere."""
    engine: Any = getattr(torch._C, "_autograd")  # noqa: B009, SLF001 - torch has no public question, and no stub
    return engine._top_saved_tensors_default_hooks(True) is not None  # noqa: SLF001
