"""A text as numbered characters, and windows of it for a character model: x is a window, y the same, later by one."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from esper.config import TextData
from esper.data.address import FIELD, find
from esper.data.sets import DataSets
from esper.leyline.errors import DataError

TRAIN_SHARE = 0.9


class TextWindows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Windows at random places, other ones each epoch; which ones depends on (seed, epoch) alone.

    Args:
        codes: (N,) int64 characters by number.
        context: characters of a window.
        num_samples: windows an epoch.
        seed: of the places.
    """

    def __init__(self, codes: torch.Tensor, *, context: int, num_samples: int, seed: int) -> None:
        self._codes = codes
        self._context = context
        self._num_samples = num_samples
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the places of this epoch."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        last = len(self._codes) - self._context
        self._starts = torch.randint(last, (self._num_samples,), generator=generator)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns x and y, each (T,) int64."""
        if not 0 <= index < self._num_samples:
            raise IndexError(f"window {index} of {self._num_samples}")
        start = int(self._starts[index])
        window = self._codes[start : start + self._context + 1]
        return window[:-1], window[1:]


def load_text(config: TextData, *, seed: int, data_root: str | None = None) -> DataSets:
    """Loads a UTF-8 text: the first 90% train, the rest is halved for validation and test, at fixed windows.

    Characters that the training part does not have share one number after the vocabulary's.

    Raises:
        DataError: if the file is missing, not UTF-8, or too short for one window in each part.
    """
    place = find(config.path, data_root=data_root, options=config.options)
    with place.open() as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place.address} is not UTF-8 text: {error.reason} at byte {error.start}", field=FIELD
        ) from error
    codes, vocabulary, num_outputs, num_train = _encode(text)
    middle = num_train + (len(codes) - num_train) // 2
    train, val, test = codes[:num_train], codes[num_train:middle], codes[middle:]
    shortest = min(len(val), len(test))
    if shortest <= config.context:
        raise DataError(
            f"{place.address} has {len(codes)} characters, and {shortest} to validate on",
            field="data.context",
            remedy=f"choose a context below {max(shortest, 1)}, or a longer text",
        )
    return DataSets(
        train=TextWindows(train, context=config.context, num_samples=config.train_samples, seed=seed),
        val=_spread_windows(val, config.context, config.val_samples),
        test=_spread_windows(test, config.context, config.val_samples),
        input_shape=(config.context,),
        num_outputs=num_outputs,
        vocabulary=vocabulary,
    )


def _encode(text: str) -> tuple[torch.Tensor, str, int, int]:
    """Returns the numbers of all characters, the vocabulary, how many numbers there are, and the training length."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    num_train = int(len(points) * TRAIN_SHARE)
    known = np.unique(points[:num_train])
    codes = np.searchsorted(known, points)
    unknown = ~np.isin(points, known)
    codes[unknown] = len(known)
    vocabulary = "".join(map(chr, known))
    return torch.from_numpy(codes.astype(np.int64)), vocabulary, len(known) + int(unknown.any()), num_train


def _spread_windows(codes: torch.Tensor, context: int, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows at even distances, no more of them than places: x and y, each (N, T)."""
    places = len(codes) - context
    starts = torch.linspace(0, places - 1, min(num_samples, places)).long()
    windows = codes.unfold(0, context + 1, 1)[starts]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
