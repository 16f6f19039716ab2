"""A run that starts from what another left: the grown network is its host, worth what it was worth."""

from __future__ import annotations

import pytest
import torch

from esper.api import checkpoint_host, local_hub, train_local
from esper.config import RunHost, dump_config, parse_config
from esper.kasmina import export
from esper.leyline import ConfigError, RunHistory, SiteKind, SiteSignature
from esper.leyline.summary import CONFIG_FILE
from esper.storage import Storage
from esper.tamiyo.controller import LocalController
from esper.tolaria.checkpoint import Checkpoints
from jobs.train import _pin_run, host_of
from jobs.workload import ConfiguredWorkload

BLUEPRINT, SITE = "mlp_2x", "blocks.0.1"


def settings(**host: object) -> dict[str, object]:
    return {
        "deterministic": True,  # it waits for its kernel; a fast machine would be done before
        "data": {"type": "digits", "layout": "flat"}, "host": host or {"type": "mlp", "hidden": [6, 6]},
        "budget": {"params": 20.0, "flops": 20.0},
        "tolaria": {"epochs": 4, "batch_size": 256, "optimizer": {"lr": 0.02}},
        "kasmina": {"harm_tolerance": 9.0},
        "tezzeret": {"blueprints": [BLUEPRINT]},
        "tamiyo": {
            "policy": "schedule",
            "schedule": [{"epoch": 0, "site": SITE, "blueprint": BLUEPRINT, "strategy": "direct"}],
        },
    }  # fmt: skip


def train(folder, config):
    """Trains in the run's folder as the command does, without Ray; returns the summary."""
    Storage.at(folder).write(CONFIG_FILE, dump_config(config).encode())
    hub, key = local_hub([SiteSignature(kind=SiteKind.VECTOR, channels=6)], config)
    return train_local(
        ConfiguredWorkload(config)(), config, directory=str(folder), run_id=folder.name, hub=hub, bus=None,
        controller=LocalController(config.tamiyo, seed=config.seed), public_key=key,
    )  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run that grew one kernel, in a storage of its own."""
    storage = tmp_path_factory.mktemp("storage")
    summary = train(storage / "runs" / "first", parse_config(settings()))
    assert summary.params.final > summary.params.start
    return storage


def test_it_begins_where_the_other_ended_and_may_grow_on(first):
    folder = first / "runs" / "first"
    before = parse_config(settings())
    left = export(checkpoint_host(ConfiguredWorkload(before)(), before, directory=str(folder)))
    config = _pin_run(parse_config(settings(type="run", run=str(folder))))
    assert isinstance(config.host, RunHost)
    assert config.host.epoch == 3  # noted: that run may go on meanwhile
    workload = ConfiguredWorkload(config)()
    state = workload.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in left.state_dict().items())
    summary = train(first / "runs" / "second", config)
    history = RunHistory.model_validate_json((folder / "history.json").read_bytes())
    assert summary.start is not None
    assert summary.start.weights == str(folder)
    assert summary.start.val_loss == pytest.approx(history.epochs[-1].val_loss, rel=1e-5)
    assert summary.params.start == sum(p.numel() for p in left.parameters())
    assert summary.params.final > summary.params.start
    third = _pin_run(parse_config(settings(type="run", run=str(first / "runs" / "second"))))
    grown = sum(p.numel() for p in ConfiguredWorkload(third)().model.parameters())
    assert grown == summary.params.final


def test_the_command_finds_it_by_its_name(first, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(dump_config(parse_config({**settings(), "storage": str(first)})))
    override = host_of("fir", path, [])
    assert override.startswith('host={"type": "run", "run": ')
    host = parse_config({**settings(), "storage": str(first)}, [override]).host
    assert isinstance(host, RunHost)
    assert host.run == str(first / "runs" / "first")


@pytest.mark.parametrize(
    ("harm", "words"),
    [("gone", "no folder of a run"), ("empty", "holds no checkpoint"), ("given", "handed over in Python")],
)
def test_what_cannot_be_built_upon_is_refused_by_name(first, tmp_path, harm, words):
    folder = tmp_path / "run"
    if harm != "gone":
        config = parse_config({**settings(), **({"host": {"type": "given"}} if harm == "given" else {})})
        Storage.at(folder).write(CONFIG_FILE, dump_config(config).encode())
    host = {"type": "run", "run": str(folder), **({} if harm == "empty" else {"epoch": 0})}
    with pytest.raises(ConfigError, match=words):
        ConfiguredWorkload(_pin_run(parse_config(settings(**host))))()


def test_a_checkpoint_that_is_not_there_any_more_is_named(first):
    folder = first / "runs" / "first"
    assert 77 not in Checkpoints(Storage.at(folder)).epochs()
    config = parse_config(settings(type="run", run=str(folder), epoch=77))
    with pytest.raises(ConfigError, match=r"host\.epoch|cannot be used") as refused:
        ConfiguredWorkload(config)()
    assert refused.value.field == "host.epoch"
