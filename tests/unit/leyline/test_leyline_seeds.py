"""The seed's life as a table: what must be reachable, and what must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import ENDED, NEXT, TRANSITIONS, IllegalTransitionError, SeedStage, advance
from esper.leyline.seeds import ACTIVE, BLENDED

stages = st.sampled_from(SeedStage)


@given(stage=stages, to=stages)
def test_advance_follows_the_table_and_nothing_else(stage: SeedStage, to: SeedStage):
    if to in TRANSITIONS[stage]:
        assert advance(stage, to) is to
    else:
        with pytest.raises(IllegalTransitionError, match=f"{stage} cannot become {to}"):
            advance(stage, to)


def test_the_table_knows_every_stage_and_no_stage_becomes_itself():
    assert TRANSITIONS.keys() == set(SeedStage)
    assert all(stage not in targets for stage, targets in TRANSITIONS.items())


def test_the_straight_way_leads_from_dormant_to_fossilized():
    walked = [SeedStage.DORMANT]
    while walked[-1] in NEXT:
        walked.append(advance(walked[-1], NEXT[walked[-1]]))
    assert walked[-1] is SeedStage.FOSSILIZED
    assert len(walked) == len(set(walked)) == 8
    assert set(walked) | ENDED == set(SeedStage)


def test_a_fossil_stays_and_every_other_end_leads_back_to_dormant():
    assert TRANSITIONS[SeedStage.FOSSILIZED] == frozenset()
    assert all(TRANSITIONS[stage] == {SeedStage.DORMANT} for stage in ENDED)


def test_whoever_holds_a_place_can_give_it_up():
    assert ACTIVE.isdisjoint(ENDED)
    for stage in ACTIVE:
        assert TRANSITIONS[stage] & ENDED, stage
        assert stage.is_active
    assert not SeedStage.FOSSILIZED.is_active
    assert not SeedStage.DORMANT.is_active


def test_only_a_blended_seed_can_be_rolled_back():
    able = {stage for stage in SeedStage if SeedStage.ROLLED_BACK in TRANSITIONS[stage]}
    assert able == BLENDED - {SeedStage.FOSSILIZED}
    assert {stage for stage in SeedStage if stage.is_blended} == BLENDED


def test_the_host_never_leans_on_a_kernel_without_grafting():
    for stage in SeedStage:
        for to in TRANSITIONS[stage]:
            if to.is_blended and not stage.is_blended:
                assert to is SeedStage.GRAFTING


@given(stage=stages)
def test_codes_read_back(stage: SeedStage):
    assert SeedStage.from_code(stage.code) is stage
    assert 0 <= stage.code < 256


def test_codes_are_the_ones_checkpoints_hold():
    assert [stage.code for stage in SeedStage] == list(range(11))
    assert SeedStage.DORMANT.code == 0
    assert SeedStage.FOSSILIZED.code == 7
    with pytest.raises(ValueError, match="99"):
        SeedStage.from_code(99)
