"""What a step of the host costs in FLOPs, without disturbing it.

A training step is counted whole, on copies, once for each kind of batch. That takes as long as a step and its memory,
so a graft must not ask for it again: what the host's own layers cost is kept, and only the sites that grew are counted
anew, each on a tensor of its own shape. Both ways give one figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.leyline.autocast import no_autocast_cache
from esper.leyline.compiled import eagerly
from esper.leyline.generators import drawn_apart
from esper.leyline.growth import (
    HEALTH_CHANNELS,
    HEALTH_ROWS,
    PREFIX,
    PROBE_FEATURES,
    Growable,
    GrownSite,
    SiteTensor,
)
from esper.leyline.kernels import SiteSignature
from esper.leyline.substitute import with_tensors
from esper.tolaria.flops import StepCosts, count_flops
from esper.tolaria.precision import FULL, Precision
from esper.tolaria.workload import model_args

HEALTH_OPS = 4
"""FLOPs an element of h on a sampled step: extremes (2), norm of the gradient (2)."""
HEALTH_ROW_OPS = 5
"""FLOPs an element of those rows whose variance is taken."""


@dataclass(frozen=True, slots=True)
class HostShare:
    """What a training step costs without any kernel, and what of it a graft does not change.

    Attributes:
        flops: of the host's own layers.
        num_trained: tensors of the host that took a gradient when it was counted.
        tensors: by site, what a kernel there would be given.
    """

    flops: int
    num_trained: int
    tensors: Mapping[str, SiteTensor]


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
        self._shares: dict[Hashable, HostShare] = {}

    def training_step(self, inputs: Any, targets: Any) -> int:
        """FLOPs of forward and backward for this batch."""
        args = model_args(inputs)
        return self._costs.cost(
            lambda: self._count_training(args, targets),
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
            lambda: count_flops(lambda: self._infer(args)),
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
            cost = self._costs.cost(lambda: count_flops(lambda: result.append(run())), **key)
        return result[0], cost

    def state_dict(self) -> list[list[Any]]:
        """What is known of the present topology: a resumed run must not count it at another alpha."""
        return self._costs.state_dict()

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Inverse of `state_dict`, once the topology is restored."""
        self._costs.load_state_dict(state, topology_version=self._growable.topology_version)

    def shares(self) -> list[list[Any]]:
        """For each kind of batch, what is known of the host's own layers: a resumed run need not count them again."""
        return [
            [
                shapes,
                {
                    "flops": share.flops,
                    "num_trained": share.num_trained,
                    "tensors": {
                        site: [list(h.shape), str(h.dtype).removeprefix("torch.")] for site, h in share.tensors.items()
                    },
                },
            ]
            for shapes, share in self._shares.items()
        ]

    def load_shares(self, state: Sequence[Sequence[Any]]) -> None:
        """Inverse of `shares`."""
        self._shares = {
            shapes: HostShare(
                share["flops"],
                share["num_trained"],
                {
                    site: SiteTensor(tuple(shape), getattr(torch, dtype))
                    for site, (shape, dtype) in share["tensors"].items()
                },
            )
            for shapes, share in state
        }

    def _count_training(self, args: tuple[Any, ...], targets: Any) -> int:
        """By the host's share where that is known, and still holds; else whole."""
        grown, shapes, share = self._growable.grown_sites(), _shapes(args), self._shares.get(_shapes(args))
        num_trained = sum(p.requires_grad for name, p in self._growable.live_parameters() if not _of_a_seed(name))
        if share is not None and share.num_trained == num_trained and grown.keys() <= share.tensors.keys():
            return share.flops + self._count_sites(grown, share.tensors)
        with self._growable.watched() as tensors:
            whole = count_flops(lambda: self._train_on_copies(args, targets))
        if grown.keys() <= tensors.keys():
            self._shares[shapes] = HostShare(whole - self._count_sites(grown, tensors), num_trained, dict(tensors))
        return whole

    def _count_sites(self, grown: Mapping[str, GrownSite], tensors: Mapping[str, SiteTensor]) -> int:
        """What the kernels on the live path add to a training step, each on a tensor as its site gets it."""
        return sum(
            self._count_site(site, tensors[name], self._growable.sites[name].device) for name, site in grown.items()
        )

    def _count_site(self, site: GrownSite, tensor: SiteTensor, device: str) -> int:
        place = next((p.device for p in site.parameters), torch.device(device))
        h = torch.zeros(tensor.shape, dtype=tensor.dtype, device=place, requires_grad=True)
        gradient = torch.ones_like(h)
        wanted = [h, *(p for p in site.parameters if p.requires_grad)]

        def step() -> None:
            with self._precision.forward():
                out = site.forward(h.neg())
            torch.autograd.grad(out.neg(), wanted, gradient, allow_unused=True)

        with self._undisturbed():
            # an operation on either side, as in the host: where gradients meet, nobody else holds them
            return count_flops(step) - 2 * 2 * h.numel()

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with (
            drawn_apart(range(torch.cuda.device_count())),
            _in_eval(self._growable.module.get_submodule(PREFIX)),
            torch.enable_grad(),
            no_autocast_cache(),
        ):
            yield

    def _train_on_copies(self, args: tuple[Any, ...], targets: Any) -> None:
        module = self._growable.module
        with eagerly(module), self._undisturbed():
            tensors = {
                name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in module.named_parameters()
            }
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]

            def step() -> None:
                with self._precision.forward():
                    outputs = module(*args)
                loss = self._loss_of(self._precision.full(outputs), targets)
                torch.autograd.grad(loss, wanted, allow_unused=True)

            with_tensors(module, {**tensors, **buffers}, step)

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


def _of_a_seed(name: str) -> bool:
    return name.startswith(f"{PREFIX}.")


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
