"""Watches the vitals of a run and says when to go back. Pure: it judges figures, and neither holds nor moves a tensor.

The loss is compared with its own recent history by a robust z-score (median and median absolute deviation), without
an absolute floor: a governor with one once missed every spike below it. Suspect losses do not enter the history,
so a spike cannot make itself normal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from esper.config import GovernorConfig

MAD_TO_SIGMA = 1.4826
"""For normal noise the median absolute deviation times this is the standard deviation."""


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


def judge(vitals: Vitals, loss: float, limits: GovernorConfig, *, left_out: bool = False) -> tuple[Vitals, Judgement]:
    """Takes in the loss of one step.

    Args:
        vitals: so far.
        loss: of the step.
        limits: how far off is too far.
        left_out: whether a scaler left the step out since its gradients overflowed. That is no sickness, unless the
            loss is not finite either, again and again.
    """
    if left_out:
        if math.isfinite(loss):
            return vitals, Judgement(Verdict.OK)
        return _strike(vitals, f"the loss is {loss}, and the scaler leaves out the step,", limits)
    if not math.isfinite(loss):
        return vitals, Judgement(Verdict.ROLLBACK, f"the loss is {loss}")
    score = _robust_z(vitals.losses, loss, limits)
    if score <= limits.z:
        kept = (*vitals.losses, loss)[-limits.window :]
        return replace(vitals, losses=kept, strikes=0), Judgement(Verdict.OK)
    return _strike(vitals, f"loss {loss:.4g} stands {score:.1f} deviations above its own history,", limits)


def judge_norm(before: float, after: float, limits: GovernorConfig) -> str | None:
    """What is wrong with the norm of the weights, compared with one that was sound; None if it is fit."""
    if not math.isfinite(after):
        return "the weights are not finite"
    if before > 0 and after > limits.norm_growth * before:
        return f"the norm of the weights went from {before:.4g} to {after:.4g}"
    return None


def judge_graft(name: str, *, weight: float, update: float, host: float, limits: GovernorConfig) -> str | None:
    """What is out of line in a kernel on the live path; None if nothing is.

    Args:
        name: of the kernel.
        weight: root mean square of its weights.
        update: that of what the last step changed of them.
        host: that of the host's weights, when they were sound.
        limits: how much more than the host's is too much.
    """
    if not math.isfinite(weight):
        return f"the weights of {name} are not finite"
    if host <= 0:
        return None
    if weight > limits.graft_weight * host:
        return f"the weights of {name} are out of line: {weight:.4g} against {host:.4g} in the host"
    if update > limits.graft_update * host:
        return f"one step moved the weights of {name} by {update:.4g}, where the host's are {host:.4g}"
    return None


def judge_gradient(norm: float | None) -> str | None:
    """What is wrong with the gradients of a step; None if they are finite, or there are none."""
    return None if norm is None or math.isfinite(norm) else "the gradient is not finite"


def judge_activations(sites: Mapping[str, tuple[int, int]], sound_before: Collection[str]) -> str | None:
    """Which site put out what is not finite; None if none did, or only one that always does.

    Args:
        sites: for each site the samples that were finite, and the sampled steps that were not.
        sound_before: sites that once were finite.
    """
    for site, (num_samples, num_skipped) in sites.items():
        if num_skipped and (num_samples or site in sound_before):
            return f"activations or gradients at {site} were not finite on {num_skipped} sampled steps"
    return None


def after_rollback(vitals: Vitals, losses: tuple[float, ...]) -> Vitals:
    """The history goes back with the weights; the suspects are forgotten.

    Args:
        vitals: of the run that went wrong.
        losses: the history at the snapshot that is restored. The losses since are those of weights that are no more:
            against them the restored ones, which stand higher again, would look sick.
    """
    return Vitals(losses=losses, rollbacks=vitals.rollbacks + 1)


def after_snapshot(vitals: Vitals) -> Vitals:
    """A new good state was reached."""
    return replace(vitals, rollbacks=0)


def vitals_state(vitals: Vitals) -> dict[str, Any]:
    """Returns `vitals` as JSON values."""
    return {"losses": list(vitals.losses), "strikes": vitals.strikes, "rollbacks": vitals.rollbacks}


def vitals_from(state: Mapping[str, Any]) -> Vitals:
    """Inverse of `vitals_state`."""
    return Vitals(tuple(state["losses"]), int(state["strikes"]), int(state["rollbacks"]))


def _strike(vitals: Vitals, words: str, limits: GovernorConfig) -> tuple[Vitals, Judgement]:
    strikes = vitals.strikes + 1
    verdict = Verdict.ROLLBACK if strikes >= limits.strikes else Verdict.SUSPECT
    return replace(vitals, strikes=strikes), Judgement(verdict, f"{words} {strikes} steps in a row")


def _robust_z(history: tuple[float, ...], loss: float, limits: GovernorConfig) -> float:
    """How far above the median, in robust deviations; 0 while the history is short."""
    if len(history) < limits.min_history:
        return 0.0
    median = statistics.median(history)
    deviation = MAD_TO_SIGMA * statistics.median(abs(past - median) for past in history)
    spread = max(deviation, limits.min_spread * abs(median), 1e-12)
    return (loss - median) / spread
