"""The risk score and the tags: what raises them, and that each threshold is where the documentation puts it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import BlueprintIR, Check, KernelTag, Node, SiteKind, SiteSignature
from esper.leyline.kernels import merged_tags
from esper.leyline.lower import lower
from esper.leyline.ops import count_flops, memory_bytes
from esper.urabrask.gauntlet import examine
from esper.urabrask.risk import HIGH_RISK, LOW_RISK, WEIGHTS, earned_tags, risk_score, risk_terms
from esper.urza.library import load_library

SITE = SiteSignature(kind=SiteKind.VECTOR, channels=8)
FAULTLESS = {
    "error_forward": 0.0,
    "headroom_decades": 16.0,
    "birth_change": 0.0,
    "learned_output": 0.5,
    "max_gradient": 0.1,
    "silent_share": 0.0,
    "parameters": 0.0,
    "memory_bytes": 1e9,
    "flops_per_sample": 1e9,
}
WORST = {
    "error_forward": 1e-4,
    "headroom_decades": 0.0,
    "birth_change": 1.0,
    "learned_output": 100.0,
    "max_gradient": 1_000.0,
    "silent_share": 1.0,
    "parameters": 31.0 * 64,
}
TERM_OF = {
    "error_forward": "precision",
    "headroom_decades": "range",
    "birth_change": "birth",
    "learned_output": "growth",
    "max_gradient": "gradient",
    "silent_share": "silence",
    "parameters": "size",
}


def dense(channels: int = 8) -> SiteSignature:
    return SiteSignature(kind=SiteKind.VECTOR, channels=channels)


def test_nothing_wrong_is_no_risk():
    assert set(risk_terms(FAULTLESS, SITE).values()) == {0.0}
    assert risk_score(risk_terms(FAULTLESS, SITE)) == 0.0


@pytest.mark.parametrize("name", sorted(WORST))
def test_each_figure_moves_its_own_term_to_one_and_weighs_as_documented(name: str):
    terms = risk_terms(FAULTLESS | {name: WORST[name]}, SITE)
    assert {term for term, value in terms.items() if value == 1.0} == {TERM_OF[name]}
    assert {term for term, value in terms.items() if value} == {TERM_OF[name]}
    assert risk_score(terms) == pytest.approx(WEIGHTS[TERM_OF[name]])


@given(st.fixed_dictionaries({name: st.floats(0.0, 1.0) for name in WEIGHTS}), st.sampled_from(sorted(WEIGHTS)))
def test_the_score_stays_in_bounds_and_grows_with_every_term(terms: dict[str, float], name: str):
    score = risk_score(terms)
    assert 0.0 <= score < 1.0
    assert risk_score(terms | {name: 1.0}) >= score


def test_a_kernel_that_changes_its_site_at_birth_is_riskier_than_one_that_does_not():
    def report(**params):
        ir = BlueprintIR(fit=(SiteKind.VECTOR,), nodes=(Node(id="lin", op="linear", params=params),), output="lin")
        return examine(lower(ir, SITE), ir, SITE)

    quiet, loud = report(init="zeros"), report()
    assert quiet.risk_terms["birth"] == 0.0 < loud.risk_terms["birth"]
    assert quiet.risk_score < loud.risk_score


def test_tags_follow_from_figures_at_their_thresholds():
    limit = {"memory_bytes": 4 * (64 + 8 + 8), "flops_per_sample": 2 * 64}

    def tags(figures, score=0.3, checks=()):
        return set(earned_tags(checks, figures, score, SITE))

    assert tags(limit) == {KernelTag.LOW_MEMORY, KernelTag.HIGH_SPEED}
    assert tags({name: value + 1 for name, value in limit.items()}) == set()
    high = {name: value + 1 for name, value in limit.items()}
    assert tags(high, LOW_RISK) == {KernelTag.LOW_RISK}
    assert tags(high, HIGH_RISK) == {KernelTag.HIGH_RISK}
    zero = Check(name="zero_at_birth", passed=True)
    assert tags(high, checks=(zero,)) == {KernelTag.ZERO_AT_BIRTH}
    assert tags(high, checks=(zero.model_copy(update={"passed": False}),)) == set()


def test_the_limit_of_both_cost_tags_is_a_dense_layer():
    ir = BlueprintIR(fit=tuple(SiteKind), nodes=(Node(id="lin", op="linear"),), output="lin")
    for site in (dense(), SiteSignature(kind=SiteKind.SEQUENCE, channels=6, extent=(5,))):
        figures = {"memory_bytes": memory_bytes(ir, site), "flops_per_sample": count_flops(ir, site)}
        assert {KernelTag.LOW_MEMORY, KernelTag.HIGH_SPEED} <= set(earned_tags((), figures, 0.3, site))


@pytest.mark.parametrize(
    ("name", "site", "tags"),
    [
        ("low_rank_adapter", dense(64), {"zero_at_birth", "low_memory", "high_speed", "low_risk"}),
        ("mlp_4x", dense(64), {"zero_at_birth", "low_risk"}),
        ("norm_replace", dense(64), {"low_memory", "high_speed"}),
    ],
)
def test_tags_of_library_designs(name: str, site: SiteSignature, tags: set[str]):
    ir = load_library()[name].ir
    assert set(examine(lower(ir, site), ir, site).tags) == tags


def test_declared_tags_stay_but_earned_ones_cannot_be_declared():
    assert merged_tags(("conv", "low_risk", "light"), (KernelTag.HIGH_SPEED,)) == ("conv", "light", "high_speed")
    assert merged_tags(("high_speed",), (KernelTag.HIGH_SPEED,)) == ("high_speed",)
    assert all(type(tag) is str for tag in merged_tags((), tuple(KernelTag)))
