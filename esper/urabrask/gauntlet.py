"""The gauntlet: every property that a kernel is examined for, in order, to one report.

Each property has a module of its own. A kernel that raises has failed the property, with torch's words; nothing here
decides what becomes of it. The verdicts, figures, score and tags are equal for equal kernels; only what was timed is
not (`ValidationReport.repeatable`). Static limits come before all this, and before a module is built: see
`esper.leyline.limits`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from esper.leyline import BlueprintIR, Latency, SiteSignature, ValidationReport
from esper.urabrask.birth import birth
from esper.urabrask.correctness import correctness
from esper.urabrask.finding import Finding, merge, verdict
from esper.urabrask.form import parameter_count, shape
from esper.urabrask.independence import batch_independent, causal, deterministic, same_in_eval
from esper.urabrask.learning import gradient_health
from esper.urabrask.resources import latencies, resources
from esper.urabrask.risk import earned_tags, risk_score, risk_terms
from esper.urabrask.stability import finite_forward, finite_gradient, stability
from esper.urabrask.subject import DEFAULT_SEEDS, Subject, nearer

Property = Callable[[Subject], Finding]

AT_THE_SITE: tuple[Property, ...] = (parameter_count, shape)
"""Examined at the kernel's own site."""

ANYWHERE: tuple[Property, ...] = (
    finite_forward,
    finite_gradient,
    correctness,
    stability,
    deterministic,
    batch_independent,
    same_in_eval,
    birth,
    gradient_health,
)
"""Examined at a smaller extent where the site's own would take long (`subject.nearer`)."""


def examine(
    module: nn.Module,
    ir: BlueprintIR,
    signature: SiteSignature,
    *,
    batch: int = 4,
    seeds: Sequence[int] = DEFAULT_SEEDS,
) -> ValidationReport:
    """Runs every check on a copy of `module`, in train mode unless a check says otherwise, on one thread.

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
    with _one_thread():
        at_site = Subject.of(module, ir, signature, batch, seeds)
        moved, near_signature = nearer(module, ir, signature, batch)
        near = at_site if moved is module else Subject.of(moved, ir, near_signature, batch, seeds)
        properties = (*ANYWHERE, causal) if signature.causal else ANYWHERE
        found = merge(
            *(_guarded(one, at_site) for one in AT_THE_SITE),
            *(_guarded(one, near) for one in properties),
        )
        passed = all(check.passed for check in found.checks)
        # what cannot run cannot be measured
        costs, times = (resources(at_site), latencies(at_site)) if passed else (Finding(), ())
    return _report(merge(found, costs), times, signature, passed=passed, seconds=time.perf_counter() - started)


def _report(
    found: Finding, times: tuple[Latency, ...], signature: SiteSignature, *, passed: bool, seconds: float
) -> ValidationReport:
    terms = risk_terms(found.figures, signature) if passed else {}
    score = risk_score(terms) if passed else 1.0
    return ValidationReport(
        checks=found.checks,
        figures=dict(found.figures),
        latencies=times,
        risk_score=score,
        risk_terms=terms,
        tags=earned_tags(found.checks, found.figures, score, signature) if passed else (),
        seconds=seconds,
    )


def _guarded(examined: Property, subject: Subject) -> Finding:
    """A kernel that cannot run has failed; the reason is what torch says."""
    try:
        return examined(subject)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return verdict(examined.__name__, False, detail=" ".join(str(error).split()))
    finally:
        subject.module.train()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order whatever the process is set to, and no cores taken from others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
