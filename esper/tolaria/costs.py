"""What a step of the host costs in FLOPs, without disturbing it: counted on copies, once for each kind of step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from esper.leyline.autocast import no_autocast_cache
from esper.leyline.compiled import eagerly
from esper.leyline.generators import drawn_apart
from esper.leyline.growth import HEALTH_CHANNELS, HEALTH_ROWS, PREFIX, PROBE_FEATURES, Growable
from esper.leyline.kernels import SiteSignature
from esper.tolaria.flops import StepCosts
from esper.tolaria.precision import FULL, Precision
from esper.tolaria.workload import model_args

HEALTH_OPS = 4
"""FLOPs an element of h on a sampled step: extremes (2), norm of the gradient (2)."""
HEALTH_ROW_OPS = 5
"""FLOPs an element of those rows whose variance is taken."""


class HostCosts:
    """Counts the live path of a growable.

    Args:
        growable: whose live path.
        loss_of: (outputs, targets) to a scalar.
        precision: of its forwards; what is counted runs as what is trained does.
    """

    def __init__(
        self, growable: Growable, loss_of: Callable[[Any, Any], torch.Tensor], *, precision: Precision = FULL
    ) -> None:
        self._precision = precision
        self._growable = growable
        self._loss_of = loss_of
        self._costs = StepCosts()

    def training_step(self, inputs: Any, targets: Any) -> int:
        """FLOPs of forward and backward for this batch."""
        args = model_args(inputs)
        return self._costs.cost(
            lambda: self._train_on_copies(args, targets),
            topology_version=self._growable.topology_version,
            shapes=_shapes(args),
            mode="train",
        )

    def known_training_step(self, inputs: Any) -> int | None:
        """The same, if it was counted before."""
        version = self._growable.topology_version
        return self._costs.known(topology_version=version, shapes=_shapes(model_args(inputs)), mode="train")

    def forward(self, args: tuple[Any, ...]) -> int:
        """FLOPs of an inference forward for these arguments."""
        return self._costs.cost(
            lambda: self._infer(args),
            topology_version=self._growable.topology_version,
            shapes=_shapes(args),
            mode="infer",
        )

    def counting(self, args: tuple[Any, ...], run: Callable[[], Any], *, mode: str) -> tuple[Any, int]:
        """Runs `run`, counting it if this kind of run is new; returns its result and its FLOPs."""
        key = {"topology_version": self._growable.topology_version, "shapes": _shapes(args), "mode": mode}
        known = self._costs.known(**key)
        if known is not None:
            return run(), known
        result: list[Any] = []
        with eagerly(self._growable.module):
            cost = self._costs.cost(lambda: result.append(run()), **key)
        return result[0], cost

    def state_dict(self) -> list[list[Any]]:
        """What is known of the present topology: a resumed run must not count it at another alpha."""
        return self._costs.state_dict()

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Inverse of `state_dict`, once the topology is restored."""
        self._costs.load_state_dict(state, topology_version=self._growable.topology_version)

    def _train_on_copies(self, args: tuple[Any, ...], targets: Any) -> None:
        module = self._growable.module
        with (
            eagerly(module),
            drawn_apart(range(torch.cuda.device_count())),
            _in_eval(module.get_submodule(PREFIX)),
            torch.enable_grad(),
            no_autocast_cache(),
        ):
            tensors = {
                name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()
            }
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            with self._precision.forward():
                outputs = torch.func.functional_call(module, {**tensors, **buffers}, args)
            outputs = self._precision.full(outputs)
            wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
            torch.autograd.grad(self._loss_of(outputs, targets), wanted, allow_unused=True)

    def _infer(self, args: tuple[Any, ...]) -> None:
        module = self._growable.module
        with (
            eagerly(module),
            drawn_apart(range(torch.cuda.device_count())),
            _in_eval(module),
            torch.no_grad(),
            no_autocast_cache(),
            self._precision.forward(),
        ):
            module(*args)


def health_flops(signature: SiteSignature, batch: int) -> int:
    """Estimated FLOPs of taking one site's health on one batch: element-wise figures, correlations of some rows, and
    the growth potential's two products, which are taken on every other sample.
    """
    elements = math.prod(signature.shape(batch))
    rows = min(HEALTH_ROWS, elements // signature.channels)
    watched = min(signature.channels, HEALTH_CHANNELS)
    of_rows = rows * signature.channels * HEALTH_ROW_OPS + 2 * rows * watched**2
    return elements * HEALTH_OPS + of_rows + 2 * elements * PROBE_FEATURES


def _shapes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(arg.shape) if isinstance(arg, torch.Tensor) else None for arg in args)


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    """Sites in eval mode take no health, so what is counted does not enter their figures."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
