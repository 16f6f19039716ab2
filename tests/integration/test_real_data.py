"""The configurations whose data do not ship: each really runs on its data, where they are there, and grows. No Ray.

The data lie below `ESPER_DATA`, or in `shared/data` beside the checkout.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from esper import api
from esper.config import load_config
from esper.leyline import RunHistory, RunStatus, SeedStage
from esper.tamiyo.controller import LocalController
from jobs.environment import data_root
from jobs.workload import ConfiguredWorkload

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL_IMAGES = ("data.train_limit=600", "data.test_limit=100")


@pytest.mark.parametrize(
    ("name", "data", "site", "blueprint", "limits"),
    [
        ("fashion_mnist", "fashion_mnist", "stages.0.0", "conv_light", SMALL_IMAGES),
        ("cifar10", "cifar10", "stages.0.0", "conv_light", SMALL_IMAGES),
        ("shakespeare", "tinyshakespeare", "blocks.0", "mlp_adapter", ("data.train_samples=96", "data.val_samples=32")),
    ],
    ids=["fashion_mnist", "cifar10", "shakespeare"],
)
def test_it_trains_and_grows_on_its_data(name, data, site, blueprint, limits, tmp_path):
    root = data_root()
    if root is None or not (Path(root) / data).is_dir():
        pytest.skip(f"no data set {data} below ESPER_DATA or ../shared/data")
    schedule = f"tamiyo.schedule=[{{epoch: 0, site: {site}, blueprint: {blueprint}}}]"
    growth = ("deterministic=true", "tamiyo.policy=schedule", schedule, f"tezzeret.blueprints=[{blueprint}]")
    config = load_config(CONFIGS / f"{name}.yaml", (*limits, *growth, f"storage={tmp_path}", "tolaria.epochs=3"))
    factory = ConfiguredWorkload(config, root)
    workload = factory()
    api.check_workload(workload, config)
    grown = api.wrap(factory().model, example=workload.example, sites="auto", causal=config.task == "language_model")
    hub, key = api.local_hub(grown.sites.values(), config)
    summary = api.train_local(
        workload,
        config,
        directory=str(tmp_path / "run"),
        run_id="real",
        hub=hub,
        bus=None,
        controller=LocalController(config.tamiyo, seed=0),
        public_key=key,
    )
    assert summary.status is RunStatus.FINISHED
    assert 0 < summary.metrics.test_accuracy < 1
    history = RunHistory.model_validate_json((tmp_path / "run" / "history.json").read_text())
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    trained = [event for event in summary.events if event.to_stage is SeedStage.TRAINING]
    assert [(event.site, event.blueprint) for event in trained] == [(site, blueprint)]
    assert summary.ledger.flops.shadow > 0
