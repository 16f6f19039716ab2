"""The life of a seed: its stages and the one table of legal transitions.

    DORMANT → GERMINATED → TRAINING → GRAFTING → STABILIZING → EVALUATING → FINE_TUNING → FOSSILIZED

A seed leaves this way by CULLED (removed for cause; then an embargo, then DORMANT), CANCELLED (its kernel never
came) or ROLLED_BACK (the governor restored the state before its graft). This module knows names and arrows only;
what a stage *does* is Kasmina's, and when to leave it is Tamiyo's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from esper.leyline.errors import IllegalTransitionError


class SeedStage(StrEnum):
    """Where a seed stands. `code` is the stage as a byte, for state tensors."""

    DORMANT = "DORMANT"
    GERMINATED = "GERMINATED"
    TRAINING = "TRAINING"
    GRAFTING = "GRAFTING"
    STABILIZING = "STABILIZING"
    EVALUATING = "EVALUATING"
    FINE_TUNING = "FINE_TUNING"
    FOSSILIZED = "FOSSILIZED"
    CULLED = "CULLED"
    CANCELLED = "CANCELLED"
    ROLLED_BACK = "ROLLED_BACK"

    @property
    def code(self) -> int:
        """The stage as a small integer, stable across versions of the contracts."""
        return _CODES[self]

    @classmethod
    def from_code(cls, code: int) -> SeedStage:
        """Returns the stage with this `code`; raises `ValueError` for an unknown one."""
        for stage, known in _CODES.items():
            if known == code:
                return stage
        raise ValueError(f"no seed stage has code {code}")

    @property
    def is_active(self) -> bool:
        """Whether the seed holds a place in the adaptation budget: it has begun and has not ended."""
        return self in ACTIVE

    @property
    def is_blended(self) -> bool:
        """Whether the kernel's output reaches the live path of the host."""
        return self in BLENDED


_CODES = {stage: code for code, stage in enumerate(SeedStage)}

TRANSITIONS: Mapping[SeedStage, frozenset[SeedStage]] = MappingProxyType(
    {
        SeedStage.DORMANT: frozenset({SeedStage.GERMINATED}),
        SeedStage.GERMINATED: frozenset(
            # GRAFTING at once is the `direct` strategy: the kernel trains with the host from its first step
            {SeedStage.TRAINING, SeedStage.GRAFTING, SeedStage.CANCELLED, SeedStage.CULLED}
        ),
        SeedStage.TRAINING: frozenset({SeedStage.GRAFTING, SeedStage.CULLED}),
        SeedStage.GRAFTING: frozenset({SeedStage.STABILIZING, SeedStage.CULLED, SeedStage.ROLLED_BACK}),
        SeedStage.STABILIZING: frozenset({SeedStage.EVALUATING, SeedStage.CULLED, SeedStage.ROLLED_BACK}),
        SeedStage.EVALUATING: frozenset({SeedStage.FINE_TUNING, SeedStage.CULLED, SeedStage.ROLLED_BACK}),
        SeedStage.FINE_TUNING: frozenset({SeedStage.FOSSILIZED, SeedStage.CULLED, SeedStage.ROLLED_BACK}),
        SeedStage.FOSSILIZED: frozenset(),
        SeedStage.CULLED: frozenset({SeedStage.DORMANT}),
        SeedStage.CANCELLED: frozenset({SeedStage.DORMANT}),
        SeedStage.ROLLED_BACK: frozenset({SeedStage.DORMANT}),
    }
)
"""Every legal transition. A site may carry further seeds above a fossil; each has its own life."""

NEXT: Mapping[SeedStage, SeedStage] = MappingProxyType(
    {
        SeedStage.DORMANT: SeedStage.GERMINATED,
        SeedStage.GERMINATED: SeedStage.TRAINING,
        SeedStage.TRAINING: SeedStage.GRAFTING,
        SeedStage.GRAFTING: SeedStage.STABILIZING,
        SeedStage.STABILIZING: SeedStage.EVALUATING,
        SeedStage.EVALUATING: SeedStage.FINE_TUNING,
        SeedStage.FINE_TUNING: SeedStage.FOSSILIZED,
    }
)
"""The stage that ADVANCE leads to (`direct` goes from GERMINATED to GRAFTING instead)."""

BLENDED = frozenset(
    {
        SeedStage.GRAFTING,
        SeedStage.STABILIZING,
        SeedStage.EVALUATING,
        SeedStage.FINE_TUNING,
        SeedStage.FOSSILIZED,
    }
)
ACTIVE = frozenset({SeedStage.GERMINATED, SeedStage.TRAINING} | BLENDED) - {SeedStage.FOSSILIZED}
ENDED = frozenset({SeedStage.CULLED, SeedStage.CANCELLED, SeedStage.ROLLED_BACK})


def advance(stage: SeedStage, to: SeedStage) -> SeedStage:
    """Returns `to` if the table allows it.

    Raises:
        IllegalTransitionError: if the table has no arrow from `stage` to `to`.
    """
    if to not in TRANSITIONS[stage]:
        allowed = ", ".join(sorted(TRANSITIONS[stage])) or "nothing"
        raise IllegalTransitionError(f"{stage} cannot become {to}; it can become {allowed}", field="stage")
    return to
