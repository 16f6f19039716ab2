"""What follows a place in a model: tails, and chains of `nn.Sequential`s, of which it is known without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Tail = Callable[..., Any]
"""(model, h, *inputs) to the model's outputs: what it computes from a site's tensor h on."""


def is_chain(root: nn.Module, path: str) -> bool:
    """Whether every module around `path`, the root among them, is a plain `nn.Sequential`."""
    from torch import nn

    return all(type(module).forward is nn.Sequential.forward for module in around(root, path))


def around(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules around the one at `path`, the root first."""
    parts = path.split(".")
    return [root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def rest_of(root: nn.Module, path: str, h: Any) -> Any:
    """What a chain puts out, from what its module at `path` put out."""
    containers, names = around(root, path), path.split(".")
    for container, name in zip(reversed(containers), reversed(names), strict=True):
        children = list(container.named_children())
        place = next(number for number, (child, _) in enumerate(children) if child == name)
        for _, child in children[place + 1 :]:
            h = child(h)
    return h
