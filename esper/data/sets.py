"""What every data set comes to: splits, shapes, vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

Split = tuple[torch.Tensor, torch.Tensor] | Dataset[tuple[torch.Tensor, torch.Tensor]]
"""(inputs, targets) with the samples along the first dimension, or a map-style dataset of such pairs."""


@dataclass(frozen=True)
class DataSets:
    """The splits of one data set; torch's default collation makes batches of them.

    Attributes:
        train: what is learned from. A dataset that draws anew has `set_epoch(epoch)`.
        val: what gates, policies and early stopping see.
        test: touched once, at the end; None where the configuration keeps none back.
        input_shape: of one sample: (features,), (C, H, W) or (T,).
        num_outputs: classes, or characters of the vocabulary.
        vocabulary: the characters by number, for text.
    """

    train: Split
    val: Split
    test: Split | None
    input_shape: tuple[int, ...]
    num_outputs: int
    vocabulary: str | None = None
