"""What a checkpoint of a run holds, in which files, and that a run goes on from the one before a tampered one."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from tolaria_support import Crash, CrashAt, config, equal, train

from esper.leyline import RunHistory, SeedStage, TamperedError
from esper.storage import Storage
from esper.tolaria.checkpoint import Checkpoints

CRASH_EPOCH = 3  # at its checkpoint; the kernel trains behind the host by then


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """A run that died right after it had written a checkpoint."""
    folder = tmp_path_factory.mktemp("torn")
    fault = CrashAt("checkpoint", CRASH_EPOCH)
    with pytest.raises(Crash):
        train(folder, config(), faults=fault)
    assert fault.fired
    return folder


def test_it_holds_all_that_a_run_goes_on_with(torn):
    found = Checkpoints(Storage.at(torn)).latest()
    assert found is not None
    state = found.state["session"]
    assert all(isinstance(tensor, torch.Tensor) for tensor in state["module"].values())  # weights and buffers
    assert {"0.weight", "1.running_mean", "1.num_batches_tracked"} <= state["module"].keys()
    assert any(name.startswith("_esper.") for name in state["module"])  # the kernel's, too
    growth = json.dumps(state["growth"], default=str)
    assert "mlp_2x" in growth  # topology
    assert '"gain"' in growth  # evidence
    assert '"exp_avg"' in growth or "exp_avg" in json.dumps(state["optimization"], default=str)
    assert state["optimization"]["optimizer"]["state"]
    assert state["optimization"]["scheduler"]["last_epoch"] == state["step"] == 3 * (found.epoch + 1)
    [own] = state["rng"]  # of each rank
    assert own.keys() == {"torch", "cuda", "numpy", "python"}
    # the order of samples follows from seed and epoch, so these are the sampler's position
    assert (state["epoch"], state["steps_per_epoch"]) == (found.epoch, 3)
    assert state["tamiyo"]
    assert state["ledger"]
    assert state["governor"]["vitals"]["losses"]


def test_it_consists_of_json_and_safetensors_that_a_manifest_vouches_for(torn):
    for folder in (torn / "checkpoints").glob("epoch-*"):
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = {entry["name"]: entry["sha256"] for entry in manifest["files"].values()}
        assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}
        assert {name.rpartition(".")[2] for name in files} == {"json", "safetensors"}
        for name, digest in files.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("part", ["tensors", "state", "manifest"])
def test_a_run_goes_on_from_the_one_before_a_tampered_one(tmp_path, part):
    _, undisturbed = train(tmp_path / "whole", config())
    fault = CrashAt("checkpoint", CRASH_EPOCH)
    with pytest.raises(Crash):
        train(tmp_path / "torn", config(), faults=fault)
    newest = max((tmp_path / "torn" / "checkpoints").glob("epoch-*"))
    [path] = newest.glob(f"{part}*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = Checkpoints(Storage.at(tmp_path / "torn")).latest()
    assert before is not None
    assert f"epoch-{before.epoch:06d}" < newest.name
    assert [f"epoch-{epoch:06d}" for epoch in before.refused] == [newest.name]
    summary, weights = train(tmp_path / "torn", config(), resume=True)
    assert equal(weights, undisturbed)
    assert summary.events[-1].to_stage is SeedStage.FOSSILIZED
    [words] = summary.went_without
    assert words.startswith(f"the checkpoint of epoch {max(before.refused) + 1}: ")
    assert (summary.urza.opened, summary.urza.refused) == (0, 0)  # a hub that answers is never given up
    history = RunHistory.model_validate_json((tmp_path / "torn" / "history.json").read_bytes())
    assert [row.epoch for row in history.epochs] == list(range(8))


def test_a_run_of_which_no_checkpoint_is_whole_is_not_begun_again_in_silence(torn, tmp_path):
    shutil.copytree(torn, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("epoch-*/tensors*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(TamperedError, match=r"no checkpoint in .* is whole"):
        train(tmp_path / "run", config(), resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_torn_note_of_the_best_one_does_not_end_the_run(tmp_path):
    checkpoints = Checkpoints(Storage.at(tmp_path), keep=1)
    checkpoints.save(0, {"x": 1}, best=True)
    (tmp_path / "checkpoints" / "best.json").write_bytes(b'{"epo')
    checkpoints.save(1, {"x": 2})
    assert checkpoints.epochs() == [0, 1]  # which was the best is not known, so none is removed
    checkpoints.save(2, {"x": 3}, best=True)
    assert checkpoints.epochs() == [2]
