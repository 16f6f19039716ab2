"""How the trainers of one run agree: a small port, one for a single process and one over `torch.distributed`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper.leyline.errors import ConfigError
from esper.leyline.growth import PREFIX

T = TypeVar("T")

_ROUNDS = itertools.count()
"""Numbers the agreements of this process; all ranks come to the same ones, in the same order."""


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

    def agree(self, refusal: str | None, *, deadline_s: float | None = None) -> str | None:
        """Returns the first rank's refusal, in rank order, or None if every rank passed None.

        Args:
            refusal: of this rank.
            deadline_s: a rank that says nothing for so long makes all refuse, itself too when it comes; None waits.
        """
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

    def agree(self, refusal: str | None, *, deadline_s: float | None = None) -> str | None:  # noqa: ARG002 - part of the port
        return refusal

    def parallel(self, module: nn.Module, live: Sequence[str]) -> nn.Module:  # noqa: ARG002 - part of the port
        return module


class TorchRanks:
    """The default process group of `torch.distributed` (gloo or NCCL), which must be initialised.

    Args:
        device: where objects travel; the rank's GPU under NCCL.
        find_unused: whether a step may leave parameters of the host unused; it is then looked at which, at each step.
    """

    def __init__(self, device: torch.device | None = None, *, find_unused: bool = False) -> None:
        from torch import distributed

        self._distributed = distributed
        self._store = distributed.distributed_c10d._get_default_store()  # noqa: SLF001 - torch gives no other way to it
        self._device = device or torch.device("cpu")
        self._find_unused = find_unused
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

    def agree(self, refusal: str | None, *, deadline_s: float | None = None) -> str | None:
        if deadline_s is not None:
            return self._agree_by(deadline_s, refusal)
        # a word costs 4 bytes; only when somebody refuses are the words themselves sent
        flag = torch.tensor([0 if refusal is None else 1], device=self._device)
        self._distributed.all_reduce(flag)
        if not int(flag):
            return None
        return next(words for words in self.gather(refusal) if words is not None)

    def _agree_by(self, deadline_s: float, refusal: str | None) -> str | None:
        """Through the group's store, which can be waited for; an all-reduce cannot be given up by some ranks alone.

        Each rank leaves its word. Whoever has all of them, or has waited long enough, proposes the verdict; the store
        keeps the first proposal, and that one holds for all, also for a rank that comes later.
        """
        place = f"esper/agree/{next(_ROUNDS)}"
        words = [f"{place}/{rank}" for rank in range(self.world)]
        self._store.set(words[self.rank], json.dumps(refusal))
        try:
            self._store.wait(words, timedelta(seconds=deadline_s))
        except RuntimeError:  # too late; what else may be wrong with the store is raised by the next call
            silent = [rank for rank, word in enumerate(words) if not self._store.check([word])]
            found = f"worker {silent[0]} did not answer within {deadline_s:g} s" if silent else None
        else:
            silent, found = [], None
        if not silent:
            said = (json.loads(self._store.get(word)) for word in words)
            found = next((word for word in said if word is not None), None)
        return json.loads(self._store.compare_set(f"{place}/verdict", "", json.dumps(found)))

    def parallel(self, module: nn.Module, live: Sequence[str]) -> nn.Module:
        names = set(live)
        asleep = [name for name, _ in module.named_parameters() if name.startswith(f"{PREFIX}.") and name not in names]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, asleep)  # noqa: SLF001 - the only way to leave a shadow kernel out
        ids = [self._device.index or 0] if self._device.type == "cuda" else None
        return _Parallel(module, device_ids=ids, init_sync=False, find_unused_parameters=self._find_unused)


class _Parallel(DistributedDataParallel):
    """Says in Esper's words what torch says of a host that leaves parameters unused."""

    def forward(self, *inputs: Any, **given: Any) -> Any:
        try:
            return super().forward(*inputs, **given)
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            raise ConfigError(
                "a step left parameters of the host unused, and their gradients were waited for",
                field="tolaria.find_unused_parameters",
                remedy="set it to true, or train the parameters that are used alone (requires_grad)",
            ) from error
