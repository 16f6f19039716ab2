import pytest
import torch

from esper.config import TextData
from esper.data import load_data
from esper.leyline import DataError

TEXT = "the quick brown fox jumps over the lazy dog. " * 40


def load(path, *, seed=0, root=None, **settings):
    config = TextData(path=str(path), **{"context": 8, "train_samples": 50, "val_samples": 6, **settings})
    return load_data(config, task="language_model", seed=seed, data_root=root)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


def words(data, codes):
    return "".join(data.vocabulary[code] for code in codes.tolist())


def test_y_is_x_one_later_and_both_are_from_the_training_text(text):
    data = load(text)
    assert len(data.train) == 50
    for x, y in (data.train[0], data.train[49]):
        assert x.shape == y.shape == (8,)
        assert torch.equal(x[1:], y[:-1])
        assert words(data, x) + words(data, y[-1:]) in TEXT[: int(len(TEXT) * 0.9)]


def test_validation_and_test_are_fixed_windows_of_different_halves(tmp_path):
    letters = "".join(chr(0x4E00 + i) for i in range(100))
    path = tmp_path / "unique.txt"
    path.write_text(letters * 9 + letters)  # the tenth copy is held back, and every letter there is known
    data = load(path, val_samples=1000)
    val, test = (set(torch.cat([part[0].flatten(), part[1].flatten()]).tolist()) for part in (data.val, data.test))
    assert val == set(range(50))
    assert test == set(range(50, 100))
    assert torch.equal(data.val[0][:, 1:], data.val[1][:, :-1])
    assert len(data.val[0]) == 50 - 8  # no more windows than places


def test_windows_depend_on_seed_and_epoch_alone(text):
    def drawn(data):
        return torch.stack([data.train[i][0] for i in range(50)])

    first, again, other = load(text), load(text), load(text, seed=1)
    assert torch.equal(drawn(first), drawn(again))
    assert not torch.equal(drawn(first), drawn(other))
    epoch0 = drawn(first)
    first.train.set_epoch(1)
    assert not torch.equal(drawn(first), epoch0)
    first.train.set_epoch(0)
    assert torch.equal(drawn(first), epoch0)


def test_validation_does_not_move_with_the_seed(text):
    assert torch.equal(load(text).val[0], load(text, seed=1).val[0])


def test_vocabulary_is_the_training_part_alone(tmp_path):
    path = tmp_path / "new.txt"
    path.write_text("ab" * 450 + "abz" * 33 + "a")
    data = load(path)
    assert data.vocabulary == "ab"
    assert data.num_outputs == 3  # one more for what training never saw
    assert int(data.val[0].max()) == 2


def test_windows_reach_the_last_place(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("ab" * 100)
    data = load(path, context=5, train_samples=2000)
    starts = {int(start) for start in data.train._starts}
    assert starts == set(range(180 - 5))


def test_end_of_the_dataset_raises_index_error(text):
    with pytest.raises(IndexError):
        load(text).train[50]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"too short", "data.context: .*has 9 characters"), (b"\xff\xfe\xfa", "data.path: .* is not UTF-8 .*at byte 0")],
)
def test_unusable_text_names_the_setting(tmp_path, content, reason):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load(path)


def test_missing_text_names_every_address(tmp_path):
    with pytest.raises(DataError, match=rf"data.path: no data; tried no.txt: no such file; {tmp_path}/no.txt: no such"):
        load("no.txt", root=str(tmp_path))


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(DataError, match=r"data.path: .*no such file"):
        load(tmp_path)


def test_tiny_shakespeare(data_root):
    data = load("tinyshakespeare/input.txt", root=data_root, context=64)
    assert data.num_outputs == len(data.vocabulary) == 65
    assert words(data, data.train._codes[:5]) == "First"
