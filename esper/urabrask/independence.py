"""Independence: from the other samples of a batch, from train and eval, from the clock, and from the future."""

from __future__ import annotations

import torch

from esper.leyline.deviation import largest
from esper.urabrask.comparing import forward_tolerance
from esper.urabrask.finding import Finding, verdict
from esper.urabrask.subject import Subject, forward, run_pass


def deterministic(subject: Subject) -> Finding:
    """The same input gives the same output and every gradient, bit for bit."""
    for h in subject.inputs():
        first, second = (run_pass(subject.module, h, subject.stirred) for _ in range(2))
        for name, gradient in first.gradients.items():
            other = second.gradients[name]
            if gradient is not None and other is not None and not torch.equal(gradient, other):
                return verdict("deterministic", False, detail=f"two gradients of {name} for one input differ")
        if not torch.equal(first.out, second.out):
            return verdict("deterministic", False, detail="two passes over one input differ")
    return verdict("deterministic", True)


def batch_independent(subject: Subject) -> Finding:
    """A sample's output does not depend on the others in its batch."""
    worst = 0.0
    limit = forward_tolerance(subject.signature.dtype)
    for h in subject.inputs():
        together, alone = forward(subject.module, h, subject.stirred), forward(subject.module, h[:1], subject.stirred)
        scale = max(1.0, float(together.abs().max()))
        worst = largest(worst, float((together[:1] - alone).abs().max()) / scale)
    return verdict("batch_independent", worst <= limit, value=worst, limit=limit)


def same_in_eval(subject: Subject) -> Finding:
    """Train and eval compute the same."""
    for h in subject.inputs():
        trained = forward(subject.module, h, subject.stirred)
        subject.module.eval()
        evaluated = forward(subject.module, h, subject.stirred)
        subject.module.train()
        if not torch.equal(trained, evaluated):
            return verdict("same_in_eval", False, detail="train and eval differ")
    return verdict("same_in_eval", True)


def causal(subject: Subject) -> Finding:
    """No position's output moves when a later position of the input does."""
    worst = 0.0
    limit = forward_tolerance(subject.signature.dtype)
    for h_BTC in subject.inputs():  # noqa: N806 -- batch, position, channel
        split = h_BTC.shape[1] // 2
        changed = h_BTC.clone()
        changed[:, split:] += 1.0
        before, after = (forward(subject.module, h, subject.stirred) for h in (h_BTC, changed))
        if split:
            worst = largest(worst, float((before[:, :split] - after[:, :split]).abs().max()))
    return verdict("causal", worst <= limit, value=worst, limit=limit)
