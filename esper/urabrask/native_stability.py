"""Native code at its limits: extreme inputs, the same input twice, and what a forward keeps for its backward.

The eager module is the measure. It was examined itself (`stability`, `independence`): native code must be finite where
it is, and repeat itself where it does.
"""

from __future__ import annotations

import torch
from torch import nn

from esper.leyline import Check, SiteSignature
from esper.leyline.runtime import NativeKernel, NativeModule
from esper.urabrask.native_steps import Run, laid, names, native_step, normal, step, taken
from esper.urabrask.saved import saved_for_backward
from esper.urabrask.stability import extremes

ODD_BATCH = 17


def stable(module: nn.Module, kernel: NativeKernel, signature: SiteSignature) -> list[Check]:
    """`native.stable_large`, `_tiny`, `_zero`, `_nan` and `_inf`: output and gradients are finite wherever the eager
    module's are, which also holds for the samples beside one that is not. A crash ends the process.
    """
    [batch] = taken(kernel.facts, ODD_BATCH)
    h, tangent = (normal(signature, batch, seed) for seed in (0, 1))
    native = NativeModule(kernel, module)
    checks = []
    for name, extreme in extremes(h.detach(), signature.dtype).items():
        theirs = step(module, module, laid(extreme, torch.clone), tangent)
        try:
            ours = native_step(native, laid(extreme, torch.clone), tangent)
        except RuntimeError as error:
            words = f"raises: {' '.join(str(error).split())[:250]}"
            checks.append(Check(name=f"native.{name}", passed=False, detail=words))
            continue
        pairs = zip(names(module), theirs, ours, strict=True)
        lost = {what: int((one.isfinite() & ~other.isfinite()).sum()) for what, one, other in pairs}
        words = ", ".join(f"{count} values of {what}" for what, count in lost.items() if count)
        detail = f"not finite where eager is: {words}"[:300] if words else ""
        checks.append(Check(name=f"native.{name}", passed=not words, value=sum(lost.values()), limit=0, detail=detail))
    return checks


def deterministic(module: nn.Module, kernel: NativeKernel, signature: SiteSignature) -> Check:
    """`native.deterministic`: two steps on one input give equal outputs and gradients, bit for bit, where two of the
    eager module's do.
    """
    [batch] = taken(kernel.facts, ODD_BATCH)
    h, tangent = (normal(signature, batch, seed) for seed in (0, 1))
    native = NativeModule(kernel, module)
    theirs = [step(module, module, h, tangent) for _ in range(2)]
    ours = [native_step(native, h, tangent) for _ in range(2)]
    differing = [
        what
        for what, one, other, eager, again in zip(names(module), *ours, *theirs, strict=True)
        if torch.equal(eager, again) and not torch.equal(one, other)
    ]
    words = f"two steps on one input differ in {', '.join(differing)}"[:300] if differing else ""
    return Check(name="native.deterministic", passed=not differing, detail=words)


def saved_bytes(run: Run, module: nn.Module, h: torch.Tensor) -> int:
    """Bytes that a forward keeps for its backward, each once, without the parameters: those are there anyway."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    with saved_for_backward() as kept:
        y = run(h)
        size = sum(size for address, size in kept.sizes.items() if address not in owned)
        del y
    return size
