"""The gate of each stage: whether a seed may go on, whether it should be removed, and why. Pure.

Worth is proven before the host can lean on the kernel: the shadow's paired gain must exceed its own uncertainty. From
the graft on only harm can be seen, and only harm is looked for. What was not measured opens no gate.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.config import KasminaConfig
from esper.kasmina.strategies import MEASURED
from esper.leyline.growth import SeedView
from esper.leyline.seeds import NEXT, SeedStage
from esper.leyline.signals import BlendStrategy, Evidence, EvidenceKind


@dataclass(frozen=True, slots=True)
class Gate:
    """The answer: `open` lets ADVANCE through, `cull` asks for removal, `words` say why."""

    open: bool
    cull: bool
    words: str


@dataclass(frozen=True, slots=True)
class GateFacts:
    """What the view does not tell.

    Attributes:
        loaded: its kernel is here and verified.
        zero_at_birth: r(h) was exactly 0 with the kernel's initial parameters.
        has_baseline: a validation loss from before the graft is known (or would be, if it were grafted now).
        val_finite: the last validation loss since the graft was finite.
        retiring: alpha is on its way to 0.
        errors: shadow updates left out for a gradient that was not finite.
        fault: how its kernel failed in use.
    """

    loaded: bool = True
    zero_at_birth: bool = False
    has_baseline: bool = True
    val_finite: bool = True
    retiring: bool = False
    errors: int = 0
    fault: str = ""


_STANDING = {
    SeedStage.DORMANT: "waits for a kernel",
    SeedStage.FOSSILIZED: "permanent",
    SeedStage.CULLED: "under embargo",
    SeedStage.CANCELLED: "its kernel was refused",
    SeedStage.ROLLED_BACK: "under embargo",
}
"""Stages without a gate, and why."""


def target_of(view: SeedView) -> SeedStage | None:
    """The stage that ADVANCE leads to; None from a stage that has no way on."""
    if view.stage is SeedStage.GERMINATED and view.strategy is BlendStrategy.DIRECT:
        return SeedStage.GRAFTING
    return NEXT.get(view.stage)


def gate(view: SeedView, evidence: Evidence | None, config: KasminaConfig, facts: GateFacts) -> Gate:
    """Judges one seed.

    Args:
        view: the seed.
        evidence: of its worth while it is in TRAINING, of harm once it is blended; None if none was taken.
        config: the limits.
        facts: what the view does not tell.
    """
    if facts.retiring:
        return Gate(open=False, cull=False, words=f"retiring, alpha {view.alpha:.2f}")
    if view.stage in _STANDING or facts.fault:
        words = _STANDING.get(view.stage) or f"its kernel fails: {facts.fault}"
        return Gate(open=False, cull=view.stage not in _STANDING, words=words)
    if view.stage is SeedStage.GERMINATED:
        return _germinated(view, facts)
    if view.stage is SeedStage.TRAINING:
        return _training(view, evidence, config, facts)
    if view.stage is SeedStage.GRAFTING:
        held = view.strategy in MEASURED and view.alpha < 1.0 and view.epochs_in_stage >= config.max_ramp_epochs
        by = f" ({view.strategy}, {view.epochs_in_stage} epochs)" if view.strategy in MEASURED else ""
        return Gate(open=view.alpha == 1.0, cull=held, words=f"alpha is {view.alpha:.2f}, needs 1{by}")
    min_epochs = {
        SeedStage.STABILIZING: config.stabilize_epochs,
        SeedStage.EVALUATING: 1,
        SeedStage.FINE_TUNING: config.fine_tune_epochs,
    }[view.stage]
    return _harm(view, evidence, config, facts, min_epochs=min_epochs)


def _germinated(view: SeedView, facts: GateFacts) -> Gate:
    if not facts.loaded:
        return Gate(open=False, cull=False, words="its kernel is not loaded yet")
    if view.strategy is BlendStrategy.DIRECT:
        if not facts.zero_at_birth:
            return Gate(open=False, cull=False, words="direct needs a kernel that is zero at birth; this one is not")
        if not facts.has_baseline:
            return Gate(open=False, cull=False, words="no validation loss yet: harm could not be told afterwards")
    return Gate(open=True, cull=False, words="its kernel is loaded and verified")


def _training(view: SeedView, evidence: Evidence | None, config: KasminaConfig, facts: GateFacts) -> Gate:
    epochs = view.epochs_in_stage
    overdue = epochs >= config.max_training_epochs
    if facts.errors:
        return Gate(open=False, cull=True, words=f"{facts.errors} of its gradients were not finite")
    if evidence is None or evidence.kind is not EvidenceKind.SHADOW:
        return Gate(open=False, cull=overdue, words=f"no paired evidence after {epochs} epochs of training")
    limit = config.evidence_z * evidence.stderr
    gain = f"gain {evidence.gain:.4g} (needs more than {limit:.4g} over {evidence.num_pairs} pairs)"
    if epochs < config.min_training_epochs:
        return Gate(open=False, cull=False, words=f"{gain}; trained {epochs} of {config.min_training_epochs} epochs")
    if not evidence.gain > limit:
        return Gate(open=False, cull=overdue, words=f"no proven {gain} after {epochs} epochs")
    if not facts.has_baseline:
        return Gate(open=False, cull=False, words=f"{gain}; but no validation loss yet: harm could not be told later")
    return Gate(open=True, cull=False, words=gain)


def _harm(
    view: SeedView, evidence: Evidence | None, config: KasminaConfig, facts: GateFacts, *, min_epochs: int
) -> Gate:
    if not facts.val_finite:
        return Gate(open=False, cull=True, words="the validation loss is not finite since the graft")
    if evidence is None or evidence.kind is not EvidenceKind.HARM:
        return Gate(open=False, cull=False, words=f"no validation loss in {view.stage}: harm is not ruled out")
    limit = harm_limit(evidence.baseline, config.harm_tolerance)
    loss = f"validation loss {evidence.candidate:.4g}, limit {limit:.4g} (before the graft {evidence.baseline:.4g})"
    if evidence.candidate > limit:
        return Gate(open=False, cull=True, words=f"harm: {loss}")
    if view.epochs_in_stage < min_epochs:
        return Gate(open=False, cull=False, words=f"{loss}; {view.epochs_in_stage} of {min_epochs} epochs")
    return Gate(open=True, cull=False, words=f"no harm: {loss}")


def harm_limit(baseline: float, tolerance: float) -> float:
    """The upper end of the pre-graft band; losses may be negative."""
    return baseline + tolerance * abs(baseline)
