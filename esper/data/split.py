"""Holding samples back, the same ones every time, with every class in its share."""

from __future__ import annotations

import torch

from esper.config import DigitsData, SyntheticData
from esper.data.sets import DataSets

SPLIT_SEED = 20_260
"""Fixed: a split that moved with the run's seed would make runs incomparable."""


def stratified(labels: torch.Tensor, fraction: float, *, salt: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits sample numbers in two, class by class.

    Args:
        labels: (N,) class of each sample.
        fraction: share of each class that is held back, rounded; at least one sample of a class with two.
        salt: tells several splits of the same samples apart.

    Returns:
        The numbers that stay and those held back, each ascending.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED + salt)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = round(len(members) * fraction)
        if fraction > 0 and len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def standardise(reference: torch.Tensor, *others: torch.Tensor, dims: tuple[int, ...]) -> list[torch.Tensor]:
    """Shifts and scales all by the mean and deviation of `reference` over `dims`; a constant is shifted only."""
    mean = reference.mean(dim=dims, keepdim=True)
    std = reference.std(dim=dims, keepdim=True)
    std = torch.where(std > 1e-4, std, 1.0)  # below the step of an 8-bit picture it is rounding, not contrast
    return [(values - mean) / std for values in (reference, *others)]


def split_pictures(
    images: torch.Tensor, labels: torch.Tensor, config: DigitsData | SyntheticData, *, num_outputs: int
) -> DataSets:
    """Splits pictures in three and standardises them by one mean and deviation, those of the training part.

    Args:
        images: (N, C, H, W) float32.
        labels: (N,) class of each.
        config: shares of validation and test, and whether pictures are laid flat, as (N, C * H * W).
        num_outputs: classes.
    """
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
        num_outputs=num_outputs,
    )
