import io

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from esper.config import ParquetImageData
from esper.data import load_data
from esper.leyline import DataError
from esper.storage import Storage


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def picture(value, size=(4, 4), channels=1):
    shape = size if channels == 1 else (*size, channels)
    return np.full(shape, value, dtype=np.uint8)


def write(folder, name, images, labels, column="image", wrap=True):
    data = [{"bytes": png(image), "path": None} for image in images] if wrap else [png(image) for image in images]
    pq.write_table(pa.table({column: data, "label": labels}), folder / name)


@pytest.fixture
def folder(tmp_path):
    for name in ("train.parquet", "test.parquet"):
        write(tmp_path, name, [picture(10 * i) for i in range(20)], [i % 2 for i in range(20)])
    return tmp_path


def load(path, *, root=None, **settings):
    config = ParquetImageData(path=str(path), **settings)
    return load_data(config, task="classification", seed=0, data_root=root)


def test_pixels_come_through_in_order(folder):
    data = load(folder, val_fraction=0.2)
    assert data.test[0].shape == (20, 1, 4, 4)
    assert data.test[1].tolist() == [i % 2 for i in range(20)]
    # standardising is affine: equal steps of grey stay equal steps
    values = data.test[0][:, 0, 0, 0]
    assert torch.allclose(values.diff(), values.diff()[0].expand(19), atol=1e-5)
    assert torch.all(values.diff() > 0)


def test_train_and_validation_are_disjoint_and_standardised_by_training(folder):
    data = load(folder, val_fraction=0.2)
    train, val = (set(part[0][:, 0, 0, 0].tolist()) for part in (data.train, data.val))
    assert (len(train), len(val)) == (16, 4)
    assert not train & val
    assert abs(data.train[0].mean().item()) < 1e-5


def test_colour_is_standardised_channel_by_channel(tmp_path):
    images = [np.stack([picture(i), picture(5 * i), picture(200)], axis=-1) for i in range(20)]
    for name in ("train.parquet", "test.parquet"):
        write(tmp_path, name, images, [i % 2 for i in range(20)])
    data = load(tmp_path, val_fraction=0.2)
    assert data.input_shape == (3, 4, 4)
    assert torch.allclose(data.train[0].mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert data.train[0][:, 2].abs().max() < 1e-5  # a constant is not blown up
    assert torch.allclose(data.train[0][:, 0], data.train[0][:, 1], atol=1e-4)


def test_limits_take_the_first_rows_and_keep_every_class(tmp_path):
    for name in ("train.parquet", "test.parquet"):
        write(tmp_path, name, [picture(i) for i in range(20)], [i // 7 for i in range(20)])
    data = load(tmp_path, train_limit=10, test_limit=3, val_fraction=0.2)
    assert len(data.train[1]) + len(data.val[1]) == 10
    assert len(data.test[1]) == 3
    assert data.num_outputs == 3  # class 2 stands only beyond the limit


def test_plain_bytes_are_read_too(tmp_path):
    for name in ("train.parquet", "test.parquet"):
        write(tmp_path, name, [picture(i) for i in range(4)], [0, 1, 0, 1], wrap=False)
    assert load(tmp_path, val_fraction=0.4).test[0].shape == (4, 1, 4, 4)


def test_relative_path_is_found_below_the_data_root(folder):
    assert len(load(folder.name, root=str(folder.parent), val_fraction=0.2).test[1]) == 20


def test_any_fsspec_address_will_do(folder):
    memory = fsspec.filesystem("memory")
    for name in ("train.parquet", "test.parquet"):
        memory.pipe_file(f"/images/{name}", (folder / name).read_bytes())
    try:
        assert len(load("memory://images", val_fraction=0.2).test[1]) == 20
    finally:
        memory.rm("/images", recursive=True)


def test_options_reach_the_driver(folder, s3_options):
    options = {key: s3_options[key] for key in ("endpoint_url", "key", "secret")}
    store = Storage.at("s3://bucket/images", s3_options)
    for name in ("train.parquet", "test.parquet"):
        store.write(name, (folder / name).read_bytes())
    assert len(load("s3://bucket/images", val_fraction=0.2, options=options).test[1]) == 20
    with pytest.raises(DataError, match="s3://bucket/images"):
        load("s3://bucket/images", options={"endpoint_url": "nonsense"})


def test_missing_data_name_the_setting_and_every_address(tmp_path):
    root = str(tmp_path / "root")
    with pytest.raises(DataError, match=r"^data.path: ") as caught:
        load("no/such", root=root)
    assert "tried no/such: no train.parquet and no test.parquet; " in str(caught.value)
    assert f"{root}/no/such: no train.parquet" in str(caught.value)


def test_without_a_data_root_the_error_tells_of_it():
    with pytest.raises(DataError, match="set ESPER_DATA"):
        load("no/such")


def test_one_missing_file_is_named(folder):
    (folder / "test.parquet").unlink()
    with pytest.raises(DataError, match=r": no test.parquet \("):
        load(folder)


def test_unknown_scheme_is_one_clear_line():
    with pytest.raises(DataError, match=r"data.path: no data; tried nowhere://x: Protocol not known"):
        load("nowhere://x")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_column": "img"}, r"data.image_column: train.parquet has no column 'img' \(it has image, label\)"),
        ({"label_column": "y"}, "data.label_column: train.parquet has no column 'y'"),
        ({"image_column": "label"}, "data.image_column: column 'label' .* is int64, not encoded images"),
        ({"label_column": "image"}, "data.label_column: column 'image' .*not integers"),
        ({"train_limit": 1}, "data.train_limit: 1 rows leave 1 to train on and 0 to validate"),
    ],
)
def test_a_wrong_schema_names_the_setting(folder, settings, words):
    with pytest.raises(DataError, match=words):
        load(folder, **settings)


def test_images_of_different_size_name_the_row(folder):
    write(folder, "train.parquet", [picture(1), picture(2), picture(3, size=(5, 4))], [0, 1, 0])
    with pytest.raises(DataError, match=r"row 2 of train.parquet is \(5, 4\)"):
        load(folder)


def test_sizes_of_train_and_test_must_agree(folder):
    write(folder, "test.parquet", [picture(1, size=(5, 4))], [0])
    with pytest.raises(DataError, match=r"of test.parquet"):
        load(folder)


def test_a_test_label_that_training_lacks_is_refused(folder):
    write(folder, "test.parquet", [picture(1)], [2])
    with pytest.raises(DataError, match=r"test.parquet has label 2"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"), [(b"no image", "row 1 .* no image that can be decoded"), (None, "row 1 .* holds no bytes")]
)
def test_a_broken_image_names_the_row(folder, content, words):
    rows = [{"bytes": png(picture(1)), "path": "a"}, {"bytes": content, "path": "b"}]
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), folder / "train.parquet")
    with pytest.raises(DataError, match=words):
        load(folder)


def test_labels_must_count_from_zero(folder):
    write(folder, "train.parquet", [picture(1), picture(2)], [-1, 0])
    with pytest.raises(DataError, match="label below 0"):
        load(folder)


def test_a_file_that_is_no_parquet_is_refused(folder):
    (folder / "train.parquet").write_bytes(b"plain words")
    with pytest.raises(DataError, match=r"train.parquet cannot be read"):
        load(folder)


def test_fashion_mnist(data_root):
    data = load("fashion_mnist", root=data_root, train_limit=500, test_limit=100)
    assert (data.input_shape, data.num_outputs) == ((1, 28, 28), 10)
    assert (len(data.train[1]), len(data.val[1]), len(data.test[1])) == (451, 49, 100)  # rounded class by class


def test_cifar10_and_its_column_name(data_root):
    data = load("cifar10", root=data_root, image_column="img", train_limit=200, test_limit=50)
    assert (data.input_shape, data.num_outputs) == ((3, 32, 32), 10)
    with pytest.raises(DataError, match=r"data.image_column: .*it has img, label"):
        load("cifar10", root=data_root)
