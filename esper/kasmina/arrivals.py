"""Kernels on their way to the seeds of a host, and the native code that comes after them.

It loads, now or in the background, and puts what came in its place; it knows no stage and no command.
"""

from __future__ import annotations

import logging
import math
import time
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import nn

from esper.kasmina.layer import Layer, Layers
from esper.kasmina.loader import KernelLoader, LoadedKernel
from esper.kasmina.native import Natives, Notice
from esper.kasmina.neighbour import copy_neighbours
from esper.kasmina.seed import Seed
from esper.kasmina.shadow import AllReduce
from esper.leyline.errors import EsperError, NotFoundError, UnavailableError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Load:
    """A kernel that is being loaded since a moment of `time.monotonic`."""

    future: Future[LoadedKernel]
    since: float


class Arrivals:
    """What is under way.

    Attributes:
        loader: None while no asset hub is attached.
        wait: whether kernels are loaded within the command that asks for them.
        mean: averages figures over ranks in place, under DDP: a kernel has come once every rank has it.
        patience_s: after so long a rank whose kernel has not come makes all go on without it.
    """

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        self.loader: KernelLoader | None = None
        self.wait = True
        self.mean: AllReduce | None = None
        self.patience_s = math.inf
        self._module = module
        self._loading: dict[str, _Load] = {}
        self._held: tuple[tuple[str, str], LoadedKernel] | None = None
        self._natives = Natives(layers)
        self._notices: list[Notice] = []

    def __len__(self) -> int:
        return len(self._loading)

    @property
    def is_loading(self) -> bool:
        """Whether a kernel, or native code, is under way."""
        return bool(self._loading) or len(self._natives) > 0

    def device(self) -> torch.device:
        """Where the host's weights lie."""
        parameter = next(self._module.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")

    # ---- kernels

    def hold(self, layer: Layer, kernel_id: str) -> None:
        """Loads a kernel for a site and holds it until it is taken, or another one is held, or the next step.

        Whoever has said that it has a kernel must not have to ask for it again, whatever the cache keeps.

        Raises:
            EsperError: what the loader raises.
        """
        self._held = None
        self._held = ((layer.site, kernel_id), self._load(layer, kernel_id))

    def take(self, layer: Layer, kernel_id: str) -> LoadedKernel:
        """The kernel that is held for the site, or else a load of it.

        Raises:
            EsperError: what the loader raises.
        """
        held, self._held = self._held, None
        if held is not None and held[0] == (layer.site, kernel_id):
            return held[1]
        return self._load(layer, kernel_id)

    def request(self, layer: Layer, seed: Seed) -> None:
        """Loads the kernel that a seed asked for in the background."""
        if self.loader is not None and seed.requested is not None:
            future = self.loader.request(seed.requested, layer.signature, self.device())
            self._loading[seed.seed_id] = _Load(future, time.monotonic())

    def is_awaited(self, seed: Seed) -> bool:
        """Whether a kernel is under way for the seed."""
        return seed.seed_id in self._loading

    def collect(self, layer: Layer, seed: Seed) -> LoadedKernel | EsperError | None:
        """What has come for a seed, or why it will not come; None while that is not known. Collective under DDP: what
        does not come to one rank comes to none.
        """
        load = self._loading[seed.seed_id]
        own = _result(load.future) if load.future.done() else None
        if self.mean is None:
            outcome = own
        else:
            is_late = own is None and time.monotonic() - load.since > self.patience_s
            failed = isinstance(own, EsperError)
            shares = torch.tensor([float(own is not None), float(failed), float(is_late)], device=self.device())
            self.mean([shares])
            come, refused, late = shares.tolist()
            outcome = _together(own, all_came=come == 1.0, some_refused=refused > 0.0, some_late=late > 0.0)
        if outcome is None:
            return None
        self._loading.pop(seed.seed_id).future.cancel()
        if isinstance(outcome, LoadedKernel):
            try:
                copy_neighbours(self._module, layer.path, outcome.module, outcome.facts.ir)
            except EsperError as error:
                return error
        return outcome

    def put(self, layer: Layer, seed: Seed, loaded: LoadedKernel) -> None:
        """Gives a seed its kernel, and the native code that came with it."""
        layer.put_kernel(seed, loaded.facts, loaded.module)
        if loaded.native is not None or loaded.no_native:
            self._notices.append(self._natives.place(layer, seed, loaded.native, loaded.no_native, self.mean))

    def _load(self, layer: Layer, kernel_id: str) -> LoadedKernel:
        if self.loader is None:
            raise NotFoundError("no asset hub is attached", remedy="call attach() first")
        loaded = self.loader.load(kernel_id, layer.signature, self.device())
        copy_neighbours(self._module, layer.path, loaded.module, loaded.facts.ir)
        return loaded

    # ---- native code

    def request_native(self, layer: Layer, seed: Seed, kernel_id: str) -> None:
        """Asks for native code for a seed's kernel; see `Growable.request_native`."""
        layer.kernel(seed)
        assert seed.facts is not None
        if self.loader is None:
            raise NotFoundError("no asset hub is attached", remedy="call attach() first")
        if kernel_id in (seed.native, seed.native_wanted):
            return
        seed.native_wanted = kernel_id
        self._natives.expect(layer, seed, self.loader.request_native(kernel_id, seed.facts, self.device()))

    def request_native_again(self, layer: Layer, seed: Seed) -> None:
        """Asks once more for the native code that a restored seed had, or had asked for."""
        if self.loader is not None and seed.facts is not None and seed.native_wanted and not seed.native:
            wanted, seed.native_wanted = seed.native_wanted, None
            self.request_native(layer, seed, wanted)

    def step(self) -> None:
        """Puts native code in its place before a forward. Collective under DDP while some is loading."""
        self._held = None
        self._notices += self._natives.step(self.mean)

    def take_notices(self) -> list[Notice]:
        """What became of native code since this was last asked."""
        notices, self._notices = self._notices, []
        return notices

    # ---- the end of a way

    def forget(self, seed: Seed) -> None:
        """Drops what is under way for a seed."""
        pending = self._loading.pop(seed.seed_id, None)
        if pending is not None:
            pending.future.cancel()
        self._natives.forget(seed)

    def forget_all(self) -> None:
        """Drops all that is under way."""
        for load in self._loading.values():
            load.future.cancel()
        self._loading.clear()
        self._held = None
        self._natives.forget_all()


def _result(future: Future[LoadedKernel]) -> LoadedKernel | EsperError:
    try:
        return future.result()
    except EsperError as error:  # whatever the hub or the checks said; a bug is raised as it is
        return error


def _together(
    own: LoadedKernel | EsperError | None, *, all_came: bool, some_refused: bool, some_late: bool
) -> LoadedKernel | EsperError | None:
    """What a rank takes for its outcome, so that all take a kernel or none does; None: not known yet."""
    if isinstance(own, EsperError) and (some_refused or all_came):
        _LOG.warning("kernel.refused", extra={"reason": str(own)})  # rank 0 tells the run, and may know less
    if some_refused:
        return own if isinstance(own, EsperError) else UnavailableError("another worker cannot take it in")
    if some_late:
        return UnavailableError("it did not come to every worker in time")
    return own if all_came else None
