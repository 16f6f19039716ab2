"""The digits inside scikit-learn: 1,797 real 8x8 images of handwriting, ten classes; no download."""

from __future__ import annotations

import torch

from esper.config import DigitsData
from esper.data.sets import DataSets
from esper.data.split import standardise, stratified


def load_digits(config: DigitsData) -> DataSets:
    """Loads all digits, standardised by one mean and deviation, as (N, 64) or (N, 1, 8, 8) float32."""
    from sklearn import datasets  # slow to import

    pixels, classes = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).float().view(-1, 1, 8, 8)
    labels = torch.as_tensor(classes).long()
    rest, test = stratified(labels, config.test_fraction)
    # the validation share is of all samples, as the test share is
    train, val = stratified(labels[rest], config.val_fraction / (1 - config.test_fraction), salt=1)
    train, val = rest[train], rest[val]
    parts = standardise(images[train], images[val], images[test], dims=(0, 1, 2, 3))
    if config.layout == "flat":
        parts = [part.flatten(1) for part in parts]
    return DataSets(
        train=(parts[0], labels[train]),
        val=(parts[1], labels[val]),
        test=(parts[2], labels[test]) if len(test) else None,
        input_shape=tuple(parts[0].shape[1:]),
        num_outputs=10,
    )
