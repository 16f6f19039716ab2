"""The risk of a kernel that passed, in one number, and the tags that follow from its figures.

Each term is a way in which a sound kernel can still harm a run, scaled from 0 (none) to 1 (as far as a check allows):

    precision  0.2   the output's error against float64, logarithmic from one rounding to the tolerance: what is left
                     over for a larger batch, a longer sum or mixed precision
    range      0.3   decades of head room that are missing before the output overflows
    birth      0.3   how far the site's output moves at full blend before anything is learned (1: by all of h): a host
                     that is blended quickly feels it at once
    growth     0.4   the output's size after 20 steps on random data, from 1 to the limit of 100, logarithmic: the
                     kernel runs away from its site without being told to
    gradient   0.3   the largest gradient of these steps, from 1 to the limit of 1000, logarithmic
    silence    0.2   share of the parameters that never had a gradient: they cost and do nothing
    size       0.2   log2(1 + n / C^2) / 5, with n parameters at C channels: more freedom fits more noise, and costs
                     more when it was wrong

The weights say how much of a run a term could cost if nothing else were wrong, by the gates that stand behind: the
governor catches what grows, nothing catches a parameter that is silent. The score is 1 - prod(1 - weight * term), as
for independent causes of harm: it grows with every term, stays below 1 and no order of terms matters. A kernel that
failed a check has 1. Terms and score have two decimals: kernels are told apart by no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from esper.leyline import Check, KernelTag, SiteSignature
from esper.leyline import flops as cost
from esper.urabrask.comparing import forward_tolerance
from esper.urabrask.learning import MAX_GRADIENT, MAX_OUTPUT
from esper.urabrask.stability import tried_decades

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"precision": 0.2, "range": 0.3, "birth": 0.3, "growth": 0.4, "gradient": 0.3, "silence": 0.2, "size": 0.2}
)
LOW_RISK = 0.2
HIGH_RISK = 0.5
_FULL_SIZE_OCTAVES = 5


def risk_terms(figures: Mapping[str, float], signature: SiteSignature) -> dict[str, float]:
    """The terms of the score, in [0, 1].

    Args:
        figures: of all properties, see `ValidationReport.figures`.
        signature: the site.
    """
    rounding = torch.finfo(getattr(torch, signature.dtype)).eps
    most = tried_decades(signature.dtype)[-1]
    size = math.log2(1.0 + figures["parameters"] / signature.channels**2)
    terms = {
        "precision": _on_scale(figures["error_forward"], rounding, forward_tolerance(signature.dtype)),
        "range": 1.0 - figures["headroom_decades"] / most,
        "birth": figures["birth_change"],
        "growth": _on_scale(figures["learned_output"], 1.0, MAX_OUTPUT),
        "gradient": _on_scale(figures["max_gradient"], 1.0, MAX_GRADIENT),
        "silence": figures["silent_share"],
        "size": size / _FULL_SIZE_OCTAVES,
    }
    return {name: round(min(1.0, max(0.0, value)), 2) for name, value in terms.items()}


def risk_score(terms: Mapping[str, float]) -> float:
    """The score of these terms."""
    return round(1.0 - math.prod(1.0 - WEIGHTS[name] * value for name, value in terms.items()), 2)


def earned_tags(
    checks: tuple[Check, ...], figures: Mapping[str, float], score: float, signature: SiteSignature
) -> tuple[KernelTag, ...]:
    """The tags of a kernel that passed.

    `zero_at_birth`: declared and found. `low_memory`: parameters and outputs of one sample take no more bytes than
    those of one dense layer from C to C channels at every position; `high_speed`: nor does the forward pass take more
    FLOPs. `low_risk`: a score of at most `LOW_RISK`; `high_risk`: of at least `HIGH_RISK`.
    """
    channels = signature.channels
    positions = math.prod(signature.extent)
    item = torch.finfo(getattr(torch, signature.dtype)).bits // 8
    dense_bytes = item * (channels**2 + channels + positions * channels)
    tags = {
        KernelTag.ZERO_AT_BIRTH: any(check.name == "zero_at_birth" and check.passed for check in checks),
        KernelTag.LOW_MEMORY: figures["memory_bytes"] <= dense_bytes,
        KernelTag.HIGH_SPEED: figures["flops_per_sample"] <= cost.linear(positions, channels, channels),
        KernelTag.LOW_RISK: score <= LOW_RISK,
        KernelTag.HIGH_RISK: score >= HIGH_RISK,
    }
    return tuple(tag for tag, earned in tags.items() if earned)


def _on_scale(value: float, low: float, high: float) -> float:
    """Where `value` stands between two figures, on a logarithmic scale."""
    return 0.0 if value <= low else math.log(value / low) / math.log(high / low)
