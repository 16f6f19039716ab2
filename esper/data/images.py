"""Encoded images in parquet files of the Hugging Face schema: a struct of bytes and path, and an integer label.

Every image is decoded once, when the data are loaded, into float32 (4 bytes a value: 60,000 of 28x28 are 188 MB).
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError

from esper.config import ParquetImageData
from esper.data.address import FIELD, Place, find
from esper.data.sets import DataSets
from esper.data.split import standardise, stratified
from esper.leyline.errors import DataError

TRAIN, TEST = "train.parquet", "test.parquet"
_GREY = {"1", "L", "I", "I;16", "F"}


def load_images(config: ParquetImageData, *, data_root: str | None = None) -> DataSets:
    """Loads `train.parquet` and `test.parquet` as (N, C, H, W) float32, standardised by channel.

    Raises:
        DataError: if a file is missing or not in the schema, or an image cannot be decoded or differs in size.
    """
    place = find(config.path, needs=(TRAIN, TEST), data_root=data_root, options=config.options)
    images, labels, num_classes = _read(place, TRAIN, config, config.train_limit)
    test_images, test_labels, num_test_classes = _read(place, TEST, config, config.test_limit)
    if num_test_classes > num_classes:
        raise DataError(
            f"{TEST} has label {num_test_classes - 1}, {TRAIN} only up to {num_classes - 1}", field="data.label_column"
        )
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"images of {TRAIN} are {tuple(images.shape[1:])}, of {TEST} {tuple(test_images.shape[1:])}", field=FIELD
        )
    train, val = stratified(labels, config.val_fraction)
    if not len(train) or not len(val):
        raise DataError(
            f"{len(labels)} rows leave {len(train)} to train on and {len(val)} to validate",
            field="data.train_limit",
            remedy="use more rows",
        )
    parts = standardise(images[train], images[val], test_images, dims=(0, 2, 3))
    return DataSets(
        train=(parts[0], labels[train]),
        val=(parts[1], labels[val]),
        test=(parts[2], test_labels),
        input_shape=tuple(images.shape[1:]),
        num_outputs=num_classes,
    )


def _read(
    place: Place, name: str, config: ParquetImageData, limit: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns images (N, C, H, W) in [0, 1], labels (N,) and the number of classes in the whole file."""
    with place.open(name) as file:
        try:
            parquet = pq.ParquetFile(file)
            _check_schema(parquet.schema_arrow, name, config)
            # all labels, so that a small prefix without a class still has an output for it
            every_label = parquet.read(columns=[config.label_column]).column(0)
            encoded = _first_images(parquet, config.image_column, limit)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{place.address}/{name} cannot be read: {error}", field=FIELD) from error
    if len(every_label) == 0:
        raise DataError(f"{name} has no rows", field=FIELD)
    if every_label.null_count:
        raise DataError(f"{name} has rows without a label", field="data.label_column")
    labels = torch.from_numpy(every_label.to_numpy().astype(np.int64))
    if labels.min() < 0:
        raise DataError(f"{name} has a label below 0", field="data.label_column", remedy="number classes from 0")
    images = _decode_all(encoded, name)
    return images, labels[: len(encoded)], int(labels.max()) + 1


def _check_schema(schema: pa.Schema, name: str, config: ParquetImageData) -> None:
    for field, column in (("data.image_column", config.image_column), ("data.label_column", config.label_column)):
        if column not in schema.names:
            raise DataError(f"{name} has no column {column!r}", field=field, remedy=f"it has {', '.join(schema.names)}")
    image_type = schema.field(config.image_column).type
    is_struct = pa.types.is_struct(image_type) and image_type.get_field_index("bytes") >= 0
    if not is_struct and not _is_binary(image_type):
        raise DataError(
            f"column {config.image_column!r} of {name} is {image_type}, not encoded images",
            field="data.image_column",
            remedy="a struct of bytes and path, or bytes",
        )
    if not pa.types.is_integer(schema.field(config.label_column).type):
        raise DataError(
            f"column {config.label_column!r} of {name} is {schema.field(config.label_column).type}, not integers",
            field="data.label_column",
        )


def _is_binary(data_type: pa.DataType) -> bool:
    return pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type)


def _first_images(parquet: pq.ParquetFile, column: str, limit: int | None) -> list[bytes | None]:
    encoded: list[bytes | None] = []
    for batch in parquet.iter_batches(batch_size=4096, columns=[column]):
        values = batch.column(0)
        data = values.field("bytes") if pa.types.is_struct(values.type) else values
        encoded.extend(data.to_pylist())
        if limit is not None and len(encoded) >= limit:
            return encoded[:limit]
    return encoded


def _decode_all(encoded: list[bytes | None], name: str) -> torch.Tensor:
    first = _decode(encoded[0], name, 0, mode=None)
    pixels = np.empty((len(encoded), *first.shape), dtype=np.uint8)
    mode = "L" if first.ndim == 2 else "RGB"
    for row, data in enumerate(encoded):
        image = _decode(data, name, row, mode=mode)
        if image.shape != first.shape:
            raise DataError(f"row {row} of {name} is {image.shape}, row 0 is {first.shape}", field=FIELD)
        pixels[row] = image
    images = torch.from_numpy(pixels)
    images = images.unsqueeze(1) if mode == "L" else images.permute(0, 3, 1, 2)
    return images.float().div_(255).contiguous()


def _decode(data: bytes | None, name: str, row: int, *, mode: str | None) -> np.ndarray:
    if data is None:
        raise DataError(f"row {row} of {name} holds no bytes, only a path perhaps", field=FIELD, remedy="embed them")
    try:
        image = Image.open(io.BytesIO(data))
        return np.asarray(image.convert(mode or ("L" if image.mode in _GREY else "RGB")))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"row {row} of {name} is no image that can be decoded: {error}", field=FIELD) from error
