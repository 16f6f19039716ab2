"""The rung that a kernel runs on: native code where it may run here, is right and is faster; else the IR, and why.

Native code is opened and tried in the loader's thread. It takes its place at the beginning of a step and leaves the
parameters alone, so the optimizer and DDP notice nothing. It leaves its place again, for good, when the host hands it
what it does not compute: another dtype, another device, autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import nn

from esper.kasmina.layer import Layer, Layers, all_layers
from esper.kasmina.rests import Rest, never
from esper.kasmina.seed import Seed
from esper.kasmina.shadow import AllReduce
from esper.leyline.container import Kernel
from esper.leyline.deviation import largest
from esper.leyline.errors import EsperError, KernelRejectedError
from esper.leyline.native import FASTER, Rung
from esper.leyline.runtime import NativeKernel, NativeModule, open_native

_EPS_LIMIT = 32.0
_TOLERANCE_FACTOR = 10.0
"""The report's tolerance is the largest deviation that Urabrask met; other inputs may deviate somewhat more."""
_OWN_SHARE = 1e-2
"""A gradient is held to at least this share of the largest one: below lies the rounding of larger sums."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A seed's kernel runs on this rung from now on."""

    layer: Layer
    seed: Seed
    rung: Rung
    reason: str


def open_checked(
    kernel: Kernel, module: Callable[[], nn.Module], device: torch.device, *, rest: Rest = never
) -> NativeKernel:
    """Opens the native code of a verified container, if it is worth it, and tries it against the module, once a
    process: a trial takes the processor from the trainer, and code that stays open stays what it was.

    Args:
        kernel: from a container whose signature and hashes were verified.
        module: gives the module of its IR, on `device`; asked only for a trial, which does not change it.
        device: where the host computes.
        rest: called between pieces of the work.

    Raises:
        KernelRejectedError: with the reason why the kernel runs from its IR.
    """
    facts = kernel.manifest.native
    if facts is None:
        words = next((check.detail for check in kernel.manifest.report.checks if check.name == "native"), "")
        raise KernelRejectedError(words or "it has no native code")
    if device.type != facts.target.device:
        raise KernelRejectedError(f"its native code is for {facts.target.device}, the host computes on {device.type}")
    if facts.timing is None or not facts.timing.is_faster:
        ratio = "an unknown share" if facts.timing is None else f"{facts.timing.ratio:.2f}"
        raise KernelRejectedError(f"its native code takes {ratio} of eager's time, which is not below {FASTER}")
    native = open_native(kernel.kernel_id, facts, kernel.payload)
    if not native.is_proven:
        rest()
        built = module()
        rest()
        _try(native, built, device, rest)
        native.is_proven = True
    return native


def _try(native: NativeKernel, module: nn.Module, device: torch.device, rest: Rest = never) -> None:
    """Computes outputs and gradients both ways, which also warms the code up.

    Raises:
        KernelRejectedError: if they deviate, or the code fails.
    """
    facts = native.facts
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, facts.dtype)
    moved = copy.deepcopy(module).requires_grad_()
    with torch.no_grad():
        for parameter in moved.parameters():
            # a last layer of zeros would hide all that lies before it
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    limit = max(_TOLERANCE_FACTOR * facts.tolerance, _EPS_LIMIT * torch.finfo(dtype).eps)
    run = NativeModule(native, moved)
    for batch in sorted({facts.min_batch, min(facts.min_batch + 1, facts.max_batch)}):
        h = torch.randn((batch, *facts.shape), generator=generator).to(device, dtype).requires_grad_()
        inputs = [h, *moved.parameters()]
        try:
            with torch.enable_grad():
                ours = run(h)
                rest()
                gradients = torch.autograd.grad(ours.sum(), inputs, materialize_grads=True, allow_unused=True)
        except RuntimeError as error:
            words = " ".join(str(error).split())[:300]
            raise KernelRejectedError(f"its native code fails: {words}") from error
        if run.fallback is not None:
            raise KernelRejectedError(run.fallback)
        rest()
        with torch.enable_grad():
            y = moved(h)
            rest()
            expected = torch.autograd.grad(y.sum(), inputs, materialize_grads=True, allow_unused=True)
        rest()
        most = largest(*(float(tensor.abs().max()) for tensor in expected))
        scales = [float(y.detach().abs().max()), *(max(float(t.abs().max()), _OWN_SHARE * most) for t in expected)]
        pairs = zip([ours.detach(), *gradients], [y.detach(), *expected], scales, strict=True)
        worst = largest(*(float((a - b).abs().max()) / max(scale, 1e-30) for a, b, scale in pairs))
        if worst > limit:
            raise KernelRejectedError(f"its native code deviates from its IR by {worst:.1e}, the limit is {limit:.1e}")


class Natives:
    """The seeds of a host that run native code, and those that are about to."""

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self._loading: dict[str, tuple[Layer, Seed, Future[NativeKernel]]] = {}
        self._is_used = False

    def __len__(self) -> int:
        """How many loads are under way."""
        return len(self._loading)

    def expect(self, layer: Layer, seed: Seed, future: Future[NativeKernel]) -> None:
        """Takes a load that is under way; `step` will put its result in place."""
        self.forget(seed)
        self._loading[seed.seed_id] = (layer, seed, future)

    def forget(self, seed: Seed) -> None:
        """Drops what is under way for a seed."""
        waiting = self._loading.pop(seed.seed_id, None)
        if waiting is not None:
            waiting[2].cancel()

    def forget_all(self) -> None:
        """Drops all that is under way."""
        for _, seed, _ in list(self._loading.values()):
            self.forget(seed)

    def place(
        self, layer: Layer, seed: Seed, native: NativeKernel | None, reason: str, mean: AllReduce | None
    ) -> Notice:
        """Puts native code in place if every rank has it (None: this one has not). Collective under DDP."""
        everywhere = native is not None
        if mean is not None:
            share = torch.tensor([float(everywhere)], device=_device(layer, seed))
            mean([share])
            everywhere = float(share) == 1.0
            if native is not None and not everywhere:
                native, reason = None, "another rank cannot run its native code"
        layer.put_native(seed, native)
        if native is None:
            return Notice(layer, seed, Rung.IR, reason)
        self._is_used = True
        return Notice(layer, seed, Rung.NATIVE, _praise(native))

    def step(self, mean: AllReduce | None) -> list[Notice]:
        """What changes before the next forward. Collective under DDP while something is loading."""
        notices: list[Notice] = []
        for seed_id, (layer, seed, future) in list(self._loading.items()):
            if self._all_done(future, layer, seed, mean):
                del self._loading[seed_id]
                native, reason = _outcome(future)
                notices.append(self.place(layer, seed, native, reason, mean))
                seed.native_wanted = None
        if self._is_used:
            notices += self._retreats()
        return notices

    def _all_done(self, future: Future[NativeKernel], layer: Layer, seed: Seed, mean: AllReduce | None) -> bool:
        if mean is None:
            return future.done()
        share = torch.tensor([float(future.done())], device=_device(layer, seed))
        mean([share])
        return float(share) == 1.0

    def _retreats(self) -> list[Notice]:
        """Native code that met what it does not compute gives its place up; that step ran from the IR already."""
        found: list[Notice] = []
        for layer in all_layers(self._layers):
            for seed in layer.seeds:
                native = layer.natives.get(seed.seed_id)
                if native is not None and native.conflict is not None:
                    layer.put_native(seed, None)
                    found.append(Notice(layer, seed, Rung.IR, native.conflict))
        return found


def _outcome(future: Future[NativeKernel]) -> tuple[NativeKernel | None, str]:
    try:
        return future.result(), ""
    except EsperError as error:  # whatever the hub or the checks said; a bug is raised as it is
        return None, str(error)


def _praise(native: NativeKernel) -> str:
    timing = native.facts.timing
    return f"{timing.ratio:.2f} of eager's time, deviation {native.facts.tolerance:.0e}" if timing is not None else ""


def _device(layer: Layer, seed: Seed) -> torch.device:
    parameter = next(layer.kernel(seed).parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
