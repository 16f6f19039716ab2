"""What lies on disk: whole or absent, vouched for, and the same on a directory as on an object store."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline import AdaptationSignal, ConflictError, NotFoundError, StorageError, TamperedError
from esper.storage import Storage
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.commands import CommandLog, LoggedDecision
from esper.tolaria.numerics import numerics, rng_state, set_rng_state
from esper.tolaria.tree import clone, flatten, unflatten
from esper.tolaria.writing import BackgroundWriter


@pytest.fixture(params=["directory", "object store"])
def folder(request, tmp_path):
    if request.param == "directory":
        return Storage.at(tmp_path / "run")
    return Storage.at(f"s3://bucket/{tmp_path.name}/run", request.getfixturevalue("s3_options"))


STATE = {"weights": torch.arange(6.0).reshape(2, 3), "step": 3, "nested": [{"a": (1, None)}, True, 0.1]}

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.text() | st.integers()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@given(trees)
def test_a_tree_comes_back_through_json_as_it_was(tree):
    plain, tensors = flatten(tree)
    assert unflatten(json.loads(json.dumps(plain)), tensors) == tree


def test_tensors_and_counters_come_back_and_strangers_are_named():
    state = {3: {"milestones": Counter({4: 2}), "t": torch.tensor(2.5, dtype=torch.float64)}, "$tensor": 1}
    plain, tensors = flatten(state)
    back = unflatten(json.loads(json.dumps(plain)), tensors)
    assert back["$tensor"] == 1
    assert isinstance(back[3]["milestones"], Counter)
    assert back[3]["milestones"] == Counter({4: 2})
    assert torch.equal(back[3]["t"], state[3]["t"])
    assert back[3]["t"].dtype is torch.float64
    with pytest.raises(TypeError, match=r"state\.a\[1\] is a object"):
        flatten({"a": [1, object()]})


def test_a_clone_shares_nothing():
    original = {"a": [torch.zeros(2)], "b": (torch.ones(1),)}
    copied = clone(original)
    original["a"][0].fill_(7)
    assert torch.equal(copied["a"][0], torch.zeros(2))


def test_checkpoints_are_kept_and_the_best_besides(folder):
    checkpoints = Checkpoints(folder, keep=2)
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    for epoch in range(5):
        checkpoints.save(epoch, {**STATE, "epoch": epoch}, best=epoch == 1)
    assert checkpoints.epochs() == [1, 3, 4]
    latest, best = checkpoints.latest(), checkpoints.best()
    assert (latest.epoch, best.epoch, best.state["epoch"]) == (4, 1, 1)
    assert torch.equal(latest.state["weights"], STATE["weights"])
    assert latest.state["nested"] == STATE["nested"]
    assert checkpoints.last_name() == latest.name == "checkpoints/epoch-000004"


def test_what_is_written_in_the_background_is_what_was_given(folder):
    writer = BackgroundWriter(Checkpoints(folder, keep=2))
    weights = torch.zeros(1_000)
    for epoch in range(4):
        writer.save(epoch, {"weights": weights, "nested": {"epoch": epoch}}, best=epoch == 0)
        weights += 1.0  # as the next step does
    writer.close()
    checkpoints = Checkpoints(folder)
    assert checkpoints.epochs() == [0, 2, 3]
    for epoch in checkpoints.epochs():
        state = checkpoints.load(epoch).state
        assert torch.equal(state["weights"], torch.full((1_000,), float(epoch)))
        assert state["nested"] == {"epoch": epoch}


def test_a_checkpoint_that_could_not_be_written_is_told_at_the_next(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    writer = BackgroundWriter(Checkpoints(Storage.at(tmp_path)))
    writer.save(0, STATE)
    with pytest.raises(StorageError):
        writer.save(1, STATE)
    writer.close()  # it was told once


def test_an_epoch_written_again_replaces_the_first_writing(folder):
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, STATE)
    checkpoints.save(0, {**STATE, "step": 9})
    assert checkpoints.latest().state["step"] == 9
    assert len(folder.names("checkpoints/epoch-000000")) == 3


@pytest.mark.parametrize("part", ["state", "tensors", "manifest"])
@pytest.mark.parametrize("harm", ["altered", "cut", "gone"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, part, harm):
    folder = Storage.at(tmp_path)
    checkpoints = Checkpoints(folder, keep=3)
    checkpoints.save(0, STATE)
    checkpoints.save(1, STATE)
    (victim,) = [name for name in folder.names("checkpoints/epoch-000001") if name.startswith(part)]
    victim = f"checkpoints/epoch-000001/{victim}"
    content = bytearray(folder.read(victim))
    if harm == "altered":
        content[len(content) // 2] ^= 1
        folder.write(victim, bytes(content))
    elif harm == "cut":
        folder.write(victim, bytes(content[: len(content) // 2]))
    else:
        folder.remove(victim)
    if (part, harm) != ("manifest", "altered"):
        with pytest.raises((TamperedError, NotFoundError)):
            checkpoints.load(1)
    latest = checkpoints.latest()
    assert torch.equal(latest.state["weights"], STATE["weights"])
    assert latest.epoch == 0 or (part, harm) == ("manifest", "altered")


def decision(epoch: int) -> LoggedDecision:
    signal = AdaptationSignal(run_id="run", epoch=epoch, policy="none", reason="wait")
    return LoggedDecision(epoch, 10 * epoch, signal, {"seen": epoch})


def test_decisions_are_found_again(folder):
    log = CommandLog(folder)
    for epoch in range(3):
        log.append(decision(epoch))
    again = CommandLog(folder)
    assert [again.at(epoch) for epoch in range(4)] == [decision_of(log, epoch) for epoch in range(4)]
    assert again.at(1).state == {"seen": 1}
    with pytest.raises(ConflictError, match="logged already"):
        again.append(decision(2))
    assert CommandLog(folder, fresh=True).at(0) is None
    assert CommandLog(folder).at(0) is None


def decision_of(log: CommandLog, epoch: int) -> LoggedDecision | None:
    return log.at(epoch)


def test_a_torn_last_line_was_never_applied(tmp_path):
    folder = Storage.at(tmp_path)
    log = CommandLog(folder)
    log.append(decision(0))
    log.append(decision(1))
    path = tmp_path / "commands.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    torn = CommandLog(folder)
    assert torn.at(0) is not None
    assert torn.at(1) is None
    torn.append(decision(1))
    assert CommandLog(folder).at(1) is not None


def test_a_line_that_is_no_decision_is_not_passed_over(tmp_path):
    (tmp_path / "commands.jsonl").write_text('{"epoch": 0}\n')
    with pytest.raises(TamperedError):
        CommandLog(Storage.at(tmp_path))


def test_generators_go_on_from_a_state():
    plain, tensors = flatten(rng_state())

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(0, 1)  # noqa: NPY002

    first = draw()
    set_rng_state(unflatten(json.loads(json.dumps(plain)), tensors))
    assert draw() == first


def test_numerics_are_pinned_within_and_as_before_without():
    threads, algorithms = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    drawn = []
    for _ in range(2):
        with numerics(seed=5, deterministic=True, num_threads=1):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == 1
            drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[1]
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, algorithms)
