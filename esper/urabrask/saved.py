"""What a forward keeps for its backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Kept:
    """Storages, each once.

    Attributes:
        sizes: bytes by the address where a storage begins.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._held: list[torch.UntypedStorage] = []  # an address counts once only while what lies there lives

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts what a tensor lies in; returns the tensor."""
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        self._held.append(storage)
        return tensor


@contextmanager
def saved_for_backward() -> Iterator[Kept]:
    """Counts what is saved within it. Gradients are on; what it counted is kept alive as long as the result."""
    kept = Kept()

    with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda tensor: tensor), torch.enable_grad():
        yield kept
