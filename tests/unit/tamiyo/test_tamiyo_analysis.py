"""What Tamiyo makes of a run: trends of health, which figures told gains beforehand, and the alerts that stand."""

from __future__ import annotations

import pytest
from tamiyo_story import SIGNATURE, layer, packet

from esper.config import TamiyoConfig
from esper.leyline import Evidence, EvidenceKind, FieldReport, HealthSignal, Outcome
from esper.leyline.flags import AlertFlag, AlertKind, Severity
from esper.tamiyo import initial_state, step
from esper.tamiyo.analysis import analyse
from esper.tamiyo.memory import observe, read_state

CONFIG = TamiyoConfig(policy="none")


def report(number, gain, *, potential=None, variance=None, outcome=Outcome.FOSSILIZED):
    seen = HealthSignal(layer_id="a", seed_id="s", epoch=0, grow_potential=potential, activation_variance=variance)
    evidence = Evidence(kind=EvidenceKind.SHADOW, gain=gain, baseline=1.0, candidate=1.0 - gain, num_pairs=9)
    return FieldReport(
        report_id=f"r{number}", trace_id=f"t{number}", run_id="run", site="a", seed_id="s", signature=SIGNATURE,
        blueprint_id="b", blueprint="b", kernel_id="k", outcome=outcome, evidence=evidence, seen=seen,
    )  # fmt: skip


GAINS = (0.1, 0.2, 0.25, 0.3, 0.4, 0.45, 0.5, 0.6)


def analysed(reports, *, earlier=(), **rest):
    state, _ = step(initial_state(CONFIG, 0), packet(0, layer("a", 0, potential=1.0)), CONFIG)
    now = packet(1, layer("a", 1, potential=3.0), ended=tuple(reports), **rest)
    return analyse(observe(read_state(state), now, CONFIG), now, earlier=earlier)


def test_what_was_seen_goes_with_what_came_of_it():
    reports = [report(i, gain, potential=10 * gain, variance=float(i % 2)) for i, gain in enumerate(GAINS)]
    found = {one.figure: one for one in analysed(reports).foresights}
    assert (found["grow_potential"].num, found["grow_potential"].rho) == (8, pytest.approx(1.0))
    assert abs(found["activation_variance"].rho) < 0.3
    assert (found["gradient_norm"].num, found["gradient_norm"].rho) == (0, None)
    assert analysed(reports).best.figure == "grow_potential"
    backwards = [report(i, gain, potential=-gain) for i, gain in enumerate(GAINS)]
    assert analysed(backwards).best.rho == pytest.approx(-1.0)


def test_few_are_no_correlation_and_earlier_runs_make_it_one():
    reports = [report(i, gain, potential=gain) for i, gain in enumerate(GAINS)]
    alone = analysed(reports[:4])
    assert alone.best is None
    assert {one.rho for one in alone.foresights} == {None}
    found = analysed(reports[:4], earlier=reports).foresights[0]
    assert (found.figure, found.num) == ("grow_potential", 8), "what is among the run's own counts once"


def test_what_was_never_measured_or_decided_says_nothing():
    reports = [report(i, gain, potential=gain, outcome=Outcome.CANCELLED) for i, gain in enumerate(GAINS)]
    assert {one.num for one in analysed(reports).foresights} == {0}


def test_trends_and_alerts_are_by_site():
    flags = [
        AlertFlag(alert_id=str(i), kind=kind, severity=Severity.WARNING, site=site, epoch=0, summary="s", evidence="e")
        for i, (kind, site) in enumerate([(AlertKind.DEAD_CHANNELS, "a"), (AlertKind.SLOW_STEPS, None)])
    ]
    found = analysed([], alerts=tuple(flags))
    assert found.alerts == {"a": (flags[0],), "": (flags[1],)}
    assert found.trends["a"]["potential_trend"] > 0.0
    assert found.trends["a"]["gradient_trend"] == 0.0
