"""What the governor looks at after each step: gradients, and the weights of kernels that have not proven themselves.

A kernel's weights, and what one step changed of them, are set against the host's: its largest tensor by root mean
square. The loss does not do for this: a grower was seen to write 2e15 into weights, and the loss after it was normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.leyline.growth import PREFIX, Growable
from esper.leyline.seeds import SeedStage
from esper.tolaria.optim import SEED_KEY, Optimization


@dataclass(frozen=True, slots=True)
class GraftNorms:
    """Root mean squares of one kernel: that of the tensor where each is largest.

    Attributes:
        name: of the kernel, in words.
        weight: of its weights.
        update: of what changed since they were last looked at.
    """

    name: str
    weight: float
    update: float


class Watching:
    """Watches the parameters of one run; changes nothing.

    Args:
        growable: the host.
        optimization: its optimizer, whose groups tell the kernels apart.

    Attributes:
        host_scale: root mean square of the host's largest tensor when it was last found sound.
    """

    def __init__(self, growable: Growable, optimization: Optimization) -> None:
        self._growable = growable
        self._optimization = optimization
        self._watched: dict[str, tuple[str, list[nn.Parameter], list[torch.Tensor]]] = {}
        self.host_scale = 0.0

    def measure_host(self) -> None:
        """Takes the host's weights for the measure of what is in line."""
        own = [p.detach() for name, p in self._growable.live_parameters() if not name.startswith(f"{PREFIX}.")]
        self.host_scale = max(_scales(own), default=0.0)

    def look_again(self) -> None:
        """To be called when seeds moved: watches those that are blended in and not permanent yet."""
        groups = {group[SEED_KEY]: group["params"] for group in _groups(self._optimization) if SEED_KEY in group}
        watched = {}
        for seed in self._growable.seeds():
            parameters = groups.get(seed.seed_id)
            if parameters and seed.stage.is_blended and seed.stage is not SeedStage.FOSSILIZED:
                before = self._watched.get(seed.seed_id)
                same = before is not None and all(
                    one is other for one, other in zip(before[1], parameters, strict=True)
                )
                kept = before[2] if before is not None and same else [p.detach().clone() for p in parameters]
                watched[seed.seed_id] = (f"{seed.blueprint} at {seed.site}", list(parameters), kept)
        self._watched = watched

    def grafts(self) -> list[GraftNorms]:
        """The norms after a step; the next call compares with the weights of this one."""
        found = []
        for name, parameters, before in self._watched.values():
            now = [parameter.detach() for parameter in parameters]
            updates = _scales([one - other for one, other in zip(now, before, strict=True)])
            found.append(GraftNorms(name, max(_scales(now)), max(updates)))
            for kept, value in zip(before, now, strict=True):
                kept.copy_(value)
        return found

    def gradient_norm(self) -> float | None:
        """Norm of all gradients of the step; None where there are none."""
        gradients = [
            parameter.grad
            for group in _groups(self._optimization)
            for parameter in group["params"]
            if parameter.grad is not None and parameter.grad.layout is torch.strided
        ]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else None


def _groups(optimization: Optimization) -> Sequence[Mapping[str, Any]]:
    return optimization.optimizer.param_groups


def _scales(tensors: Sequence[torch.Tensor]) -> list[float]:
    """Root mean square of each tensor; one that is not finite gives what is not finite."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return []
    norms = torch.stack([torch.linalg.vector_norm(tensor).double() for tensor in filled]).tolist()
    return [norm / math.sqrt(tensor.numel()) for norm, tensor in zip(norms, filled, strict=True)]
