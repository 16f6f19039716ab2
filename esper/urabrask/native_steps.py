"""Training steps of native code and of the eager module, and the inputs that both are given. Nothing here judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from esper.leyline import KernelRejectedError, SiteSignature
from esper.leyline.native import NativeFacts
from esper.leyline.runtime import NativeModule

Run = Callable[[torch.Tensor], torch.Tensor]


def step(run: Run, module: nn.Module, h: torch.Tensor, tangent: torch.Tensor) -> list[torch.Tensor]:
    """y, and the gradients of h and of every parameter, zeros where there is no path.

    Args:
        run: the module, or native code for it.
        module: whose parameters they are.
        h: a leaf that wants its gradient.
        tangent: dL/dy.
    """
    with torch.enable_grad():
        y = run(h)
        gradients = torch.autograd.grad(
            y, [h, *module.parameters()], tangent, materialize_grads=True, allow_unused=True
        )
    return [y.detach(), *gradients]


def native_step(native: NativeModule, h: torch.Tensor, tangent: torch.Tensor) -> list[torch.Tensor]:
    """`step` of native code.

    Raises:
        KernelRejectedError: if it was not the code that computed it.
    """
    found = step(native, native.module, h, tangent)
    if native.fallback is not None:
        raise KernelRejectedError(f"native code does not take its own input: {native.fallback}")
    return found


def names(module: nn.Module) -> list[str]:
    """What `step` gives, in words."""
    return ["the output", *(f"the gradient of {name}" for name in ("h", *(n for n, _ in module.named_parameters())))]


def normal(signature: SiteSignature, batch: int, seed: int) -> torch.Tensor:
    """Standard normal values of the site's shape, dtype and device, as a leaf that wants its gradient."""
    drawn = torch.randn(signature.shape(batch), generator=torch.Generator().manual_seed(seed))
    return drawn.to(signature.device, getattr(torch, signature.dtype)).requires_grad_()


def laid(h: torch.Tensor, lay: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The same values in another place in memory, as a leaf of its own."""
    return lay(h.detach()).requires_grad_()


def taken(facts: NativeFacts, *wanted: int) -> Sequence[int]:
    """The nearest batches that the code takes, each once."""
    return sorted({min(max(batch, facts.min_batch), facts.max_batch) for batch in wanted})
