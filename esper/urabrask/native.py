"""Native code on the bench: does it compute what the eager module computes, and is it worth loading?

Correctness is judged in float64: the deviation of output and gradients from it must stay near that of the eager module
itself. Speed is a ratio of process-CPU time, native and eager in turns, since a machine that is busy with other work
slows both alike.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from esper.leyline import Check, KernelRejectedError, SiteSignature
from esper.leyline.deviation import largest
from esper.leyline.native import FASTER, NativeFacts, NativeVerdict, Timing
from esper.leyline.runtime import NativeKernel, NativeModule

TIMED_BATCH = 32
NUM_PAIRS = 15
BLOCK_S = 0.04
"""CPU seconds of one block of steps, about."""
_SEEDS = (0, 1)
_OWN_SHARE = 1e-2
"""A gradient much smaller than the largest one is held to this share of that: it is rounding noise of larger sums."""
_EPS_LIMIT = 32.0
_EAGER_LIMIT = 8.0


def examine_native(module: nn.Module, signature: SiteSignature, kernel: NativeKernel) -> NativeVerdict:
    """Compares native code with the eager module it was made from, then times it if it is right.

    Args:
        module: the lowered kernel with its initial weights; not changed.
        signature: its site.
        kernel: the opened code.

    Raises:
        KernelRejectedError: if it computes what is no number, or does not take its own input.
    """
    eager = _on(copy.deepcopy(module), signature).train().requires_grad_()
    output, gradient = _Deviation(), _Deviation()
    for seed in _SEEDS:
        # an initial last layer of zeros would hide all that lies before it
        _stir(eager, seed)
        for batch in _batches(kernel.facts):
            _compare(eager, kernel, signature, batch, seed, output, gradient)
    for name, found in (("an output", output), ("a gradient", gradient)):
        if not math.isfinite(found.native) or not math.isfinite(found.between):
            raise KernelRejectedError(f"native code gives {name} that is not finite for an ordinary input")
        if not math.isfinite(found.eager):
            raise KernelRejectedError(f"the eager module gives {name} that is not finite for an ordinary input")
    limit = _EPS_LIMIT * torch.finfo(getattr(torch, signature.dtype)).eps
    checks = tuple(
        Check(
            name=name,
            passed=found.native <= max(limit, _EAGER_LIMIT * found.eager),
            value=found.native,
            limit=max(limit, _EAGER_LIMIT * found.eager),
            detail=f"deviation from float64; eager's own is {found.eager:.1e}",
        )
        for name, found in (("native.output", output), ("native.gradient", gradient))
    )
    tolerance = max(output.between, gradient.between)
    if not all(check.passed for check in checks):
        return NativeVerdict(checks=checks, tolerance=tolerance, timing=None)
    timing = measure(eager, signature, kernel)
    return NativeVerdict(checks=(*checks, _speed(timing)), tolerance=tolerance, timing=timing)


def _speed(timing: Timing) -> Check:
    """The figure for the report. It fails no kernel: one that is not faster runs from its IR."""
    words = f"{timing.ratio:.2f} (spread {timing.spread:.2f}) of eager's time at batch {timing.batch}"
    return Check(name="native.speed", passed=True, value=timing.ratio, limit=FASTER, detail=words)


def measure(
    module: nn.Module,
    signature: SiteSignature,
    kernel: NativeKernel,
    *,
    batch: int = TIMED_BATCH,
    num_pairs: int = NUM_PAIRS,
    block_s: float = BLOCK_S,
) -> Timing:
    """Times training steps of native code and of the eager module in turns, on one thread.

    Args:
        module: the eager module, on the signature's device, its parameters open.
        signature: its site.
        kernel: the opened code.
        batch: samples, moved into what the code was generated for.
        num_pairs: pairs of blocks.
        block_s: CPU seconds of a block, about.
    """
    batch = min(max(batch, kernel.facts.min_batch), kernel.facts.max_batch)
    h, tangent = (_normal(signature, batch, seed) for seed in (0, 1))
    native = NativeModule(kernel, module)
    clock = _clock(signature.device)

    def block(run: Callable[[torch.Tensor], torch.Tensor], steps: int) -> float:
        began = clock()
        for _ in range(steps):
            _step(run, module, h, tangent)
        return (clock() - began) / steps

    with _one_thread():
        for run in (module, native):
            block(run, 3)
        steps = max(1, round(block_s / max(block(module, 3), 1e-6)))
        pairs: list[tuple[float, float]] = []
        for index in range(num_pairs):
            # who goes first changes, so that a drift of the machine favours neither
            if index % 2:
                theirs, ours = block(module, steps), block(native, steps)
            else:
                ours, theirs = block(native, steps), block(module, steps)
            pairs.append((ours, theirs))
    if native.fallback is not None:
        raise KernelRejectedError(f"native code does not take its own input: {native.fallback}")
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Timing(
        ratio=statistics.median(ratios),
        spread=quartiles[2] - quartiles[0],
        num_pairs=len(pairs),
        batch=batch,
        native_ms=1e3 * statistics.median(ours for ours, _ in pairs),
        eager_ms=1e3 * statistics.median(theirs for _, theirs in pairs),
    )


# ---------------------------------------------------------------- comparing


@dataclass(slots=True)
class _Deviation:
    """Largest deviations found so far: native and eager from float64, native from eager. Infinite after a NaN."""

    native: float = 0.0
    eager: float = 0.0
    between: float = 0.0


def _compare(
    eager: nn.Module,
    kernel: NativeKernel,
    signature: SiteSignature,
    batch: int,
    seed: int,
    output: _Deviation,
    gradient: _Deviation,
) -> None:
    h, tangent = (_normal(signature, batch, seed + offset) for offset in (10, 20))
    exact_module = copy.deepcopy(eager).double()
    exact = _step(exact_module, exact_module, h.detach().double().requires_grad_(), tangent.double())
    theirs = _step(eager, eager, h, tangent)
    native = NativeModule(kernel, eager)
    # the layout of an input is the host's business: every other seed hands over a transposed one
    ours = _step(native, eager, _transposed(h) if seed % 2 else h, tangent)
    if native.fallback is not None:
        raise KernelRejectedError(f"native code does not take its own input: {native.fallback}")
    most = largest(*(float(tensor.abs().max()) for tensor in exact[1:]))
    for index, reference in enumerate(exact):
        found = output if index == 0 else gradient
        scale = max(float(reference.abs().max()), 1e-30 if index == 0 else _OWN_SHARE * most, 1e-30)
        found.native = largest(found.native, float((ours[index].double() - reference).abs().max()) / scale)
        found.eager = largest(found.eager, float((theirs[index].double() - reference).abs().max()) / scale)
        found.between = largest(found.between, float((ours[index] - theirs[index]).abs().max()) / scale)


def _step(
    run: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, h: torch.Tensor, tangent: torch.Tensor
) -> list[torch.Tensor]:
    """y, and the gradients of h and of every parameter that has one."""
    with torch.enable_grad():
        y = run(h)
        gradients = torch.autograd.grad(
            y, [h, *module.parameters()], tangent, materialize_grads=True, allow_unused=True
        )
    return [y.detach(), *gradients]


def _batches(facts: NativeFacts) -> Sequence[int]:
    """The smallest batch that is taken, odd and even ones above it, and the largest within reason."""
    wanted = (facts.min_batch, facts.min_batch + 1, 17, 64)
    return sorted({min(max(batch, facts.min_batch), facts.max_batch) for batch in wanted})


def _stir(module: nn.Module, seed: int) -> None:
    """Moves every parameter off its initial value, by a fixed random amount of the size of typical weights."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))


def _normal(signature: SiteSignature, batch: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(signature.shape(batch), generator=torch.Generator().manual_seed(seed))
    return drawn.to(signature.device, getattr(torch, signature.dtype)).requires_grad_()


def _transposed(h: torch.Tensor) -> torch.Tensor:
    """The same values in another layout, as a leaf of its own."""
    order = list(range(h.ndim))[::-1]
    return h.detach().permute(order).contiguous().permute(order).requires_grad_()


def _on(module: nn.Module, signature: SiteSignature) -> nn.Module:
    return module.to(signature.device)


# ---------------------------------------------------------------- timing


def _clock(device: str) -> Callable[[], float]:
    """Process-CPU seconds; on a GPU elapsed ones, once its queue is empty."""
    if device == "cpu":
        return time.process_time

    def elapsed() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return elapsed


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it, torch uses one thread: process-CPU time counts the waiting of several as work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
