"""The data of a run: a union on `type`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from esper.config.section import PositiveInt, Section


class DigitsData(Section):
    """The digits set inside scikit-learn: 1,797 real 8x8 images, ten classes."""

    type: Literal["digits"] = "digits"
    layout: Literal["flat", "image"] = "image"
    """`flat` gives (B, 64), `image` gives (B, 1, 8, 8)."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    test_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class SyntheticData(Section):
    """Made-up pictures, a problem for each `seed`: every class is a mixture of smooth random templates, moved about and
    drowned in noise. What policies are trained on, so that real data are left to examine them.
    """

    type: Literal["synthetic"] = "synthetic"
    layout: Literal["flat", "image"] = "image"
    """`flat` gives (B, channels * size * size), `image` gives (B, channels, size, size)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of templates and samples. That of the run changes neither."""
    samples: Annotated[int, Field(ge=40)] = 1800
    """In all three parts together."""
    classes: Annotated[int, Field(ge=2)] = 10
    clusters: PositiveInt = 3
    """Templates of each class."""
    size: Annotated[int, Field(ge=2)] = 8
    """Side in pixels."""
    channels: PositiveInt = 1
    shift: Annotated[int, Field(ge=0)] = 1
    """Pixels by which a template is moved at most, each way; what leaves on one side comes back on the other."""
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Standard deviation of what is added, in that of the templates."""
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.2
    test_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class ParquetImageData(Section):
    """Encoded images in parquet files of the Hugging Face schema: `<path>/train.parquet`, `<path>/test.parquet`."""

    type: Literal["parquet_images"] = "parquet_images"
    path: str
    """Folder or any fsspec address. A relative path is also looked up below `ESPER_DATA`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the fsspec driver, for a path with a scheme. Secrets belong in its environment variables."""
    image_column: str = "image"
    label_column: str = "label"
    train_limit: PositiveInt | None = None
    """Use the first so many training rows (before the validation split)."""
    test_limit: PositiveInt | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1


class TextData(Section):
    """A text file for a character model: the first 90% train, then validation and test halves."""

    type: Literal["text"] = "text"
    path: str
    """A file or any fsspec address. A relative path is also looked up below `ESPER_DATA`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the fsspec driver, for a path with a scheme. Secrets belong in its environment variables."""
    context: PositiveInt = 64
    """Characters a sample."""
    train_samples: PositiveInt = 8192
    """Samples an epoch, drawn at random places."""
    val_samples: PositiveInt = 512


class GivenData(Section):
    """Data handed over in Python (`esper.grow`): they cannot be named in a file."""

    type: Literal["given"] = "given"


Data = Annotated[DigitsData | SyntheticData | ParquetImageData | TextData | GivenData, Field(discriminator="type")]
