"""Watches the vitals of a run and says when to go back. Pure: it judges figures, and neither holds nor moves a tensor.

The loss is compared with its own recent history by a robust z-score (median and median absolute deviation), without
an absolute floor: a governor with one once missed every spike below it. Suspect losses do not enter the history,
so a spike cannot make itself normal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

MAD_TO_SIGMA = 1.4826
"""For normal noise the median absolute deviation times this is the standard deviation."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a loss is too far off.

    Attributes:
        window: losses of history.
        min_history: no judgement before so many.
        z: robust z-score above which a loss is suspect.
        strikes: consecutive suspect losses that make a verdict; one bad batch is no reason to go back.
        min_spread: share of the median that always counts as noise, so that a flat history does not flag a whisper.
        watch_steps: steps after a change of the live path on which the norm of the weights is watched.
        norm_growth: factor by which it may grow meanwhile, or over an epoch. A grower was seen to write 2e15 into
            weights while the loss right after was normal.
        max_rollbacks: rollbacks without a new good snapshot between them; after that going back cannot help.
    """

    window: int = 100
    min_history: int = 20
    z: float = 8.0
    strikes: int = 5
    min_spread: float = 0.05
    watch_steps: int = 10
    norm_growth: float = 10.0
    max_rollbacks: int = 3


class Verdict(StrEnum):
    """What a loss says of the run."""

    OK = "ok"
    SUSPECT = "suspect"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict, and why."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What the governor remembers.

    Attributes:
        losses: the latest sound losses, oldest first.
        strikes: suspect losses in a row.
        rollbacks: rollbacks since the last snapshot that was taken in health.
    """

    losses: tuple[float, ...] = ()
    strikes: int = 0
    rollbacks: int = 0


def judge(vitals: Vitals, loss: float, limits: Limits) -> tuple[Vitals, Judgement]:
    """Takes in the loss of one step."""
    if not math.isfinite(loss):
        return vitals, Judgement(Verdict.ROLLBACK, f"the loss is {loss}")
    score = _robust_z(vitals.losses, loss, limits)
    if score <= limits.z:
        kept = (*vitals.losses, loss)[-limits.window :]
        return replace(vitals, losses=kept, strikes=0), Judgement(Verdict.OK)
    strikes = vitals.strikes + 1
    words = f"loss {loss:.4g} stands {score:.1f} deviations above its own history, {strikes} steps in a row"
    verdict = Verdict.ROLLBACK if strikes >= limits.strikes else Verdict.SUSPECT
    return replace(vitals, strikes=strikes), Judgement(verdict, words)


def judge_norm(before: float, after: float, limits: Limits) -> str | None:
    """What is wrong with the norm of the weights, compared with one that was sound; None if it is fit."""
    if not math.isfinite(after):
        return "the weights are not finite"
    if before > 0 and after > limits.norm_growth * before:
        return f"the norm of the weights went from {before:.4g} to {after:.4g}"
    return None


def after_rollback(vitals: Vitals) -> Vitals:
    """The restored weights belong to the history that is kept; the suspects are forgotten."""
    return replace(vitals, strikes=0, rollbacks=vitals.rollbacks + 1)


def after_snapshot(vitals: Vitals) -> Vitals:
    """A new good state was reached."""
    return replace(vitals, rollbacks=0)


def vitals_state(vitals: Vitals) -> dict[str, Any]:
    """Returns `vitals` as JSON values."""
    return {"losses": list(vitals.losses), "strikes": vitals.strikes, "rollbacks": vitals.rollbacks}


def vitals_from(state: Mapping[str, Any]) -> Vitals:
    """Inverse of `vitals_state`."""
    return Vitals(tuple(state["losses"]), int(state["strikes"]), int(state["rollbacks"]))


def _robust_z(history: tuple[float, ...], loss: float, limits: Limits) -> float:
    """How far above the median, in robust deviations; 0 while the history is short."""
    if len(history) < limits.min_history:
        return 0.0
    median = statistics.median(history)
    deviation = MAD_TO_SIGMA * statistics.median(abs(past - median) for past in history)
    spread = max(deviation, limits.min_spread * abs(median), 1e-12)
    return (loss - median) / spread
