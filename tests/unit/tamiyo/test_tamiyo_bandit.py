"""The bandit: that it finds the better kernels in each of its ways, and counts paired evidence alone, and once."""

from __future__ import annotations

import json
import random

import pytest
from tamiyo_story import SHADOW, SIGNATURE, PaperHost, layer, option, packet

from esper.config import BanditConfig, TamiyoConfig
from esper.leyline import Evidence, EvidenceKind, FieldReport, Outcome, SeedStage, StageSpan, TrackRecord
from esper.tamiyo import initial_state, step
from esper.tamiyo.bandit import Bandit, Belief
from esper.tamiyo.memory import read_state
from esper.tamiyo.safety import Room

CHOICES = ("thompson", "ucb", "epsilon_greedy", "weighted")
WORTH = {"poor": 0.01, "good": 0.12, "harmful": -0.05, "fair": 0.05}
FLAT = [1.0 - 0.004 * epoch for epoch in range(30)]
ROOM = Room(10_000, 1_000_000)
LIVED = (
    StageSpan(stage=SeedStage.TRAINING, epochs=2, steps=20),
    StageSpan(stage=SeedStage.GRAFTING, epochs=1, steps=9),
)


def report(blueprint, gain=0.1, *, trace, outcome=Outcome.FOSSILIZED, kind=EvidenceKind.SHADOW, stages=LIVED, **rest):
    evidence = Evidence(kind=kind, gain=gain, baseline=1.0, candidate=1.0 - gain, num_pairs=9)
    return FieldReport(
        run_id="run",
        trace_id=trace,
        site="a",
        seed_id="s0",
        signature=SIGNATURE,
        blueprint_id=f"id-{blueprint}",
        blueprint=blueprint,
        kernel_id=f"a-{blueprint}",
        outcome=outcome,
        evidence=evidence,
        stages=stages,
        **rest,
    )


def options(**records):
    made = [option("a", blueprint) for blueprint in WORTH]
    return tuple(one.model_copy(update={"record": records.get(one.blueprint)}) for one in made)


def config_of(choice, **rest):
    return TamiyoConfig(policy="bandit", bandit=BanditConfig(choice=choice, **rest))


def learned(*reports, known=(), state=None):
    bandit = Bandit(BanditConfig())
    state = state or read_state(initial_state(config_of("ucb"), 0))
    state = bandit.learn(state, packet(0, layer("a"), options=known or options()))
    return bandit.learn(state, packet(1, layer("a", 1), options=known or options(), ended=reports))


# ---------------------------------------------------------------- what an adaptation is worth


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({}, 0.1),
        ({"gain": -0.25}, -0.2),  # 1.25 beside 1.0
        ({"outcome": Outcome.CULLED, "stages": LIVED[:1]}, 0.1),  # behind the host its paired gain is what it was
        ({"outcome": Outcome.CULLED}, 0.0),  # taken off the live path: its promise is not counted
        ({"outcome": Outcome.ROLLED_BACK, "stages": LIVED[:1]}, 0.0),
        ({"outcome": Outcome.ROLLED_BACK, "gain": -0.25}, -0.2),
        ({"outcome": Outcome.UNFINISHED}, None),
        ({"outcome": Outcome.CANCELLED}, None),
        ({"kind": EvidenceKind.HARM}, None),
        ({"kind": EvidenceKind.NONE}, None),
        ({"kind": EvidenceKind.FORK}, 0.1),
    ],
)
def test_the_value_of_an_adaptation_is_its_paired_gain(fields, value):
    assert report("good", trace="t", **fields).value == (None if value is None else pytest.approx(value))


def test_without_pairs_or_evidence_there_is_no_value():
    one = report("good", trace="t")
    assert one.model_copy(update={"evidence": None}).value is None
    assert one.model_copy(update={"evidence": SHADOW.model_copy(update={"num_pairs": 0})}).value is None
    even = Evidence(kind=EvidenceKind.SHADOW, num_pairs=3)
    assert one.model_copy(update={"evidence": even}).value == 0.0


def test_a_record_adds_up_mean_and_spread():
    record = TrackRecord()
    assert record.in_words == "untried"
    for value in (0.1, 0.2, 0.6):
        record = record.count(value)
    assert (record.num, record.mean, record.squares) == pytest.approx((3, 0.3, 0.14))
    assert record.in_words == "+0.300 ± 0.153 of 3"


# ---------------------------------------------------------------- learning


def test_a_report_is_counted_once_however_often_it_comes():
    told = (report("good", trace="t0"), report("poor", 0.0, trace="t1"))
    once = learned(*told)
    again = Bandit(BanditConfig()).learn(once, packet(2, layer("a", 2), options=options(), ended=told))
    assert once.bandit is not None
    assert once.bandit == again.bandit
    assert once.bandit.arms["feature_map:good"].num == 1
    assert once.bandit.arms["feature_map:fair"].num == 0


def test_an_arm_begins_with_what_other_runs_came_to_and_goes_on_from_there():
    before = TrackRecord(num=4, mean=0.2, squares=0.01)
    state = learned(report("good", 0.7, trace="t0"), known=options(good=before))
    assert state.bandit is not None
    assert state.bandit.arms["feature_map:good"] == before.count(0.7)


def test_a_report_that_stands_in_the_record_already_is_not_counted_again():
    """Tamiyo was out of reach while the first adaptation ran: Urza has counted it, and the arm is first seen now."""
    bandit, told = Bandit(BanditConfig()), (report("good", trace="t0"),)
    record = TrackRecord().count(told[0].value)
    state = read_state(initial_state(config_of("ucb"), 0))
    for epoch in (5, 6):
        state = bandit.learn(state, packet(epoch, layer("a", epoch), options=options(good=record), ended=told))
    assert state.bandit is not None
    assert state.bandit.arms["feature_map:good"].num == 1


def test_what_says_nothing_of_worth_is_not_learned_from():
    state = learned(
        report("good", trace="t0", kind=EvidenceKind.HARM), report("good", trace="t1", outcome=Outcome.UNFINISHED)
    )
    assert state.bandit is not None
    assert state.bandit.arms["feature_map:good"].num == 0


def test_other_policies_remember_nothing_of_it():
    state, _ = step(initial_state(TamiyoConfig(), 0), packet(0, layer("a"), options=options()), TamiyoConfig())
    assert state["bandit"] is None


# ---------------------------------------------------------------- choosing


@pytest.mark.parametrize("choice", CHOICES)
def test_it_comes_to_prefer_what_helps(choice):
    """120 adaptations, whose values are drawn around the truth: the last 60 are the better for it."""
    bandit, noise = Bandit(BanditConfig(choice=choice)), random.Random(1)
    state = learned()
    chosen: list[str] = []
    for number in range(120):
        state = state.model_copy(update={"rng_counter": number})
        pick = bandit.pick(options(), SIGNATURE.kind, 8, ROOM, state, 0)
        blueprint = pick.option.blueprint
        chosen.append(blueprint)
        gain = WORTH[blueprint] + noise.gauss(0.0, 0.04)
        told = report(blueprint, gain, trace=f"t{number}")
        state = bandit.learn(state, packet(number, layer("a", number), options=options(), ended=(told,)))
    late = [WORTH[blueprint] for blueprint in chosen[60:]]
    by_chance = sum(WORTH.values()) / len(WORTH)
    assert sum(late) / len(late) > 2 * by_chance
    assert chosen[60:].count("good") > (30 if choice == "weighted" else 48)
    assert chosen[60:].count("harmful") <= 6


@pytest.mark.parametrize("choice", ["ucb", "epsilon_greedy"])
def test_untried_it_chooses_as_the_heuristic_does(choice):
    host = {name: PaperHost(config, options(), {"a": 0.4}, FLAT) for name, config in (
        ("bandit", config_of(choice, epsilon=0.0)), ("heuristic", TamiyoConfig()))}  # fmt: skip
    for one in host.values():
        one.run()
    assert host["bandit"].germinated[0] == host["heuristic"].germinated[0]


def test_rent_makes_the_smaller_of_equals_the_better():
    small, large = option("a", "small", params=100), option("a", "large", params=5_000)
    known = TrackRecord(num=9, mean=0.1, squares=0.001)
    kernels = tuple(one.model_copy(update={"record": known}) for one in (large, small))
    state = learned(known=kernels)

    def chosen(rent):
        return Bandit(BanditConfig(choice="ucb", rent=rent)).pick(kernels, SIGNATURE.kind, 8, ROOM, state, 0)

    assert chosen(0.0).option.blueprint == "large"  # equal but for its worth
    assert chosen(0.1).option.blueprint == "small"


def test_ucb_gives_the_less_known_the_benefit_of_the_doubt():
    known = {"poor": TrackRecord(num=50, mean=0.06, squares=0.05), "good": TrackRecord(num=1, mean=0.05)}
    state = learned(known=options(**known))
    pair = tuple(one for one in options() if one.blueprint in known)

    def chosen(exploration):
        bandit = Bandit(BanditConfig(choice="ucb", exploration=exploration))
        return bandit.pick(pair, SIGNATURE.kind, 8, ROOM, state, 0).option.blueprint

    assert (chosen(0.0), chosen(1.0)) == ("poor", "good")


def test_a_belief_narrows_around_what_was_seen():
    record = TrackRecord()
    untried = Belief.of(record)
    for value in (0.19, 0.21) * 50:
        record = record.count(value)
    seen, draws = Belief.of(record), random.Random(0)
    assert seen.mean == pytest.approx(0.2, abs=0.002)
    assert seen.error < untried.error / 20
    drawn = [seen.draw(draws) for _ in range(500)]
    assert sum(drawn) / 500 == pytest.approx(seen.mean, abs=4 * seen.error / 500**0.5)


# ---------------------------------------------------------------- in the step


@pytest.mark.parametrize("choice", CHOICES)
def test_a_decision_is_repeated_exactly_from_its_json_and_says_why(choice):
    config = config_of(choice)
    once, again = (PaperHost(config, options(), {"a": 0.4, "b": 0.1}, FLAT, seed=3) for _ in range(2))
    states = [once.run(), again.run()]
    assert states[0] == states[1] == json.loads(json.dumps(states[0]))
    assert once.signals == again.signals
    (first, *_) = [command for signal in once.signals for command in signal.commands]
    assert f"{choice} bandit of feature_map sites" in first.reason
    assert "(value untried)" in first.reason
    assert once.signals[0].policy == "bandit"


def test_it_draws_anew_at_each_decision():
    hosts = [PaperHost(config_of("thompson"), options(), {"a": 0.4}, FLAT, seed=seed) for seed in range(12)]
    for host in hosts:
        host.run()
    assert len({host.germinated[0][2] for host in hosts}) > 1
