"""The kernel under examination, the inputs it is given, and its passes. Nothing here judges.

Inputs and moved weights come from private generators, so that a verdict repeats and torch's global random state is
neither read nor moved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from esper.leyline import BlueprintIR, SiteKind, SiteSignature
from esper.leyline.errors import BlueprintError
from esper.leyline.lower import lower
from esper.leyline.ops import count_flops, count_parameters

DEFAULT_SEEDS = (0, 1)
ODD_BATCH = 3

AFFORDABLE_FLOPS = 1 << 24
AFFORDABLE_VALUES = 1 << 15
"""Forward FLOPs and input values of a batch above which most checks are made at a smaller extent (`nearer`)."""
MIN_EXTENT = 4

INPUT_GRADIENT = "h"

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """A private copy of the module, and where it is meant to go.

    Attributes:
        exact: the same module in float64.
        stirred: its weights, each moved off its initial value: a zeroed last layer would hide everything.
        exact_stirred: the same values in float64.
        batch: samples in an ordinary batch.
        seeds: of the inputs, each of which is tried.
    """

    module: nn.Module
    exact: nn.Module
    stirred: Weights
    exact_stirred: Weights
    ir: BlueprintIR
    signature: SiteSignature
    batch: int = 4
    seeds: Sequence[int] = DEFAULT_SEEDS

    @staticmethod
    def of(module: nn.Module, ir: BlueprintIR, signature: SiteSignature, batch: int, seeds: Sequence[int]) -> Subject:
        """Copies `module`, in train mode."""
        copied = copy.deepcopy(module).train()
        exact = copy.deepcopy(copied).to(torch.float64)
        stirred = stir(copied)
        wide = {name: weight.to(torch.float64) for name, weight in stirred.items()}
        return Subject(copied, exact, stirred, wide, ir, signature, batch, tuple(seeds))

    @property
    def dtype(self) -> torch.dtype:
        """Of the site's tensor and the kernel's parameters."""
        return getattr(torch, self.signature.dtype)

    def inputs(self, batch: int | None = None) -> Iterator[torch.Tensor]:
        """One standard normal h a seed, of the site's shape and dtype, on the CPU."""
        shape = self.signature.shape(self.batch if batch is None else batch)
        for seed in self.seeds:
            yield normal(shape, seed).to(self.dtype)

    def first_input(self, batch: int | None = None) -> torch.Tensor:
        """The input of the first seed."""
        return next(self.inputs(batch))


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        out: r(h), or k(h) where the kernel replaces.
        gradients: of h (as `h`) and of the parameters by name; None where there is no path.
    """

    out: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


def normal(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Standard normal float32 values from a private generator."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def stir(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The module's parameters plus a tenth of a standard normal value each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in module.named_parameters()
    }


def cotangent(h: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """What is sent back through the output: of h's shape and dtype. Not ones: under a plain sum the gradient of a
    norm's input is zero whatever the norm does.
    """
    return normal(h.shape, seed).to(h.dtype)


def forward(module: nn.Module, h: torch.Tensor, weights: Weights | None = None) -> torch.Tensor:
    """The output without a graph, with other weights where they are given."""
    with torch.no_grad():
        return module(h) if weights is None else torch.func.functional_call(module, dict(weights), (h,))


def run_pass(module: nn.Module, h: torch.Tensor, weights: Weights | None = None) -> Pass:
    """Forward, and backward from `cotangent(h)`; the module's own gradients stay as they are.

    Raises:
        RuntimeError: what torch says when it cannot.
    """
    source = dict(module.named_parameters()) if weights is None else weights
    leaves = {name: weight.detach().requires_grad_() for name, weight in source.items()}
    leaf = h.detach().requires_grad_()
    with torch.enable_grad():
        out = torch.func.functional_call(module, leaves, (leaf,))
        found = torch.autograd.grad(out, [leaf, *leaves.values()], cotangent(h).to(out.dtype), allow_unused=True)
    return Pass(out.detach(), dict(zip([INPUT_GRADIENT, *leaves], found, strict=True)))


def nearer(module: nn.Module, ir: BlueprintIR, signature: SiteSignature, batch: int) -> tuple[nn.Module, SiteSignature]:
    """The same kernel at a smaller extent, where a batch costs no more than is affordable.

    What a kernel computes wrongly on 64 x 64 positions it computes wrongly on 8 x 8, at a sixtieth of the time. A
    kernel whose parameters depend on the extent, or that does not fit a smaller one, stays where it is.
    """
    chosen = signature
    parameters = count_parameters(ir, signature)
    while _is_dear(ir, chosen, batch):
        smaller = _halved(chosen)
        if smaller == chosen or _parameters_at(ir, smaller) != parameters:
            break
        chosen = smaller
    if chosen == signature:
        return module, signature
    rebuilt = lower(ir, chosen)
    rebuilt.load_state_dict(module.state_dict())
    return rebuilt, chosen


def _is_dear(ir: BlueprintIR, signature: SiteSignature, batch: int) -> bool:
    values = math.prod(signature.shape(batch))
    return values > AFFORDABLE_VALUES or batch * count_flops(ir, signature) > AFFORDABLE_FLOPS


def _halved(signature: SiteSignature) -> SiteSignature:
    if signature.kind is SiteKind.VECTOR:
        return signature
    extent = tuple(max(min(MIN_EXTENT, n), n // 2) for n in signature.extent)
    return signature.model_copy(update={"extent": extent})


def _parameters_at(ir: BlueprintIR, signature: SiteSignature) -> int | None:
    try:
        return count_parameters(ir, signature)
    except BlueprintError:
        return None
