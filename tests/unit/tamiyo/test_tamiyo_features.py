"""What graphs are described by: figures in [-1, 1], each in its place, and what was not measured is told from 0."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tamiyo_story import SHADOW, layer, option, packet

from esper.leyline import BudgetState, Evidence, EvidenceKind, SeedStage
from esper.tamiyo import features
from esper.tamiyo.features import (
    RUN_FEATURES,
    SEED_FEATURES,
    SITE_FEATURES,
    run_features,
    seed_features,
    site_features,
)


def row(table, names, number=0):
    return dict(zip(names, table[number].tolist(), strict=True))


def test_a_measured_site_shows_its_figures():
    sites = (
        layer("a", 3, potential=0.1, health_score=0.5, dead_neuron_ratio=0.25, gradient_norm=1.0),
        layer("b", 3, potential=0.4),
    )
    seen = packet(3, *sites, options=[option("b", "small", 600), option("b", "large", 4000)], embargoed=("a",))
    first, second = (row(site_features(seen), SITE_FEATURES, place) for place in (0, 1))
    assert (first["is_feature_map"], first["is_vector"], first["is_sequence"]) == (1.0, 0.0, 0.0)
    assert (first["depth"], second["depth"]) == (0.0, 1.0)
    assert (first["channels"], first["positions"]) == pytest.approx((3 / 20, 6 / 20))
    assert (first["dead"], first["health"], first["gradient"]) == (0.25, 0.5, 0.5)
    assert (first["potential_share"], second["potential_share"]) == (0.25, 1.0)
    assert (first["is_embargoed"], second["is_embargoed"]) == (1.0, 0.0)
    assert (first["options"], first["lightest"], first["heaviest"]) == (0.0, 1.0, 1.0)
    assert second["options"] == pytest.approx(0.2)
    assert (second["lightest"], second["heaviest"]) == pytest.approx((600 / 4812, 4000 / 4812))


def test_what_was_not_measured_is_flagged():
    table = site_features(packet(3, layer("a", 3), layer("b", 2, dead_neuron_ratio=0.0)))
    unmeasured, dead_only = (row(table, SITE_FEATURES, place) for place in (0, 1))
    assert not any(value for name, value in unmeasured.items() if name.startswith("has_"))
    assert (dead_only["dead"], dead_only["has_dead"], dead_only["has_health"]) == (0.0, 1.0, 0.0)
    assert dead_only["is_fresh"] == 0.0


def test_a_seed_shows_its_stage_its_kernel_and_its_paired_gain():
    kernel = option("a", "conv", params=1000, flops=30_000, risk=0.3)
    evidence = SHADOW.model_copy(update={"baseline": 0.5})
    seed = layer("a", 3, stage=SeedStage.TRAINING, kernel_id=kernel.kernel_id, evidence=evidence, train_loss=1.0)
    shown = row(seed_features(packet(3, seed, options=[kernel])), SEED_FEATURES)
    assert [name for name in SEED_FEATURES[:11] if shown[name]] == ["is_training"]
    assert shown["gain"] == pytest.approx(0.1 / 0.9)  # 0.4 beside 0.5
    assert shown["certainty"] == pytest.approx(10 / 12)
    assert (shown["has_gain"], shown["has_harm"]) == (1.0, 0.0)
    assert (shown["train_loss"], shown["has_train_loss"]) == (0.0, 1.0)
    assert (shown["parameters"], shown["flops"], shown["risk"]) == pytest.approx((0.5, 0.75, 0.3))


def test_evidence_of_harm_is_no_gain_and_none_is_neither():
    worse = Evidence(kind=EvidenceKind.HARM, gain=-0.5, baseline=0.5, num_pairs=1)
    none = Evidence(kind=EvidenceKind.NONE, reason="direct")
    table = seed_features(packet(3, layer("a", 3, evidence=worse), layer("b", 3, evidence=none)))
    harmed, untold = (row(table, SEED_FEATURES, place) for place in (0, 1))
    assert (harmed["has_gain"], harmed["gain"], harmed["has_harm"]) == (0.0, 0.0, 1.0)
    assert harmed["harm"] == pytest.approx(1 / 3)  # 1.0 beside 0.5
    assert (untold["has_gain"], untold["has_harm"]) == (0.0, 0.0)


def test_the_run_shows_its_progress_and_its_budget():
    budget = BudgetState(params_used=30, params_limit=40, flops_used=5)
    told = packet(14, val_loss=3.0, budget=budget, pending=8, governor="spike", missing=("Urza",))
    shown = row(run_features(told), RUN_FEATURES)
    assert (shown["progress"], shown["params"], shown["has_flops_limit"]) == (0.5, 0.75, 0.0)
    assert (shown["is_governed"], shown["missing"], shown["pending"]) == (1.0, 0.5, 0.5)
    assert (shown["overfit"], shown["has_metric"]) == (0.5, 0.0)


def test_every_feature_is_documented():
    documented = set(re.findall(r"\w+", features.__doc__ or ""))
    stages = {f"is_{stage.value.lower()}" for stage in SeedStage}  # "is_dormant ... is_rolled_back"
    assert {*SITE_FEATURES, *SEED_FEATURES, *RUN_FEATURES} - stages <= documented


anything = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | anything
fraction = st.none() | st.floats(0, 1)
evidences = st.none() | st.builds(
    Evidence,
    kind=st.sampled_from(EvidenceKind),
    gain=anything,
    stderr=st.floats(0, allow_nan=False, allow_infinity=False),
    baseline=anything,
    num_pairs=st.integers(0, 9),
)
layers = st.builds(
    layer,
    st.just("a"),
    st.integers(0, 9),
    potential=maybe,
    stage=st.sampled_from(SeedStage),
    activation_variance=maybe,
    gradient_norm=maybe,
    dead_neuron_ratio=fraction,
    health_score=fraction,
    evidence=evidences,
    train_loss=maybe,
    epochs_in_stage=st.integers(0, 10**6),
    kernel_id=st.sampled_from([None, "a-k"]),
)
counts = st.integers(0, 10**20)
budgets = st.builds(
    BudgetState,
    params_used=counts,
    params_limit=st.none() | counts,
    flops_used=counts,
    flops_limit=st.none() | counts,
)


@settings(max_examples=60, deadline=None)
@given(here=layers, val_loss=maybe, budget=budgets, params=counts, risk=fraction)
def test_no_packet_gives_a_figure_beyond_one(here, val_loss, budget, params, risk):
    told = packet(9, here, val_loss=val_loss, budget=budget, options=[option("a", "k", params, params, risk=risk)])
    for table in (site_features(told), seed_features(told), run_features(told)):
        assert table.dtype == np.float32
        assert np.all(np.isfinite(table))
        assert np.abs(table).max() <= 1.0


def test_a_packet_without_sites_gives_empty_tables():
    assert site_features(packet(0)).shape == (0, len(SITE_FEATURES))
    assert seed_features(packet(0)).shape == (0, len(SEED_FEATURES))
