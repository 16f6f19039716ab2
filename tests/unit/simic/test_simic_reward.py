"""The reward, by scripts that try to be paid for nothing. Each exploit is played over ten runs of noise, beside the
honest policy and beside doing nothing, on shadow evidence alone and settled with the twin.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from paper_run import MEDIOCRE, NORM, STRONG, PaperRun, dither, farm, grow, nothing, peak

from esper.config import RewardConfig
from esper.leyline import Evidence, EvidenceKind, Outcome, TrialCandidate, TrialOutcome, TrialResult
from esper.leyline.trials import TrialState
from esper.simic.reward import Meter, harms, rewards, whole_gain

PRICES = RewardConfig()
HONEST = grow(STRONG, at=14)


def returns(script, *, prices=PRICES, twin=False, runs=10):
    """The sum of rewards, for each of some runs."""
    return [
        sum(rewards(PaperRun(seed=seed).play(script), prices, PaperRun.twin() if twin else None))
        for seed in range(runs)
    ]


def mean(values):
    return sum(values) / len(values)


EXPLOITS = {
    "germinates early to own the drift": grow(NORM, at=0, sites=3, train=1),
    "farms": farm(NORM),
    "farms what would be good": farm(STRONG),
    "dithers": dither(STRONG),
    "fossilises at the peak": peak(MEDIOCRE, at=12),
    "many mediocre seeds": grow(MEDIOCRE, at=12, sites=8),
}


@pytest.mark.parametrize("twin", [False, True], ids=["by shadow", "with the twin"])
@pytest.mark.parametrize("name", EXPLOITS)
def test_an_exploit_does_not_pay(name, twin):
    exploited, honest, idle = (returns(script, twin=twin) for script in (EXPLOITS[name], HONEST, nothing))
    assert idle == pytest.approx([0.0] * 10, abs=1e-9)  # waiting costs nothing
    assert min(honest) > 0.1
    assert mean(exploited) < 0.0
    assert max(exploited) < min(honest)


FREE = {"start_cost": 0.0, "flops_rent": 0.0, "params_rent": 0.0}
GUARDS = {
    "germinates early to own the drift": {},
    "many mediocre seeds": {**FREE, "z": 0.0},
    "fossilises at the peak": {"window": 1, "z": 0.0, "flops_rent": 0.0},
}


@pytest.mark.parametrize("name", GUARDS)
def test_without_its_guards_the_exploit_would_have_paid(name, monkeypatch):
    """Else the test above could not fail."""
    monkeypatch.setattr("esper.simic.reward._drift_free", lambda measured, loss_before: 1.0)
    assert mean(returns(EXPLOITS[name], prices=RewardConfig(**GUARDS[name]))) > 0.0


def with_trial(script, kernel, *, at, steps=3):
    """An episode whose kernel had won a trial after epoch `at`: its fork is ahead by its worth and by its haste."""
    episode = PaperRun().play(script)
    host = PaperRun.drift(at + steps)
    candidate = PaperRun.drift(at + steps + kernel.haste) * (1.0 - kernel.worth)
    evidence = Evidence(
        kind=EvidenceKind.FORK,
        gain=host - candidate,
        stderr=0.01 * host,
        baseline=host,
        candidate=candidate,
        num_pairs=360,
    )
    tried = TrialCandidate(site="site0", seed_id="site0.s", kernel_id="k", blueprint_id="b", blueprint=kernel.name)
    result = TrialResult(
        trial_id="t", epoch=at, told=at + steps, steps=30, outcomes=(TrialOutcome(candidate=tried, evidence=evidence),)
    )

    def told(reports):
        return tuple(one.model_copy(update={"trial": evidence}) for one in reports)

    def moment(one):
        more = {"ended": told(one.packet.ended)}
        if one.epoch == at + steps:
            more["trials"] = TrialState(result=result)
        return replace(one, packet=one.packet.model_copy(update=more))

    return replace(episode, moments=tuple(map(moment, episode.moments)), ended=told(episode.ended))


def test_of_a_fossil_that_had_won_a_trial_its_fork_speaks():
    free = RewardConfig(params_rent=0.0, flops_rent=0.0, start_cost=0.0, z=0.0)
    episode = with_trial(grow(STRONG, at=17), STRONG, at=14)
    (report,) = episode.ended
    assert report.worth == report.trial != report.evidence
    assert report.value == pytest.approx(STRONG.worth)
    low = replace(episode, ended=tuple(one.model_copy(update={"trial": None}) for one in episode.ended))
    paid, by_shadow = (Meter(free).end(None, one.ended) for one in (episode, low))
    assert paid == pytest.approx(STRONG.worth, abs=1e-6)
    assert paid != pytest.approx(by_shadow, abs=1e-6)


def test_what_a_fork_won_does_not_count_where_the_kernel_went_again():
    (report,) = with_trial(grow(STRONG, at=17), STRONG, at=14).ended
    culled = report.model_copy(update={"outcome": Outcome.CULLED, "evidence": None})
    assert (culled.worth, culled.value) == (None, None)
    assert Meter(PRICES).end(None, [culled]) < 0.0


@pytest.mark.parametrize("guarded", [True, False])
def test_an_early_trial_does_not_own_the_drift(guarded, monkeypatch):
    """A fork of a host that still learns is ahead of one that would have got there."""
    if not guarded:  # else the test could not fail
        monkeypatch.setattr("esper.simic.reward._drift_free", lambda measured, loss_before: 1.0)
    paid = sum(rewards(with_trial(grow(NORM, at=3, train=1), NORM, at=0), PRICES))
    assert (paid < 0.0) == guarded
    late = sum(rewards(with_trial(grow(STRONG, at=17), STRONG, at=14), PRICES))
    assert late > 0.1


def test_growing_on_a_host_that_still_learns_is_paid_for_what_the_host_could_not():
    early, late = (mean(returns(grow(STRONG, at=at))) for at in (10, 14))
    assert 0.0 < early < late


def test_how_much_the_host_leans_on_a_part_pays_nothing():
    """Evidence of harm is as large as 0.5 in these runs, in every blended stage."""
    run = PaperRun()
    episode = run.play(grow(NORM, at=12))
    leaning = Evidence(kind=EvidenceKind.HARM, gain=0.5, baseline=1.0, candidate=0.5, num_pairs=360)
    ended = tuple(report.model_copy(update={"evidence": leaning}) for report in episode.ended)
    meter = Meter(PRICES)
    assert meter.end(None, ended) <= 0.0
    assert meter.paid == 0.0


def test_what_was_not_measured_pays_nothing():
    episode = PaperRun().play(HONEST)
    (report,) = episode.ended
    meter = Meter(PRICES)
    assert meter.end(None, [report.model_copy(update={"evidence": None})]) < 0.0
    assert meter.paid == 0.0


def test_a_report_is_paid_once():
    episode = PaperRun().play(HONEST)
    meter = Meter(PRICES)
    for moment in episode.moments:  # each packet after the fossil carries its report again
        meter.see(moment.packet)
    paid = meter.paid
    assert paid > 0.1
    assert meter.end(episode.last, episode.ended) <= 0.0
    assert meter.paid == paid


def test_with_a_twin_the_sum_is_the_difference_to_it_minus_what_was_spent():
    """Whatever was paid on the way was an advance."""
    episode, twin = PaperRun().play(HONEST), PaperRun.twin()
    free = RewardConfig(params_rent=0.0, flops_rent=0.0, start_cost=0.0)
    assert sum(rewards(episode, free, twin)) == pytest.approx(whole_gain(episode, twin, free.window))
    assert whole_gain(episode, twin, 3) == pytest.approx(STRONG.worth, abs=1e-6)
    assert sum(rewards(episode, free)) != pytest.approx(whole_gain(episode, twin, free.window), abs=1e-4)


def test_a_dip_while_a_kernel_blends_in_is_not_punished():
    """The epoch of GRAFTING is worse by 5% in these runs: its reward is that of the FLOPs."""
    episode = PaperRun().play(HONEST)
    free = RewardConfig(params_rent=0.0, flops_rent=0.0, start_cost=0.0)
    found = rewards(episode, free)
    losses = [moment.packet.epoch.val_loss for moment in episode.moments]
    assert any(later > before for before, later in itertools.pairwise(losses))
    assert min(found) == 0.0


def test_what_is_live_when_the_run_ends_pays_rent_and_gets_nothing():
    episode = PaperRun(num_epochs=22).play(grow(STRONG, at=14))
    assert [report.outcome for report in episode.ended] == [Outcome.UNFINISHED]
    prices = RewardConfig(params_rent=0.1, flops_rent=0.0, start_cost=0.0)
    assert sum(rewards(episode, prices)) == pytest.approx(-0.1 * STRONG.params / 1000)


def test_rents_do_not_depend_on_how_many_decisions_an_episode_has():
    """An earlier system divided them by its length: 748 to 1 against attribution."""
    prices = RewardConfig(start_cost=0.0, params_rent=0.0, flops_rent=0.05)
    ratio = {}
    for num_epochs in (30, 60):
        episode = PaperRun(num_epochs=num_epochs).play(HONEST)
        meter = Meter(prices)
        total = sum(meter.see(moment.packet) for moment in episode.moments) + meter.end(episode.last, episode.ended)
        ratio[num_epochs] = (meter.paid - total) / meter.paid
    assert 0.01 < ratio[30] < 0.2
    assert ratio[60] == pytest.approx(ratio[30], rel=0.5)


def test_harms_count_each_rollback_once():
    episode = PaperRun().play(dither(STRONG))
    first = episode.ended[0].model_copy(update={"outcome": Outcome.ROLLED_BACK})

    def told(ended):
        return tuple(first if one.report_id == first.report_id else one for one in ended)

    moments = tuple(
        replace(moment, packet=moment.packet.model_copy(update={"ended": told(moment.packet.ended)}))
        for moment in episode.moments
    )
    assert sum(harms(replace(episode, moments=moments, ended=told(episode.ended)))) == 1.0
    assert sum(harms(episode)) == 0.0
