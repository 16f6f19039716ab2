"""Whole runs under the bandit: what one run's adaptation came to is known to the next, and a crash leaves no trace."""

from __future__ import annotations

import pytest
from tolaria_support import KEY, SIGNATURE, SITE, Crash, CrashAt, config, equal, train

from esper.api import local_hub
from esper.leyline import Outcome, RunStatus
from esper.tamiyo import TamiyoState
from esper.tamiyo.controller import LocalController

BLUEPRINTS = ["mlp_2x", "mlp_adapter"]


def chosen():
    """A run that grows as soon as it may, whatever the host still learns."""
    base = config(tolaria__epochs=12, tamiyo__plateau_window=1, tamiyo__plateau_threshold=1000.0)
    tree = base.model_dump(mode="json")
    tree["tamiyo"] |= {"policy": "bandit", "schedule": [], "warmup_epochs": 0}
    tree["tezzeret"]["blueprints"] = BLUEPRINTS
    return type(base).model_validate(tree)


class Watched(LocalController):
    """A controller whose memory can be looked at."""

    memory = TamiyoState(seed=0)

    def decide(self, state, packet):
        after, signal = super().decide(state, packet)
        self.memory = TamiyoState.model_validate(after)
        return after, signal


def arms(controller):
    assert controller.memory.bandit is not None
    return controller.memory.bandit.arms


def test_what_one_run_learned_the_next_one_knows_and_a_crash_changes_nothing(tmp_path):
    hub, key = local_hub([SIGNATURE], chosen(), private_key=KEY)
    first = Watched(chosen().tamiyo, seed=0)
    summary, weights = train(tmp_path / "first", chosen(), hub=hub, public_key=key, controller=first)
    assert summary.status is RunStatus.FINISHED
    told = [report for report in summary.field_reports if report.value is not None]
    assert [report.outcome for report in told][:1] == [Outcome.FOSSILIZED]
    assert {report.site for report in told} == {SITE}
    briefs = {brief.blueprint: brief.record for brief in hub.kernel_briefs(SIGNATURE)}
    assert sum(record.num for record in briefs.values() if record) == len(told), "Urza counts them by design"
    tried = told[0].blueprint
    assert arms(first)[f"vector:{tried}"].num >= 1, "and so does the run's own memory"

    crash = CrashAt("step", 21)
    fresh, fresh_key = local_hub([SIGNATURE], chosen(), private_key=KEY)
    with pytest.raises(Crash):
        train(tmp_path / "again", chosen(), hub=fresh, public_key=fresh_key, faults=crash)
    resumed = Watched(chosen().tamiyo, seed=0)
    _, again = train(tmp_path / "again", chosen(), hub=fresh, public_key=fresh_key, controller=resumed, resume=True)
    assert equal(again, weights), "the memory came back with the checkpoint"
    assert arms(resumed) == arms(first)

    second = Watched(chosen().tamiyo, seed=1)
    train(tmp_path / "second", chosen(), hub=hub, public_key=key, controller=second, run_id="second")
    known = sum(record.num for record in arms(second).values())
    assert known > sum(record.num for record in arms(first).values()), "the second run began with what the first found"
