"""The digits inside scikit-learn: 1,797 real 8x8 images of handwriting, ten classes; no download."""

from __future__ import annotations

import torch

from esper.config import DigitsData
from esper.data.sets import DataSets
from esper.data.split import split_pictures


def load_digits(config: DigitsData) -> DataSets:
    """Loads all digits, standardised by one mean and deviation, as (N, 64) or (N, 1, 8, 8) float32."""
    from sklearn import datasets  # slow to import

    pixels, classes = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).float().view(-1, 1, 8, 8)
    labels = torch.as_tensor(classes).long()
    return split_pictures(images, labels, config, num_outputs=10)
