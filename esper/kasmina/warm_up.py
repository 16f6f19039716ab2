"""The first calls of a kernel, in the loader's thread: so that the host's first step with it pays for none, and to see
that it is what Urabrask let through. What fails here never comes near a host.

Urabrask judges designs at length, where they are compiled; this looks once more at what was rebuilt, where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.kasmina.rests import Rest, never
from esper.leyline.errors import KernelRejectedError
from esper.leyline.kernels import SiteSignature

WARM_UP_BATCH = 2
MEMORY_FACTOR, MEMORY_SLACK = 32, 1 << 20
"""A forward may allocate so many times what its design declares, and so many bytes beyond."""
DIRECTIONS = 3
"""Gradients are compared with differences along so many directions; they are wrong if none agrees."""
DIFFERENCE = 1e-2
"""Half the distance of two points that are compared, as a share of the size of what is moved."""
DISAGREEMENT = 0.25
"""By such a share gradient and difference may disagree: they have float32's precision and the curve's second order."""


def warm_up(
    module: nn.Module, declared_bytes: int, signature: SiteSignature, device: torch.device, *, rest: Rest = never
) -> None:
    """Runs the kernel forward and backward on made-up inputs. Afterwards it is as it was, in training mode.

    Args:
        module: the kernel.
        declared_bytes: of its parameters and its outputs for one sample.
        signature: of its site.
        device: where it lies.
        rest: called between pieces of the work.

    Raises:
        KernelRejectedError: if it raises, puts out another shape, something that is not finite, or two things for one
            input (in training and eval mode too), allocates far more than its design needs, or if its gradient is not
            that of its output.
    """
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(signature.shape(WARM_UP_BATCH), generator=generator).to(device, getattr(torch, signature.dtype))
    with _Allocations() as allocations, torch.enable_grad():
        h.requires_grad_()
        y = _forward(module, h)
    allowed = MEMORY_SLACK + MEMORY_FACTOR * WARM_UP_BATCH * declared_bytes
    if allocations.num_bytes > allowed:
        raise KernelRejectedError(
            f"allocates {allocations.num_bytes >> 10} KB where {allowed >> 10} KB would be plenty"
        )
    rest()
    with torch.enable_grad():
        # a replacement that does not look at h is odd but legal, so an unused input is no error
        gradients = torch.autograd.grad(y.sum(), [h, *module.parameters()], allow_unused=True)
    if not all(bool(torch.isfinite(t).all()) for t in (y, *gradients) if t is not None):
        raise KernelRejectedError("its output or gradient is not finite at warm-up")
    rest()
    with torch.no_grad():
        if not torch.equal(_forward(module, h), y):
            raise KernelRejectedError("puts out two things for one input")
        if not torch.equal(_forward(module.eval(), h), y):
            raise KernelRejectedError("puts out something else in eval mode")
    module.train()
    rest()
    if h.dtype in (torch.float32, torch.float64):
        _check_gradient(module, h.detach(), generator, rest)


def _forward(module: nn.Module, h: torch.Tensor, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
    try:
        y = module(h) if tensors is None else torch.func.functional_call(module, dict(tensors), (h,))
    except Exception as error:
        raise KernelRejectedError(f"raised {type(error).__name__} at warm-up: {error}") from error
    if y.shape != h.shape:
        raise KernelRejectedError(f"puts out {tuple(y.shape)} for {tuple(h.shape)}")
    return y


def _check_gradient(module: nn.Module, h: torch.Tensor, generator: torch.Generator, rest: Rest) -> None:
    """Compares the gradient by h and all weights together with central differences."""
    point = {"": h, **{name: p.detach() for name, p in module.named_parameters()}}

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    weights = draw(h)  # of the outputs, in one figure

    def figure(at: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (_forward(module, at[""], {name: t for name, t in at.items() if name}) * weights).double().sum()

    with torch.enable_grad():
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in point.items()}
        found = torch.autograd.grad(figure(leaves), list(leaves.values()), allow_unused=True)
    rest()
    gradient = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
    with torch.no_grad():
        if not any(_agree(figure, point, gradient, draw) for _ in range(DIRECTIONS)):
            raise KernelRejectedError("its gradient is not that of its output")


def _agree(
    figure: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    point: Mapping[str, torch.Tensor],
    gradient: Mapping[str, torch.Tensor],
    draw: Callable[[torch.Tensor], torch.Tensor],
) -> bool:
    along = {name: DIFFERENCE * _size(tensor) * draw(tensor) for name, tensor in point.items()}
    ahead = figure({name: tensor + along[name] for name, tensor in point.items()})
    behind = figure({name: tensor - along[name] for name, tensor in point.items()})
    measured = float(ahead - behind) / 2
    promised = sum(float((gradient[name] * along[name]).double().sum()) for name in gradient)
    largest = max(abs(measured), abs(promised))
    noise = 1e-5 * max(abs(float(ahead)), abs(float(behind)))  # of a float32 that cancels
    return abs(measured - promised) <= DISAGREEMENT * largest + noise


def _size(tensor: torch.Tensor) -> float:
    """Root mean square; of weights that are zero at birth, that of small ones."""
    return max(float(tensor.double().square().mean().sqrt()), 0.05)


class _Allocations(TorchDispatchMode):
    """Counts the bytes that this thread's operations allocate; views allocate none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {_storage(tensor) for tensor in tree_leaves((args, kwargs or {})) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in before:
                self.num_bytes += tensor.untyped_storage().nbytes()
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
