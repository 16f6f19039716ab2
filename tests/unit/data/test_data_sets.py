import pytest
import torch

from esper.config import DigitsData, GivenData, SyntheticData, TextData
from esper.data import load_data
from esper.data.split import standardise, stratified
from esper.leyline import ConfigError


def digits(**settings):
    return load_data(DigitsData(**settings), task="classification", seed=0)


def test_digits_are_all_there_once_in_disjoint_parts():
    data = digits()
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [1079, 359, 359]
    rows = torch.cat([part[0].flatten(1) for part in (data.train, data.val, data.test)])
    # the set itself holds no two equal images
    assert len(rows.unique(dim=0)) == 1797
    assert (data.input_shape, data.num_outputs) == ((1, 8, 8), 10)
    assert (data.train[0].dtype, data.train[1].dtype) == (torch.float32, torch.int64)


def test_digits_are_standardised_by_the_training_part():
    data = digits()
    assert abs(data.train[0].mean().item()) < 1e-5
    assert abs(data.train[0].std().item() - 1) < 1e-5
    assert data.val[0].mean().item() != pytest.approx(0.0, abs=1e-7)


def test_digits_have_every_class_in_its_share():
    data = digits()
    for part in (data.train, data.val, data.test):
        shares = part[1].bincount(minlength=10) / len(part[1])
        assert torch.all((shares - 0.1).abs() < 0.01)


def test_digits_split_does_not_move_with_the_seed():
    first = load_data(DigitsData(), task="classification", seed=0)
    second = load_data(DigitsData(), task="classification", seed=1)
    for a, b in ((first.train, second.train), (first.val, second.val), (first.test, second.test)):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_flat_digits_are_the_same_images():
    flat, image = digits(layout="flat"), digits()
    assert flat.input_shape == (64,)
    assert torch.equal(flat.train[0], image.train[0].flatten(1))


def test_no_test_part_where_none_is_kept_back():
    data = digits(test_fraction=0)
    assert data.test is None
    assert len(data.train[1]) + len(data.val[1]) == 1797


@pytest.mark.parametrize(
    ("config", "task"),
    [(DigitsData(), "regression"), (DigitsData(), "language_model"), (TextData(path="x"), "classification")],
)
def test_a_task_that_does_not_go_with_the_data_is_refused(config, task):
    with pytest.raises(ConfigError, match=f"task: data of type {config.type} are for .*, not {task}"):
        load_data(config, task=task, seed=0)


def test_data_handed_over_in_python_cannot_be_loaded():
    with pytest.raises(ConfigError, match=r"data.type: .*handed over in Python"):
        load_data(GivenData(), task="classification", seed=0)


def test_stratified_takes_the_share_of_each_class_and_loses_none():
    labels = torch.tensor([0] * 10 + [1] * 40 + [2] * 2)
    rest, held = stratified(labels, 0.2)
    assert sorted(torch.cat([rest, held]).tolist()) == list(range(52))
    assert labels[held].bincount().tolist() == [2, 8, 1]


def test_stratified_leaves_a_lone_sample_where_it_is():
    rest, held = stratified(torch.tensor([0, 1, 1]), 0.1)
    assert 0 in rest.tolist()
    assert len(held) == 1


def test_stratified_by_salt_draws_otherwise():
    labels = torch.zeros(100, dtype=torch.int64)
    assert not torch.equal(stratified(labels, 0.5)[1], stratified(labels, 0.5, salt=1)[1])
    assert torch.equal(stratified(labels, 0.5)[1], stratified(labels, 0.5)[1])


def test_a_constant_feature_stays_finite():
    (values,) = standardise(torch.ones(4, 1, 2, 2), dims=(0, 2, 3))
    assert torch.equal(values, torch.zeros(4, 1, 2, 2))


def synthetic(**settings):
    return load_data(SyntheticData(**settings), task="classification", seed=0)


def test_synthetic_parts_hold_as_many_of_each_class_and_are_standardised():
    data = synthetic(samples=200, classes=5, channels=2, size=6)
    assert [len(part[1]) for part in (data.train, data.val, data.test)] == [120, 40, 40]
    assert (data.input_shape, data.num_outputs) == ((2, 6, 6), 5)
    assert all(part[1].bincount().unique().numel() == 1 for part in (data.train, data.val, data.test))
    assert (data.train[0].dtype, data.train[1].dtype) == (torch.float32, torch.int64)
    assert abs(data.train[0].mean().item()) < 1e-5
    assert abs(data.train[0].std().item() - 1) < 1e-5


def test_a_synthetic_problem_is_its_seed():
    first, again, other = (synthetic(samples=100, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train[0], again.train[0])
    assert not torch.equal(first.train[0], other.train[0])
    flat = synthetic(samples=100, seed=3, layout="flat")
    assert torch.equal(flat.train[0], first.train[0].flatten(1))


def test_without_noise_synthetic_samples_are_templates_moved_about():
    still = synthetic(samples=400, classes=2, clusters=3, shift=0, noise=0.0)
    assert len(still.train[0].flatten(1).unique(dim=0)) == 2 * 3
    moved = synthetic(samples=4000, classes=2, clusters=1, shift=1, noise=0.0)
    rows = moved.train[0].flatten(1)
    assert len(rows.unique(dim=0)) == 2 * 9
    assert torch.equal(rows.sort(dim=1).values.unique(dim=0), rows.sort(dim=1).values.unique(dim=0)[:2])


def test_synthetic_classes_can_be_told_apart_by_their_templates():
    data = synthetic(samples=1000, classes=4, clusters=1, shift=0, noise=0.3)
    centres = torch.stack([data.train[0][data.train[1] == label].mean(dim=0) for label in range(4)]).flatten(1)
    nearest = torch.cdist(data.val[0].flatten(1), centres).argmin(dim=1)
    assert (nearest == data.val[1]).float().mean() > 0.95
