"""Native code without a compiler: the module's own arithmetic behind the calls that a library answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from esper.leyline import SiteSignature
from esper.leyline.native import NativeFacts
from esper.leyline.runtime import NativeKernel
from esper.leyline.target import target_here

Change = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


def unchanged(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    return tensors


def native_of(
    module: nn.Module, signature: SiteSignature, *, forward: Change = unchanged, backward: Change = unchanged, **facts
) -> NativeKernel:
    """Code that is right, and what `forward` and `backward` make of its results: [y], and the gradients of the
    parameters in order and of h.
    """
    names = tuple(name for name, _ in module.named_parameters())
    every = tuple(range(len(names) + 1))
    described = {
        "target": target_here(),
        "dtype": signature.dtype,
        "parameters": names,
        "shape": signature.shape(1)[1:],
        "min_batch": 1,
        "max_batch": 1024,
        "saved": every,
        "gradients": every,
        "keeps_input": False,
        "keeps_output": False,
    }

    def call(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, inputs[:-1], strict=True)), (inputs[-1],))

    def run_forward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(forward([call(inputs)]))

    def run_backward(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        *saved, tangent = inputs
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in saved]
            found = torch.autograd.grad(call(leaves), leaves, tangent, materialize_grads=True, allow_unused=True)
        return list(backward(list(found)))

    return NativeKernel("sample", NativeFacts(**described | facts), run_forward, run_backward)


def nan_at(place: int, *, batch: int | None = None) -> Change:
    """Puts one NaN into the result at `place`, for every batch or for one; the batch is that of the last tensor."""

    def change(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        if batch is None or len(tensors[-1]) == batch:
            spoiled = tensors[place].clone()
            spoiled.view(-1)[0] = torch.nan
            tensors[place] = spoiled
        return tensors

    return change


NANS = {
    "output": {"forward": nan_at(0)},
    "first gradient": {"backward": nan_at(0)},
    "last gradient": {"backward": nan_at(-1)},
    "output at batch 1": {"forward": nan_at(0, batch=1)},
    "gradient at batch 1": {"backward": nan_at(0, batch=1)},
}
"""Where native code may give a NaN."""
