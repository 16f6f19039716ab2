"""Tasks, batches and evidence: who sees which sample, and what a paired figure is."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from esper.leyline import ConfigError, DataError, EvidenceKind, NonFiniteError
from esper.tolaria.evidence import compare, evaluate
from esper.tolaria.numerics import numerics, rng_state
from esper.tolaria.ranks import SoloRanks
from esper.tolaria.task import TASKS, Task, resolve_task
from esper.tolaria.workload import batch_len, evaluation_batches, example_of, model_args, parts_of, training_batches

X, Y = torch.arange(10.0).reshape(10, 1), torch.arange(10)
CPU = torch.device("cpu")


class Squares(Dataset):
    def __init__(self):
        self.epochs = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return (torch.tensor([float(index)]), torch.tensor(index)), index * index

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def seen(batches, epoch, *, rank=0, world=1):
    return [targets.tolist() for _, targets in batches.epoch(epoch, rank=rank, world=world)]


def test_the_order_is_a_function_of_seed_and_epoch():
    batches = training_batches((X, Y), batch_size=4, seed=3)
    assert batches.num_batches(world=1) == 2
    assert seen(batches, 0) == seen(training_batches(TensorDataset(X, Y), batch_size=4, seed=3), 0)
    assert seen(batches, 0) != seen(batches, 1)
    assert seen(batches, 0) != seen(training_batches((X, Y), batch_size=4, seed=4), 0)
    everything = {sample for epoch in range(20) for batch in seen(batches, epoch) for sample in batch}
    assert everything == set(range(10))


def test_ranks_share_each_step_and_nothing_twice():
    batches = training_batches((X, Y), batch_size=4, seed=3)
    alone = seen(batches, 5)
    first, second = (seen(batches, 5, rank=rank, world=2) for rank in range(2))
    assert [a + b for a, b in zip(first, second, strict=True)] == alone
    with pytest.raises(DataError, match="do not divide by 3"):
        batches.num_batches(world=3)


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_evaluation_sees_every_sample_once(world):
    batches = evaluation_batches((X, Y), batch_size=3)
    samples = [s for rank in range(world) for batch in seen(batches, 0, rank=rank, world=world) for s in batch]
    assert sorted(samples) == list(range(10))


def test_a_small_set_is_one_batch():
    assert training_batches((X, Y), batch_size=64, seed=0).num_batches(world=1) == 1


def test_a_dataset_with_several_inputs_is_told_its_epoch():
    dataset = Squares()
    batches = training_batches(dataset, batch_size=5, seed=0)
    (inputs, targets), _ = batches.epoch(2, rank=0, world=1)
    assert dataset.epochs == [2]
    x, index = model_args(inputs)
    assert x.shape == (5, 1)
    assert targets.tolist() == [i * i for i in index.tolist()]


def test_a_factory_answers_for_its_own_order():
    asked = []

    def factory(rank, world, epoch):
        asked.append((rank, world, epoch))
        return DataLoader(TensorDataset(X, Y), batch_size=5)

    batches = training_batches(factory, batch_size=64, seed=0)
    assert batches.num_batches(world=2) == 2
    assert seen(batches, 3, rank=1, world=2) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert asked[-1] == (1, 2, 3)
    with pytest.raises(DataError, match="has no length"):
        training_batches(lambda *_: iter([]), batch_size=1, seed=0).num_batches(world=1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (DataLoader(TensorDataset(X, Y)), "give its dataset"),
        ((X, Y[:3]), "10 inputs but 3 targets"),
        ((X[:0], Y[:0]), "no samples"),
        (7, "cannot read data of type int"),
    ],
)
def test_data_of_no_known_kind_name_the_remedy(data, words):
    with pytest.raises(DataError, match=words):
        training_batches(data, batch_size=2, seed=0, field="train_data")


def test_a_model_of_one_dict_has_as_many_samples_as_its_entries():
    batch = ({"x": torch.arange(12).view(6, 2), "y": torch.arange(6)}, torch.arange(6))
    assert batch_len(batch) == 6
    parts = parts_of(batch, 2)
    assert [batch_len(part) for part in parts] == [3, 3]
    assert torch.cat([part[0]["x"] for part in parts]).equal(batch[0]["x"])
    (inputs,) = example_of(lambda rank, world, epoch: [batch])
    assert {key: len(entry) for key, entry in inputs.items()} == {"x": 2, "y": 2}


def test_an_example_is_a_few_samples():
    (x,) = example_of((X, Y))
    assert x.shape == (2, 1)
    assert [tuple(arg.shape) for arg in example_of(Squares())] == [(2, 1), (2,)]


@pytest.mark.parametrize(
    ("name", "outputs", "targets"),
    [
        ("classification", torch.randn(6, 4), torch.randint(4, (6,))),
        ("regression", torch.randn(6, 1), torch.randn(6)),
        ("regression", torch.randn(6, 2, 3), torch.randn(6, 2, 3)),
        ("language_model", torch.randn(6, 5, 9), torch.randint(9, (6, 5))),
    ],
)
def test_losses_by_sample_have_the_mean_that_the_loss_has(name, outputs, targets):
    task = TASKS[name]
    per_sample = task.per_sample_loss(outputs, targets)
    assert per_sample.shape == (6,)
    assert torch.allclose(per_sample.mean(), task.loss_fn(outputs, targets))
    assert task.headline in task.metrics


def test_regression_targets_without_the_last_dimension_do_not_broadcast():
    assert TASKS["regression"].loss_fn(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])) == 0


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(ConfigError, match="classification, regression, language_model"):
        resolve_task("classify")


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))
        self.norm = nn.BatchNorm1d(1, affine=False)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x + self.by) + 0 * self.norm(x)


def test_validation_means_over_samples_and_disturbs_nothing():
    module = Shift(1.0)
    module.norm.eval()
    buffers = {name: tensor.clone() for name, tensor in module.named_buffers()}
    rng = torch.get_rng_state()
    task = TASKS["regression"]
    found = evaluate(
        module, evaluation_batches((X, X.clone()), batch_size=4).epoch(0, rank=0, world=1), task,
        ranks=SoloRanks(), device=CPU,
    )  # fmt: skip
    assert found.loss == pytest.approx(1.0)
    assert found.metrics == {"mse": pytest.approx(1.0)}
    assert (found.num_samples, found.losses.shape) == (10, (10,))
    assert module.training
    assert not module.norm.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in module.named_buffers())


class Wobble(nn.Module):
    """Draws from every generator there is."""

    def forward(self, x):
        return x + torch.rand(()) + random.random() + float(np.random.random())  # noqa: NPY002 - what hosts do


def test_validation_draws_apart_from_the_run():
    with numerics(seed=3, deterministic=False, num_threads=torch.get_num_threads()):
        before = rng_state()
        first = run(Wobble(), (X, X.clone()), TASKS["regression"])
        again = run(Wobble(), (X, X.clone()), TASKS["regression"])
        after = rng_state()
    assert first.loss == again.loss  # so seeds are compared with the host under equal draws
    assert before.pop("python") == after.pop("python")
    assert torch.equal(before["numpy"].pop("keys"), after["numpy"].pop("keys"))
    assert torch.equal(before.pop("torch"), after.pop("torch"))
    assert before["numpy"] == after["numpy"]


def run(module, data, task):
    batches = evaluation_batches(data, batch_size=4).epoch(0, rank=0, world=1)
    return evaluate(module, batches, task, ranks=SoloRanks(), device=CPU)


def test_evidence_is_the_mean_gain_and_its_standard_error():
    targets = torch.cat([torch.zeros(5, 1), torch.ones(5, 1)])
    data = (torch.zeros(10, 1), targets)
    baseline, candidate = run(Shift(0.0), data, TASKS["regression"]), run(Shift(0.75), data, TASKS["regression"])
    evidence = compare(baseline, candidate, ranks=SoloRanks(), device=CPU)
    gains = torch.cat([torch.full((5,), -(0.75**2)), torch.full((5,), 1 - 0.25**2)]).double()
    assert evidence.kind is EvidenceKind.SHADOW
    assert evidence.gain == pytest.approx(gains.mean().item())
    assert evidence.stderr == pytest.approx(gains.std().item() / math.sqrt(10))
    assert evidence.num_pairs == 10


def test_without_a_loss_by_sample_batches_are_paired():
    task = Task(TASKS["regression"].loss_fn)
    data = (X, X.clone())
    evidence = compare(run(Shift(1.0), data, task), run(Shift(0.0), data, task), ranks=SoloRanks(), device=CPU)
    assert (evidence.num_pairs, evidence.gain, evidence.stderr) == (3, 1.0, 0.0)


def test_a_loss_that_is_not_finite_is_no_figure():
    with pytest.raises(NonFiniteError):
        run(Shift(math.nan), (X, X.clone()), TASKS["regression"])
