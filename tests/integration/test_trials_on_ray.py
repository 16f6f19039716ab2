"""A whole run on Ray that tries growth on forks of itself first."""

from __future__ import annotations

import sys
import time

import pytest
from ray import cloudpickle

from actors import launch
from esper.config import load_config
from esper.leyline import EvidenceKind, Outcome, RunStatus, SeedStage
from jobs.environment import REPOSITORY
from jobs.workload import ConfiguredWorkload

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file


class Pauses:
    """Gives forks four minutes to end, while growth may still begin: an epoch on digits takes a tenth of a second. Each
    pause is a little longer than the one before, so that forks that are quick cost little. No more is needed once a
    kernel is grafted.
    """

    def __init__(self):
        self.left, self.next_s = 36, 0.5

    def at(self, place, step):
        del step
        if place == "grafting":
            self.left = 0
        elif place == "control" and self.left:
            time.sleep(self.next_s)
            self.left, self.next_s = self.left - 1, 1.12 * self.next_s


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_run_begins_with_what_its_forks_have_shown(tmp_path, num_workers):
    config = load_config(
        REPOSITORY / "configs" / "digits.yaml",
        [
            f"storage={tmp_path}", f"tezzeret.key_file={tmp_path / 'key.pem'}", "nissa.view=quiet",
            "nissa.dashboard=false", "nissa.page.enabled=false", "tolaria.epochs=60",
            f"tolaria.num_workers={num_workers}", "tezzeret.blueprints=[residual_conv, conv_light]",
            "tezzeret.optimize=never",
            "tamiyo.plateau_threshold=1000.0", "tamiyo.max_adaptations=1", "tamiyo.trials.enabled=true",
            "tamiyo.trials.cpus=0.1", "tamiyo.trials.flops_share=50.0", "tamiyo.trials.z=0.0",
            "tamiyo.trials.late_epochs=50", "tamiyo.trials.candidates=2", "tamiyo.trials.steps=60",
        ],
    )  # fmt: skip
    summary = launch.run(ConfiguredWorkload(config), config, faults=Pauses()).summary
    assert summary.status is RunStatus.FINISHED
    (trial,) = summary.trials
    assert trial.failure == ""
    assert trial.told > trial.epoch, "the run went on meanwhile"
    assert len(trial.outcomes) == 2
    assert all(outcome.evidence.kind is EvidenceKind.FORK for outcome in trial.outcomes)
    assert summary.ledger.flops.trials == trial.flops > 0
    gains = {outcome.candidate.kernel_id: outcome.evidence.gain for outcome in trial.outcomes}
    begun = [event for event in summary.events if event.to_stage is SeedStage.GERMINATED]
    if max(gains.values()) > 0:
        assert [event.kernel_id for event in begun] == [max(gains, key=lambda kernel: gains[kernel])]
    else:
        assert not begun
    tried = [report for report in summary.field_reports if report.outcome is Outcome.TRIED]
    assert len(tried) == 2 - len(begun)
