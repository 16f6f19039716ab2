"""Form: the kernel has the parameters its IR says and gives back what the site needs."""

from __future__ import annotations

from esper.leyline.ops import count_parameters
from esper.urabrask.finding import Finding, merge, verdict
from esper.urabrask.subject import ODD_BATCH, Subject, forward


def parameter_count(subject: Subject) -> Finding:
    """The module has exactly the trainable values its IR says."""
    found = sum(p.numel() for p in subject.module.parameters() if p.requires_grad)
    expected = count_parameters(subject.ir, subject.signature)
    return verdict("parameter_count", found == expected, value=found, limit=expected)


def shape(subject: Subject) -> Finding:
    """The output has the shape and dtype of h, for an ordinary batch, a single sample and an odd number."""
    named = {"shape": subject.batch, "shape.batch_1": 1, "shape.odd_batch": ODD_BATCH}
    return merge(*(_shape(subject, name, batch) for name, batch in named.items()))


def _shape(subject: Subject, name: str, batch: int) -> Finding:
    h = subject.first_input(batch)
    try:
        out = forward(subject.module, h)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return verdict(name, False, detail=" ".join(str(error).split()))
    if out.shape != h.shape or out.dtype != h.dtype:
        return verdict(name, False, detail=f"{tuple(out.shape)} {out.dtype} for {tuple(h.shape)} {h.dtype}")
    return verdict(name, True, value=batch)
