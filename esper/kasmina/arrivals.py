"""Kernels on their way to the seeds of a host, and the native code that comes after them.

It loads, now or in the background, and puts what came in its place; it knows no stage and no command.
"""

from __future__ import annotations

from concurrent.futures import Future

import torch
from torch import nn

from esper.kasmina.layer import Layer, Layers
from esper.kasmina.loader import KernelLoader, LoadedKernel
from esper.kasmina.native import Natives, Notice
from esper.kasmina.neighbour import copy_neighbours
from esper.kasmina.seed import Seed
from esper.kasmina.shadow import AllReduce
from esper.leyline.errors import NotFoundError


class Arrivals:
    """What is under way.

    Attributes:
        loader: None while no asset hub is attached.
        wait: whether kernels are loaded within the command that asks for them.
        mean: averages figures over ranks in place, under DDP.
    """

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        self.loader: KernelLoader | None = None
        self.wait = True
        self.mean: AllReduce | None = None
        self._module = module
        self._loading: dict[str, Future[LoadedKernel]] = {}
        self._held: tuple[tuple[str, str], LoadedKernel] | None = None
        self._natives = Natives(layers)
        self._notices: list[Notice] = []

    def __len__(self) -> int:
        return len(self._loading)

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
            self._loading[seed.seed_id] = self.loader.request(seed.requested, layer.signature, self.device())

    def is_awaited(self, seed: Seed) -> bool:
        """Whether a kernel is under way for the seed."""
        return seed.seed_id in self._loading

    def has_come(self, seed: Seed) -> bool:
        """Whether the load for the seed has ended, well or not."""
        return self.is_awaited(seed) and self._loading[seed.seed_id].done()

    def collect(self, layer: Layer, seed: Seed) -> LoadedKernel:
        """Takes what has come for a seed.

        Raises:
            EsperError: what the loader raised.
        """
        loaded = self._loading.pop(seed.seed_id).result()
        copy_neighbours(self._module, layer.path, loaded.module, loaded.facts.ir)
        return loaded

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
            pending.cancel()
        self._natives.forget(seed)

    def forget_all(self) -> None:
        """Drops all that is under way."""
        for future in self._loading.values():
            future.cancel()
        self._loading.clear()
        self._held = None
        self._natives.forget_all()
