"""The one way from a configuration to samples."""

from __future__ import annotations

from esper.config import Data, DigitsData, GivenData, ParquetImageData, SyntheticData, TextData
from esper.data.sets import DataSets
from esper.leyline.errors import ConfigError


def load_data(
    config: Data,
    *,
    task: str,
    seed: int,
    data_root: str | None = None,
) -> DataSets:
    """Loads a data set.

    The splits are the same for every seed, so that runs can be compared in pairs; figures for standardising come
    from the training part alone.

    Args:
        config: which data set.
        task: `classification` or `language_model`.
        seed: of whatever is drawn at random in an epoch.
        data_root: folder or address below which a relative `data.path` is looked up too.

    Raises:
        DataError: if the data cannot be found or read, or are not in the expected schema.
        ConfigError: if the task does not go with the data.
    """
    if isinstance(config, GivenData):
        raise ConfigError(
            "these data were handed over in Python and cannot be loaded from a configuration",
            field="data.type",
            remedy="call esper.grow, or name one of digits, synthetic, parquet_images, text",
        )
    wanted = "language_model" if isinstance(config, TextData) else "classification"
    if task != wanted:
        raise ConfigError(
            f"data of type {config.type} are for {wanted}, not {task}",
            field="task",
            remedy="give your own data to esper.grow for other tasks",
        )
    # imported here, so that digits need no image codec and pictures no scikit-learn
    match config:
        case DigitsData():
            from esper.data.digits import load_digits

            return load_digits(config)
        case SyntheticData():
            from esper.data.synthetic import make_synthetic

            return make_synthetic(config)
        case ParquetImageData():
            from esper.data.images import load_images

            return load_images(config, data_root=data_root)
        case TextData():
            from esper.data.text import load_text

            return load_text(config, seed=seed, data_root=data_root)
