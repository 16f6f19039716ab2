"""Training a kernel behind the host: the whole forward again, or what follows the site, for the kernel alone.

The replay reads the host's weights without their gradient, writes to clones of its buffers and draws from a forked
RNG; the site's input is cut off; `torch.autograd.grad` reaches the kernel's parameters and nothing else. So the host's
weights, buffers, gradients, optimizer and RNG are bit-identical afterwards. It runs the module itself, never a DDP
wrapper, and so reduces the kernel's gradients over ranks explicitly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from esper.kasmina.layer import Layer, key_of
from esper.kasmina.probe import detached, forked_rng
from esper.kasmina.seed import Seed
from esper.kasmina.tails import FromSite
from esper.leyline.autocast import no_autocast_cache
from esper.leyline.compiled import eagerly
from esper.leyline.errors import KernelFaultError, SiteError
from esper.leyline.growth import ELSEWHERE, PREFIX
from esper.leyline.substitute import with_tensors

CLIP_NORM = 1.0
"""Limit of the gradient norm of one kernel, counted apart from the host's."""

AllReduce = Callable[[Sequence[torch.Tensor]], None]


def train_shadow(
    module: nn.Module,
    layer: Layer,
    seed: Seed,
    args: tuple[Any, ...],
    loss_of: Callable[[Any], torch.Tensor],
    *,
    start: torch.Tensor | None = None,
    all_reduce: AllReduce | None = None,
) -> float:
    """Trains one kernel on one batch and returns its loss, which may be infinite or NaN.

    An update whose gradient (over all ranks) is not finite is left out and counted in the seed's `errors`.

    Args:
        module: the host.
        layer: of the seed.
        seed: in TRAINING.
        args: positional inputs of the host.
        loss_of: outputs of the host to a scalar.
        start: what the site put out for these inputs, of a layer with a tail; None replays the whole host.
        all_reduce: averages gradients over ranks, in place.

    Raises:
        SiteError: if the loss does not depend on the site.
        KernelFaultError: if the kernel fails, forward or backward, on this rank or on another: on all of them then.
    """
    kernel = layer.kernel(seed)
    leaves = {name: p.detach().requires_grad_() for name, p in kernel.named_parameters()}
    loss, gradients, fault = torch.zeros(()), [torch.zeros_like(leaf) for leaf in leaves.values()], None
    try:

        def learn(outputs: Any) -> None:
            nonlocal loss, gradients
            loss = loss_of(outputs)
            if leaves:
                gradients = _gradients(layer, seed, loss, list(leaves.values()))

        _replay(module, layer, seed, args, leaves, start, learn)
    except KernelFaultError as error:
        fault = error
    if all_reduce is not None:
        fault = _together(seed, gradients, fault, all_reduce)
    if fault is not None:
        raise fault
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    if not math.isfinite(norm):
        seed.put("errors", seed.figure("errors") + 1)
    elif gradients:
        _update(seed, list(kernel.parameters()), gradients, norm)
    return float(loss.detach())


def _replay(
    module: nn.Module,
    layer: Layer,
    seed: Seed,
    args: tuple[Any, ...],
    leaves: dict[str, torch.Tensor],
    start: torch.Tensor | None,
    learn: Callable[[Any], None],
) -> None:
    """Calls `learn` with the host's outputs, where the host is still what it was in the replay: what recomputes
    activations runs again in the backward.
    """
    prefix = f"{PREFIX}.{key_of(layer.site)}.{seed.seed_id}."
    tensors = detached(module) | {prefix + name: leaf for name, leaf in leaves.items()}
    with eagerly(module), torch.enable_grad(), forked_rng(module), no_autocast_cache():
        if start is not None and layer.tail is not None:
            host = FromSite(module, layer.tail, lambda h: layer.behind(seed, h))
            with_tensors(host, host.tensors(tensors), lambda: learn(host(start, *args)))
            return
        with layer.shadow(seed, module.get_submodule(layer.path)):
            with_tensors(module, tensors, lambda: learn(module(*args)))


def _gradients(layer: Layer, seed: Seed, loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    if not loss.requires_grad:
        raise SiteError(f"the loss does not depend on site {layer.site}", remedy="choose another site")
    try:
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))
    except RuntimeError as error:  # the host's own backward of this batch went well
        raise KernelFaultError(f"its backward raised {type(error).__name__}: {error}", field=seed.seed_id) from error


def _together(
    seed: Seed, gradients: list[torch.Tensor], fault: KernelFaultError | None, all_reduce: AllReduce
) -> KernelFaultError | None:
    """Averages gradients over ranks, and with them the word whether the kernel failed anywhere: a rank that kept away
    for that would leave the others waiting. Returns the fault, which every rank has then.
    """
    like = gradients[0] if gradients else torch.zeros(())
    failed = torch.full((1,), float(fault is not None), dtype=like.dtype, device=like.device)
    all_reduce([*gradients, failed])
    if fault is None and bool(failed):
        return KernelFaultError(ELSEWHERE, field=seed.seed_id)
    return fault


def _update(seed: Seed, parameters: list[nn.Parameter], gradients: list[torch.Tensor], norm: float) -> None:
    assert seed.optimizer is not None
    scale = min(1.0, CLIP_NORM / (norm + 1e-6))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient * scale
    seed.optimizer.step()
    seed.optimizer.zero_grad(set_to_none=True)
