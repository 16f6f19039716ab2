"""The checks a kernel must pass: each a small function that looks at one property and returns a `Check`.

A kernel that raises fails the check with the error's words; nothing here decides what becomes of it. Inputs are drawn
from private generators, so the verdict is repeatable, and the module leaves as it came: mode, weights and gradients.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from esper.leyline import BlueprintIR, Check, SiteSignature, ValidationReport
from esper.leyline.ops import count_parameters

DEFAULT_SEEDS = (0, 1)
_ODD_BATCH = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """A kernel under examination: a private copy of the module, and where it is meant to go.

    Attributes:
        batch: samples in an ordinary batch.
        seeds: of the inputs, each of which is tried.
    """

    module: nn.Module
    ir: BlueprintIR
    signature: SiteSignature
    batch: int = 4
    seeds: Sequence[int] = DEFAULT_SEEDS

    def inputs(self, batch: int | None = None) -> Iterator[torch.Tensor]:
        """One standard normal h a seed, of the site's shape and dtype, on the CPU."""
        shape = self.signature.shape(self.batch if batch is None else batch)
        for seed in self.seeds:
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            yield drawn.to(getattr(torch, self.signature.dtype))


def examine(
    module: nn.Module,
    ir: BlueprintIR,
    signature: SiteSignature,
    *,
    batch: int = 4,
    seeds: Sequence[int] = DEFAULT_SEEDS,
) -> ValidationReport:
    """Runs every check on a copy of `module`, in train mode unless a check says otherwise.

    Args:
        module: the lowered kernel with its initial weights, on the CPU; not changed.
        ir: what it was lowered from.
        signature: the site it is meant for.
        batch: samples in an ordinary batch, at least 2.
        seeds: of the random inputs.

    Raises:
        ValueError: if there is nothing to check with.
    """
    if batch < 2 or not seeds:
        raise ValueError("examine needs a batch of at least 2 and at least one seed")
    started = time.perf_counter()
    subject = Subject(copy.deepcopy(module).train(), ir, signature, batch, tuple(seeds))
    checks: list[Callable[[Subject], Check]] = [
        parameter_count,
        partial(shape, name="shape", batch=batch),
        partial(shape, name="shape.batch_1", batch=1),
        partial(shape, name="shape.odd_batch", batch=_ODD_BATCH),
        finite_forward,
        finite_gradient,
        deterministic,
        batch_independent,
        same_in_eval,
    ]
    if ir.zero_at_birth:
        checks.append(zero_at_birth)
    if signature.causal:
        checks.append(causal)
    results = tuple(_guarded(check, subject) for check in checks)
    return ValidationReport(checks=results, seconds=time.perf_counter() - started)


# ---------------------------------------------------------------- the checks


def parameter_count(subject: Subject) -> Check:
    """The module has exactly the trainable values its IR says."""
    found = sum(p.numel() for p in subject.module.parameters() if p.requires_grad)
    expected = count_parameters(subject.ir, subject.signature)
    return Check(name="parameter_count", passed=found == expected, value=found, limit=expected)


def shape(subject: Subject, *, name: str, batch: int) -> Check:
    """The output has the shape and dtype of h."""
    for h in subject.inputs(batch):
        out = _forward(subject.module, h)
        if out.shape != h.shape or out.dtype != h.dtype:
            return Check(
                name=name, passed=False, detail=f"{tuple(out.shape)} {out.dtype} for {tuple(h.shape)} {h.dtype}"
            )
    return Check(name=name, passed=True, value=batch)


def finite_forward(subject: Subject) -> Check:
    """The output holds no NaN and no infinity, for ordinary inputs and for ones a hundred times as large."""
    largest = 0.0
    for h in subject.inputs():
        for factor in (1.0, 100.0):
            out = _forward(subject.module, h * factor)
            if not bool(out.isfinite().all()):
                return Check(name="finite_forward", passed=False, detail=f"not finite at {factor:g} x normal input")
            largest = max(largest, float(out.abs().max()))
    return Check(name="finite_forward", passed=True, value=largest)


def finite_gradient(subject: Subject) -> Check:
    """Every parameter and the input get a gradient, and it is finite."""
    named = [(name, p) for name, p in subject.module.named_parameters() if p.requires_grad]
    for h in subject.inputs():
        leaf = h.requires_grad_()
        out = subject.module(leaf)
        # not a plain sum: the gradient of a norm's output under it is zero whatever the norm does
        loss = (out * torch.linspace(-1.0, 1.0, out.numel(), dtype=out.dtype).view_as(out)).sum()
        gradients = torch.autograd.grad(loss, [leaf, *(p for _, p in named)], allow_unused=True)
        for name, gradient in zip(["h", *(name for name, _ in named)], gradients, strict=True):
            if gradient is None:
                return Check(name="finite_gradient", passed=False, detail=f"{name} gets no gradient")
            if not bool(gradient.isfinite().all()):
                return Check(name="finite_gradient", passed=False, detail=f"the gradient of {name} is not finite")
    return Check(name="finite_gradient", passed=True, value=len(named) + 1)


def zero_at_birth(subject: Subject) -> Check:
    """The output is exactly 0 with the initial parameters."""
    worst = max(float(_forward(subject.module, h).abs().max()) for h in subject.inputs())
    return Check(name="zero_at_birth", passed=worst == 0.0, value=worst, limit=0.0)


def deterministic(subject: Subject) -> Check:
    """The same input gives the same output and gradient, bit for bit."""
    for h in subject.inputs():
        first, second = _with_gradient(subject.module, h), _with_gradient(subject.module, h)
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return Check(name="deterministic", passed=False, detail="two passes over one input differ")
    return Check(name="deterministic", passed=True)


def batch_independent(subject: Subject) -> Check:
    """A sample's output does not depend on the others in its batch."""
    worst = 0.0
    tolerance = _tolerance(subject.signature.dtype)
    for h in subject.inputs():
        together, alone = _stirred(subject, h), _stirred(subject, h[:1])
        scale = max(1.0, float(together.abs().max()))
        worst = max(worst, float((together[:1] - alone).abs().max()) / scale)
    return Check(name="batch_independent", passed=worst <= tolerance, value=worst, limit=tolerance)


def same_in_eval(subject: Subject) -> Check:
    """Train and eval compute the same."""
    for h in subject.inputs():
        trained = _stirred(subject, h)
        subject.module.eval()
        evaluated = _stirred(subject, h)
        subject.module.train()
        if not torch.equal(trained, evaluated):
            return Check(name="same_in_eval", passed=False, detail="train and eval differ")
    return Check(name="same_in_eval", passed=True)


def causal(subject: Subject) -> Check:
    """No position's output moves when a later position of the input does."""
    worst = 0.0
    tolerance = _tolerance(subject.signature.dtype)
    for h_BTC in subject.inputs():  # noqa: N806 -- batch, position, channel
        split = h_BTC.shape[1] // 2
        changed = h_BTC.clone()
        changed[:, split:] += 1.0
        before, after = _stirred(subject, h_BTC), _stirred(subject, changed)
        if split:
            worst = max(worst, float((before[:, :split] - after[:, :split]).abs().max()))
    return Check(name="causal", passed=worst <= tolerance, value=worst, limit=tolerance)


# ---------------------------------------------------------------- how they look


def _guarded(check: Callable[[Subject], Check], subject: Subject) -> Check:
    """A kernel that cannot run has failed; the reason is what torch says."""
    try:
        return check(subject)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        inner = check.keywords["name"] if isinstance(check, partial) else check.__name__  # pyright: ignore[reportFunctionMemberAccess]
        return Check(name=inner, passed=False, detail=" ".join(str(error).split())[:300])
    finally:
        subject.module.train()


def _forward(module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(h)


def _with_gradient(module: nn.Module, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = h.detach().clone().requires_grad_()
    out = module(leaf)
    (gradient,) = torch.autograd.grad(out.square().sum() + out.sum(), leaf)
    return out.detach(), gradient


def _stirred(subject: Subject, h: torch.Tensor) -> torch.Tensor:
    """The forward with every weight moved off its initial value: a zeroed last layer would hide everything."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in subject.module.named_parameters()
    }
    with torch.no_grad():
        return torch.func.functional_call(subject.module, weights, (h,))


def _tolerance(dtype: str) -> float:
    """Room for another order of summation, not for a leak."""
    return {"float64": 1e-10, "float32": 1e-4}.get(dtype, 5e-2)
