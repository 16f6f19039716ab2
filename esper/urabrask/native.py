"""Native code on the bench: does it compute what the eager module computes, and is it worth loading?

Correctness is judged in float64: the deviation of output and gradients from it must stay near that of the eager module
itself, whatever the batch and however h and dL/dy lie in memory. `native_stability` looks at how it bears extremes and
whether it repeats itself. A crash of the code is one of this process, which is to be one of its own for that.

Speed is a ratio of process-CPU time, native and eager in turns, since a machine that is busy with other work slows both
alike.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from esper.leyline import Check, KernelRejectedError, SiteSignature
from esper.leyline.deviation import largest
from esper.leyline.native import FASTER, NativeVerdict, PartTiming, Timing
from esper.leyline.runtime import NativeKernel, NativeModule
from esper.urabrask.correctness import batch_innermost, every_second
from esper.urabrask.native_stability import ODD_BATCH, deterministic, saved_bytes, stable
from esper.urabrask.native_steps import Run, laid, native_step, normal, step, taken

TIMED_BATCH = 32
NUM_PAIRS = 15
NUM_SPLIT_PAIRS = 5
"""Pairs of blocks in which forward and backward are timed apart. Reading the clock amid a step costs something, so
they are others than those that decide."""
BLOCK_S = 0.04
"""CPU seconds of one block of steps, about."""
_SEEDS = (0, 1)
_BATCHES = (1, 2, 3, 16, ODD_BATCH, 64)
"""Those of them that the code takes, and the nearest of the others."""
_OWN_SHARE = 1e-2
"""A gradient much smaller than the largest one is held to this share of that: it is rounding noise of larger sums."""
_EPS_LIMIT = 32.0
_EAGER_LIMIT = 8.0
_TICK_S = 1e-9
"""The least that a clock tells: of something shorter than its step it says 0."""

T = TypeVar("T")


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
        for batch in taken(kernel.facts, *_BATCHES, kernel.facts.min_batch + 1):
            _compare(eager, kernel, _Case(signature, batch, seed), output, gradient)
        for lay in (_transposed, every_second, batch_innermost):
            [batch] = taken(kernel.facts, ODD_BATCH)
            _compare(eager, kernel, _Case(signature, batch, seed, lay), output, gradient)
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
    checks = (*checks, *stable(eager, kernel, signature), deterministic(eager, kernel, signature))
    tolerance = max(output.between, gradient.between)
    if not all(check.passed for check in checks):
        return NativeVerdict(checks=checks, tolerance=tolerance, timing=None)
    figures = _kept(eager, signature, kernel)
    timing = measure(eager, signature, kernel)
    return NativeVerdict(checks=(*checks, _speed(timing)), tolerance=tolerance, timing=timing, figures=figures)


def _kept(module: nn.Module, signature: SiteSignature, kernel: NativeKernel) -> dict[str, float]:
    """What each of both keeps from forward to backward, in bytes, at the batch that is timed."""
    [batch] = taken(kernel.facts, TIMED_BATCH)
    h = normal(signature, batch, 0)
    return {
        "native_saved_bytes": float(saved_bytes(NativeModule(kernel, module), module, h)),
        "eager_saved_bytes": float(saved_bytes(module, module, h)),
    }


def _speed(timing: Timing) -> Check:
    """The figure for the report. It fails no kernel: one that is not faster runs from its IR."""
    words = f"{timing.ratio:.2f} (spread {timing.spread:.2f}) of eager's time at batch {timing.batch}"
    if timing.forward is not None and timing.backward is not None:
        parts = {"forward": timing.forward, "backward": timing.backward}
        apart = ", ".join(f"{name} {part.ratio:.2f} (spread {part.spread:.2f})" for name, part in parts.items())
        words = f"{words}; {apart}"
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
    [batch] = taken(kernel.facts, batch)
    h, tangent = (normal(signature, batch, seed) for seed in (0, 1))
    native = NativeModule(kernel, module)
    clock = _clock(signature.device)

    def block(run: Run, steps: int) -> float:
        began = clock()
        for _ in range(steps):
            step(run, module, h, tangent)
        return (clock() - began) / steps

    def split_block(run: Run, steps: int) -> tuple[float, float]:
        return _split_block(run, [h, *module.parameters()], tangent, clock, steps)

    with _one_thread():
        for run in (module, native):
            block(run, 3)
        steps = max(1, round(block_s / max(block(module, 3), 1e-6)))
        pairs = _in_turns(lambda run: block(run, steps), native, module, num_pairs)
        split = _in_turns(lambda run: split_block(run, steps), native, module, NUM_SPLIT_PAIRS)
    if native.fallback is not None:
        raise KernelRejectedError(f"native code does not take its own input: {native.fallback}")
    whole = _part(pairs)
    forward, backward = (_part([(ours[at], theirs[at]) for ours, theirs in split]) for at in (0, 1))
    return Timing(
        ratio=whole.ratio,
        spread=whole.spread,
        num_pairs=len(pairs),
        batch=batch,
        native_ms=whole.native_ms,
        eager_ms=whole.eager_ms,
        forward=forward,
        backward=backward,
    )


def _split_block(
    run: Run, inputs: list[torch.Tensor], tangent: torch.Tensor, clock: Callable[[], float], steps: int
) -> tuple[float, float]:
    """Seconds of a forward and of a backward."""
    forward_s = backward_s = 0.0
    for _ in range(steps):
        began = clock()
        with torch.enable_grad():
            y = run(inputs[0])
            turned = clock()
            torch.autograd.grad(y, inputs, tangent, materialize_grads=True, allow_unused=True)
        backward_s += clock() - turned
        forward_s += turned - began
    return forward_s / steps, backward_s / steps


def _in_turns(block: Callable[[Run], T], native: Run, eager: Run, num_pairs: int) -> list[tuple[T, T]]:
    """What blocks of both gave. Who goes first changes, so that a drift of the machine favours neither."""
    pairs: list[tuple[T, T]] = []
    for index in range(num_pairs):
        if index % 2:
            theirs, ours = block(eager), block(native)
        else:
            ours, theirs = block(native), block(eager)
        pairs.append((ours, theirs))
    return pairs


def _part(pairs: list[tuple[float, float]]) -> PartTiming:
    """Medians and spread of pairs of seconds, native and eager."""
    pairs = [(max(ours, _TICK_S), max(theirs, _TICK_S)) for ours, theirs in pairs]
    ratios = sorted(ours / theirs for ours, theirs in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return PartTiming(
        ratio=statistics.median(ratios),
        spread=quartiles[2] - quartiles[0],
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


@dataclass(frozen=True, slots=True)
class _Case:
    """An input of native code: what is drawn, and how h and dL/dy lie in memory."""

    signature: SiteSignature
    batch: int
    seed: int
    lay: Callable[[torch.Tensor], torch.Tensor] = torch.clone


def _compare(eager: nn.Module, kernel: NativeKernel, case: _Case, output: _Deviation, gradient: _Deviation) -> None:
    h, tangent = (normal(case.signature, case.batch, case.seed + offset) for offset in (10, 20))
    exact_module = copy.deepcopy(eager).double()
    exact = step(exact_module, exact_module, h.detach().double().requires_grad_(), tangent.double())
    theirs = step(eager, eager, h, tangent)
    ours = native_step(NativeModule(kernel, eager), laid(h, case.lay), case.lay(tangent.detach()))
    most = largest(*(float(tensor.abs().max()) for tensor in exact[1:]))
    for index, reference in enumerate(exact):
        found = output if index == 0 else gradient
        scale = max(float(reference.abs().max()), 1e-30 if index == 0 else _OWN_SHARE * most, 1e-30)
        found.native = largest(found.native, float((ours[index].double() - reference).abs().max()) / scale)
        found.eager = largest(found.eager, float((theirs[index].double() - reference).abs().max()) / scale)
        found.between = largest(found.between, float((ours[index] - theirs[index]).abs().max()) / scale)


def _stir(module: nn.Module, seed: int) -> None:
    """Moves every parameter off its initial value, by a fixed random amount of the size of typical weights."""
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))


def _transposed(h: torch.Tensor) -> torch.Tensor:
    order = list(range(h.ndim))[::-1]
    return h.permute(order).contiguous().permute(order)


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
