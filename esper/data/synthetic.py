"""Made-up pictures for policies to be trained on: smooth random templates, moved about and drowned in noise. Knows no
file: a problem is its configuration, and the same on every machine with the same torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from esper.config import SyntheticData
from esper.data.sets import DataSets
from esper.data.split import split_pictures


def make_synthetic(config: SyntheticData) -> DataSets:
    """Makes all samples, standardised by one mean and deviation, as (N, channels * size²) or (N, channels, size, size)
    float32; as many of each class, up to one.
    """
    source = torch.Generator().manual_seed(config.seed)
    labels = torch.arange(config.samples) % config.classes
    templates = _templates(config, source)[labels, torch.randint(config.clusters, (config.samples,), generator=source)]
    images = _moved(templates, config.shift, source)
    images = images + config.noise * torch.randn(images.shape, generator=source)
    return split_pictures(images, labels, config, num_outputs=config.classes)


def _templates(config: SyntheticData, source: torch.Generator) -> Tensor:
    """(classes, clusters, channels, size, size), each of mean 0 and deviation 1: noise, smoothed over 3x3 pixels."""
    shape = (config.classes * config.clusters, config.channels, config.size, config.size)
    rough = torch.randn(shape, generator=source)
    smooth = functional.avg_pool2d(functional.pad(rough, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    flat = smooth.flatten(1)
    flat = (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True)
    return flat.view(config.classes, config.clusters, *shape[1:])


def _moved(images: Tensor, shift: int, source: torch.Generator) -> Tensor:
    """Each of (N, C, H, W) moved by its own number of pixels, up to `shift` each way."""
    size = images.shape[-1]
    moves = torch.randint(-shift, shift + 1, (len(images), 2), generator=source)
    rows, columns = ((torch.arange(size) + moves[:, i : i + 1]) % size for i in range(2))  # (N, size) each
    every = torch.arange(len(images))[:, None, None]
    # indexed dimensions that a slice separates come first: (N, H, W, C)
    return images[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
