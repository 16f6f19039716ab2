"""Whole runs under each strategy: the seed gets there, and a crash in the middle of blending leaves no trace."""

from __future__ import annotations

import pytest
from tolaria_support import BLUEPRINT, SITE, Crash, CrashAt, config, equal, train

from esper.leyline import SeedStage


def growing(strategy: str):
    schedule = f"[{{epoch: 0, site: '{SITE}', blueprint: {BLUEPRINT}, strategy: {strategy}}}]"
    return config(tamiyo__schedule=schedule, kasmina__ramp_epochs=2.0, kasmina__drift_limit=0.05)


@pytest.mark.parametrize("strategy", ["grad_norm_gated", "drift_controlled", "performance_linked"])
def test_a_crash_while_a_strategy_blends_leaves_no_trace(tmp_path, strategy):
    chosen = growing(strategy)
    expected, weights = train(tmp_path / "undisturbed", chosen)
    stages = {event.to_stage: event.epoch for event in expected.events}
    blending = stages[SeedStage.GRAFTING] + 1
    assert stages.get(SeedStage.STABILIZING, 99) > blending
    crash = CrashAt("step", 3 * (blending + 1) + 1)
    with pytest.raises(Crash):
        train(tmp_path / "disturbed", chosen, faults=crash)
    assert crash.fired
    summary, resumed = train(tmp_path / "disturbed", chosen, resume=True)
    assert equal(weights, resumed)
    assert [(e.step, e.to_stage) for e in summary.events] == [(e.step, e.to_stage) for e in expected.events]
