from __future__ import annotations

import pytest

from esper.config import KasminaConfig
from esper.kasmina.gates import GateFacts, gate, harm_limit, target_of
from esper.leyline import BlendStrategy, Evidence, EvidenceKind, SeedStage, SiteKind, SiteSignature
from esper.leyline.growth import SeedView

CONFIG = KasminaConfig(min_training_epochs=2, max_training_epochs=4, evidence_z=2.0, harm_tolerance=0.1)
SITE = SiteSignature(kind=SiteKind.VECTOR, channels=4)


def view(stage, *, epochs=0, alpha=0.0, strategy=BlendStrategy.RAMP):
    return SeedView("s0", "fc", SITE, stage, alpha=alpha, strategy=strategy, epochs_in_stage=epochs)


def judge(stage, evidence=None, *, epochs=0, alpha=0.0, strategy=BlendStrategy.RAMP, **facts):
    seed = view(stage, epochs=epochs, alpha=alpha, strategy=strategy)
    return gate(seed, evidence, CONFIG, GateFacts(**facts))


def shadow(gain, stderr=0.1):
    return Evidence(kind=EvidenceKind.SHADOW, gain=gain, stderr=stderr, baseline=1, candidate=1 - gain, num_pairs=50)


def harm(loss, baseline=1.0):
    return Evidence(kind=EvidenceKind.HARM, gain=baseline - loss, baseline=baseline, candidate=loss, num_pairs=1)


@pytest.mark.parametrize(
    ("facts", "strategy", "is_open"),
    [
        ({"loaded": False}, BlendStrategy.RAMP, False),
        ({}, BlendStrategy.RAMP, True),
        ({"has_baseline": False}, BlendStrategy.RAMP, True),
        ({"zero_at_birth": True}, BlendStrategy.DIRECT, True),
        ({"zero_at_birth": False}, BlendStrategy.DIRECT, False),
        ({"zero_at_birth": True, "has_baseline": False}, BlendStrategy.DIRECT, False),
        ({"zero_at_birth": True, "loaded": False}, BlendStrategy.DIRECT, False),
    ],
)
def test_germinated_needs_its_kernel(facts, strategy, is_open):
    answer = judge(SeedStage.GERMINATED, strategy=strategy, **facts)
    assert answer.open is is_open
    assert not answer.cull
    assert answer.words


@pytest.mark.parametrize(
    ("evidence", "epochs", "facts", "is_open", "cull"),
    [
        (shadow(0.3), 2, {}, True, False),
        (shadow(0.3), 1, {}, False, False),  # too early, however good
        (shadow(0.2), 2, {}, False, False),  # exactly two standard errors are not more than two
        (shadow(0.2), 4, {}, False, True),
        (shadow(-1.0), 4, {}, False, True),
        (None, 2, {}, False, False),
        (None, 4, {}, False, True),
        (harm(0.1), 3, {}, False, False),  # evidence of another kind is none
        (shadow(0.3), 2, {"has_baseline": False}, False, False),
        (shadow(0.3), 2, {"errors": 1}, False, True),
    ],
)
def test_training_needs_a_proven_gain(evidence, epochs, facts, is_open, cull):
    answer = judge(SeedStage.TRAINING, evidence, epochs=epochs, **facts)
    assert (answer.open, answer.cull) == (is_open, cull)


def test_missing_evidence_is_said():
    assert "no paired evidence" in judge(SeedStage.TRAINING, None, epochs=3).words


@pytest.mark.parametrize(("alpha", "is_open"), [(0.0, False), (0.999999, False), (1.0, True)])
def test_grafting_needs_all_of_alpha(alpha, is_open):
    assert judge(SeedStage.GRAFTING, alpha=alpha).open is is_open


@pytest.mark.parametrize("stage", [SeedStage.STABILIZING, SeedStage.EVALUATING, SeedStage.FINE_TUNING])
@pytest.mark.parametrize(
    ("evidence", "epochs", "facts", "is_open", "cull"),
    [
        (harm(1.1), 1, {}, True, False),  # the upper end of the band is within it
        (harm(1.11), 1, {}, False, True),
        (harm(0.5), 0, {}, False, False),
        (None, 9, {}, False, False),
        (shadow(0.9), 9, {}, False, False),
        (harm(0.5), 1, {"val_finite": False}, False, True),
        (harm(0.5), 1, {"retiring": True}, False, False),
    ],
)
def test_after_the_graft_only_harm_counts(stage, evidence, epochs, facts, is_open, cull):
    answer = judge(stage, evidence, epochs=epochs, alpha=1.0, **facts)
    assert (answer.open, answer.cull) == (is_open, cull)


def test_the_band_holds_for_negative_losses():
    assert harm_limit(2.0, 0.25) == 2.5
    assert harm_limit(-2.0, 0.25) == -1.5


@pytest.mark.parametrize(
    "stage", [SeedStage.DORMANT, SeedStage.FOSSILIZED, SeedStage.CULLED, SeedStage.CANCELLED, SeedStage.ROLLED_BACK]
)
def test_stages_without_a_gate_are_shut(stage):
    answer = judge(stage, epochs=99)
    assert not answer.open
    assert not answer.cull


def test_direct_goes_straight_to_grafting():
    assert target_of(view(SeedStage.GERMINATED, strategy=BlendStrategy.DIRECT)) is SeedStage.GRAFTING
    assert target_of(view(SeedStage.GERMINATED)) is SeedStage.TRAINING
    assert target_of(view(SeedStage.FOSSILIZED)) is None
