"""Races: several kernels in TRAINING at one site, each behind the host and apart from the others.

A race is decided once every kernel in it has proven itself or is gone (a kernel that shows no gain is culled in its
time, so it always is). The best paired evidence wins; all were measured on the same validation data against the same
host, so their gains compare. The earlier seed wins a tie.
"""

from __future__ import annotations

import math

from esper.leyline import HealthSignal, LayerHealthReport, SeedStage

RACING = frozenset({SeedStage.GERMINATED, SeedStage.TRAINING})
"""Stages in which a kernel may still win its site."""


def rivals(seed: HealthSignal, layer: LayerHealthReport) -> list[HealthSignal]:
    """Who may still win the site instead of this seed in TRAINING; nobody in other stages."""
    if seed.stage is not SeedStage.TRAINING:
        return []
    return [s for s in layer.seeds if s.seed_id != seed.seed_id and s.stage in RACING and not s.should_cull]


def why_wait(seed: HealthSignal, layer: LayerHealthReport, epoch: int) -> str | None:
    """Why a seed whose gate is open does not enter the live path yet; None if it does, or has no rivals."""
    others = rivals(seed, layer)
    unproven = [s.seed_id for s in others if not _has_proven(s) or s.epoch != epoch]
    if unproven:
        return f"has proven itself ({seed.gate}) and waits for {', '.join(unproven)}, which it races with"
    best = max([s for s in layer.seeds if s is seed or s in others], key=_gain)
    if best is seed:
        return None
    return f"is behind {best.seed_id} in the race ({_gain(seed):.4g} to {_gain(best):.4g})"


def _has_proven(seed: HealthSignal) -> bool:
    return seed.stage is SeedStage.TRAINING and seed.is_ready_for_transition


def _gain(seed: HealthSignal) -> float:
    return -math.inf if seed.evidence is None else seed.evidence.gain
