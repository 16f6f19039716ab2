"""The README's upgrade by its shipped files, in this process: a small host is trained, its weights are saved, and
`configs/upgrade.yaml` goes on from them."""

import safetensors.torch

from esper.config import load_config
from esper.data import load_data
from esper.leyline import SeedStage
from esper.tolaria.weights import Trained
from jobs.bench.arms import small
from jobs.environment import REPOSITORY


def test_an_upgrade_loses_nothing_at_the_start_and_grows_to_more(tmp_path):
    weights = tmp_path / "small.safetensors"
    same = ["deterministic=true", "tolaria.epochs=6"]
    config = load_config(REPOSITORY / "configs" / "digits.yaml", same)
    data = load_data(config.data, task=config.task, seed=config.seed)
    begun = small(config, data, policy="none", say=lambda line: None)
    safetensors.torch.save_file(begun.weights, weights)

    chosen = [
        *same,
        "tolaria.epochs=14",
        "tamiyo.plateau_window=1",
        "tamiyo.plateau_threshold=1",
        "tamiyo.warmup_epochs=0",
    ]
    upgrade = load_config(REPOSITORY / "configs" / "upgrade.yaml", [*chosen, f"host.weights={weights}"])
    grown = small(
        upgrade, data, policy=upgrade.tamiyo.policy, say=lambda line: None, trained=Trained.of(upgrade.host)
    ).summary

    assert grown.start is not None
    assert grown.start.val_loss == begun.epochs[-1].val_loss  # to the last bit
    assert grown.start.val_metric == begun.epochs[-1].val_metric
    assert any(event.to_stage is SeedStage.GRAFTING and not event.refused for event in grown.events)
    assert grown.params.start == begun.summary.params.final < grown.params.final
    assert grown.metrics.val_accuracy is not None
    assert grown.start.val_metric is not None
    assert grown.metrics.val_accuracy > grown.start.val_metric
