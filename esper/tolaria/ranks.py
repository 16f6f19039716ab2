"""How the trainers of one run agree: a small port, one for a single process and one over `torch.distributed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from esper.leyline.growth import PREFIX

T = TypeVar("T")


class Ranks(Protocol):
    """All trainers of a run. Every method is collective: all ranks call it, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def broadcast(self, value: T | None) -> T:
        """Returns rank 0's `value` everywhere; what other ranks pass is ignored. The value must pickle."""
        ...

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in rank order, on every rank."""
        ...

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Averages tensors over ranks, in place."""
        ...

    def agree(self, refusal: str | None) -> str | None:
        """Returns the first rank's refusal, in rank order, or None if every rank passed None."""
        ...

    def parallel(self, module: nn.Module, live: Sequence[str]) -> nn.Module:
        """Returns what to call for a forward whose gradients are averaged.

        Called again whenever the live path changed: a wrapper that was built before leaves new weights to diverge
        silently. All ranks hold identical weights by then.

        Args:
            module: the host.
            live: names of the parameters on the live path; a kernel that still trains in shadow is not among them.
        """
        ...


class SoloRanks:
    """One process alone."""

    rank = 0
    world = 1

    def broadcast(self, value: T | None) -> T:
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        return [value]

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Nothing to average."""

    def agree(self, refusal: str | None) -> str | None:
        return refusal

    def parallel(self, module: nn.Module, live: Sequence[str]) -> nn.Module:  # noqa: ARG002 - part of the port
        return module


class TorchRanks:
    """The default process group of `torch.distributed` (gloo or NCCL), which must be initialised.

    Args:
        device: where objects travel; the rank's GPU under NCCL.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        from torch import distributed

        self._distributed = distributed
        self._device = device or torch.device("cpu")
        self.rank: int = distributed.get_rank()
        self.world: int = distributed.get_world_size()

    def broadcast(self, value: T | None) -> T:
        box: list[Any] = [value]
        self._distributed.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        box: list[Any] = [None] * self.world
        self._distributed.all_gather_object(box, value)
        return box

    def mean_(self, tensors: Sequence[torch.Tensor]) -> None:
        if not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._distributed.all_reduce(flat)
        flat /= self.world
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, refusal: str | None) -> str | None:
        # a word costs 4 bytes; only when somebody refuses are the words themselves sent
        flag = torch.tensor([0 if refusal is None else 1], device=self._device)
        self._distributed.all_reduce(flag)
        if not int(flag):
            return None
        return next(words for words in self.gather(refusal) if words is not None)

    def parallel(self, module: nn.Module, live: Sequence[str]) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        names = set(live)
        asleep = [name for name, _ in module.named_parameters() if name.startswith(f"{PREFIX}.") and name not in names]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, asleep)  # noqa: SLF001 - the only way to leave a shadow kernel out
        ids = [self._device.index or 0] if self._device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, init_sync=False)
