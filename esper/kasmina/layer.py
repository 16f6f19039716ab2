"""What stands at a site: the seeds of one layer, the modules of their kernels, and the one hook that applies them.

A layer is a child of the host's `_esper` module, so that `state_dict`, `to`, `train` and `deepcopy` reach the kernels.
The hook is a bound method of the layer and stands on the site only while there is something to do: a dormant layer
leaves no trace on the host's forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import _StopRecomputationError  # pyright: ignore[reportPrivateUsage] - it passes through
from torch.utils.hooks import RemovableHandle

from esper.kasmina.blending import blend
from esper.kasmina.meter import Meter
from esper.kasmina.observer import Observer
from esper.kasmina.outputs import part_of, path_of, put, take
from esper.kasmina.seed import KernelFacts, Seed
from esper.kasmina.table import SeedTable
from esper.leyline.chains import Tail
from esper.leyline.compiled import outside
from esper.leyline.errors import KernelFaultError, NotFoundError
from esper.leyline.growth import PREFIX
from esper.leyline.kernels import SiteSignature
from esper.leyline.runtime import NativeKernel, NativeModule
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import BlendStrategy


def key_of(site: str) -> str:
    """The site's name as a module key, which may hold no dot."""
    return site.replace(".", "/")


class Layer(nn.Module):
    """The seeds of one site, oldest first: fossils, and those that may still change.

    Attributes:
        path: of the module whose output the site is, or is a part of.
        observing: whether the next training forward takes health.
        meter: of what its kernels do on the live path; a rollback does not undo what they did.
        reach: norm of what the seed in GRAFTING would add at alpha = 1, as a share of the norm of h; taken at the first
            training forward after it was set to None, where the strategy goes by it.
        natives: by seed id, the native code that computes its kernel; it owns no parameters.
        tail: what the host computes from here on; None is not known.
        keeps: whether the training forwards leave what the site puts out, for `kept`.
        is_fixed: whether the hook stays on the site for good, outside of what the host's owner compiled.
        is_shared: whether other ranks take the same steps; then a live kernel that fails is stood in for.
        fault: how a live kernel failed that was stood in for.
    """

    def __init__(self, site: str, signature: SiteSignature, *, num_chunks: int = 1) -> None:
        super().__init__()
        self.site = site
        self.path = path_of(site)
        self._part = part_of(site)
        self.signature = signature
        self.table = SeedTable()
        self.seeds: list[Seed] = []
        self.observer = Observer(site, signature, num_chunks=num_chunks)
        self.observing = False
        self.meter = Meter()
        self.reach: torch.Tensor | None = None
        self.natives: dict[str, NativeModule] = {}
        self._place = torch.empty(0)
        self.tail: Tail | None = None
        self.keeps = False
        self._kept: deque[torch.Tensor] = deque()
        self._shadow: Seed | None = None
        self._handle: RemovableHandle | None = None
        self.is_fixed = False
        self.is_shared = False
        self.fault: str | None = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Layer:
        """As the module moves, so do the figures of its seeds and its site; their precision stays what it is."""
        super()._apply(fn, recurse)
        device = fn(self._place).device
        if device != self._place.device:
            self._place = torch.empty(0, device=device)
            self.table.to(device)
            self.observer.to(device)
        return self

    # ---- seeds and kernels

    @property
    def key(self) -> str:
        """Its name among the host's layers."""
        return key_of(self.site)

    @property
    def candidates(self) -> list[Seed]:
        """The seeds that may still change: all but the fossils. Where they race, several train at once."""
        return [seed for seed in self.seeds if seed.stage is not SeedStage.FOSSILIZED]

    def rivals(self, seed: Seed) -> list[Seed]:
        """The other candidates that have begun."""
        return [other for other in self.candidates if other is not seed and other.stage.is_active]

    def plant(self, seed_id: str) -> Seed:
        """Sets a DORMANT seed on top."""
        seed = Seed(seed_id, self.site, self.table, self.table.append())
        self.seeds.append(seed)
        return seed

    def seed(self, seed_id: str) -> Seed:
        """Returns the seed of this id; raises `NotFoundError` if the site has none."""
        for seed in self.seeds:
            if seed.seed_id == seed_id:
                return seed
        known = ", ".join(seed.seed_id for seed in self.seeds)
        raise NotFoundError(f"site {self.site} has no seed {seed_id}", remedy=f"it has {known}")

    def has_kernel(self, seed: Seed) -> bool:
        """Whether the seed's kernel is here."""
        return seed.seed_id in self._modules

    def kernel(self, seed: Seed) -> nn.Module:
        """The module of a seed's kernel; raises `NotFoundError` if it has none."""
        if not self.has_kernel(seed):
            raise NotFoundError(f"seed {seed.seed_id} of site {self.site} has no kernel")
        return self.get_submodule(seed.seed_id)

    def put_kernel(self, seed: Seed, facts: KernelFacts, module: nn.Module) -> None:
        """Gives a seed its kernel, closed to autograd and in the host's training mode."""
        seed.facts = facts
        self.put_native(seed, None)
        self.add_module(seed.seed_id, module.requires_grad_(requires_grad=False).train(self.training))

    def put_native(self, seed: Seed, kernel: NativeKernel | None) -> None:
        """Lets native code compute the seed's kernel from the next forward on; None: its module does, from its IR."""
        if kernel is None:
            self.natives.pop(seed.seed_id, None)
        else:
            self.natives[seed.seed_id] = NativeModule(kernel, self.kernel(seed))
        seed.native = None if kernel is None else kernel.name

    def take_kernel(self, seed: Seed) -> tuple[nn.Parameter, ...]:
        """Removes a seed's kernel, if it has one, and returns the parameters that were open to the optimizer."""
        if not self.has_kernel(seed):
            return ()
        parameters = tuple(p for p in self.kernel(seed).parameters() if p.requires_grad)
        self.put_native(seed, None)
        del self._modules[seed.seed_id]
        return parameters

    def clear(self) -> None:
        """Forgets all seeds and kernels, without a word to anyone: what follows is a restore."""
        self.seeds = []
        self.reach = None
        self.natives.clear()
        self._modules.clear()

    def blended(self) -> list[Seed]:
        """The seeds whose kernels are on the live path, in graft order."""
        found = [seed for seed in self.seeds if seed.stage.is_blended]
        return sorted(found, key=lambda seed: seed.figure("graft_order")) if len(found) > 1 else found

    # ---- the forward

    @contextmanager
    def shadow(self, seed: Seed, site: nn.Module) -> Iterator[None]:
        """Within it, the site's output runs through this seed's kernel too, cut off from what lies upstream."""
        self._shadow = seed
        self.sync(site)
        try:
            yield
        finally:
            self._shadow = None
            self.sync(site)

    def keep(self, site: nn.Module, *, on: bool) -> None:
        """Whether the training forwards from now on leave what the site puts out, one tensor each, for `kept`."""
        self.keeps = on
        self._kept.clear()
        self.sync(site)

    @property
    def hook_id(self) -> int | None:
        """Of its hook on the site; None while it has none there."""
        return None if self._handle is None else self._handle.id

    @property
    def num_kept(self) -> int:
        """Tensors that forwards left."""
        return len(self._kept)

    def kept(self) -> torch.Tensor | None:
        """The oldest tensor that a forward left, and takes it away; None if there is none."""
        return self._kept.popleft() if self._kept else None

    def fix(self, site: nn.Module) -> None:
        """Puts the hook on the site for good, for a host that its owner compiled (docs/adr/0008).

        What was compiled knows of the hook's call, and nothing of what it does: that may change without a recompile.
        """
        self.is_fixed = True
        # a partial, so that a copy of the host gets a hook of its own layer
        self._handle = site.register_forward_hook(partial(outside(_call), self))

    def sync(self, site: nn.Module) -> None:
        """Puts the hook on the site if there is something to do there, and else takes it off."""
        if self.is_fixed:
            return
        steps = self.observing or self.keeps or self._shadow is not None
        busy = steps or any(seed.stage.is_blended for seed in self.seeds)
        if busy and self._handle is None:
            self._handle = site.register_forward_hook(self.on_output)
        elif not busy and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def release(self) -> None:
        """Takes the hook off for good: what remains of the site is the host's own."""
        self.is_fixed = False
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_output(self, _site: nn.Module, _args: Any, output: Any) -> Any:
        """The hook: what the site puts out, grown."""
        return put(output, self._part, self._grown(self.own(output)))

    def _grown(self, h: torch.Tensor) -> torch.Tensor:
        """What the site puts out for the host's own tensor."""
        h = self.live(h)
        if self._shadow is not None:
            return self.behind(self._shadow, h.detach())
        if self.training and torch.is_grad_enabled():
            if self.keeps and not _in_backward():
                self._kept.append(h.detach().clone())  # the host may overwrite it
            if self.observing:
                self.observer.watch(h)
        return h

    def live(self, h: torch.Tensor) -> torch.Tensor:
        """What goes on behind the seeds on the live path, for the host's own tensor."""
        for seed in self.blended():
            h = self._live(seed, h)
        return h

    def own(self, output: Any) -> torch.Tensor:
        """The site's tensor out of what its module put out."""
        return take(output, self._part)

    def _live(self, seed: Seed, h: torch.Tensor) -> torch.Tensor:
        """What goes on behind a blended seed.

        Where the kernel fails on one of several ranks, the others wait for this rank's gradients in the backward, its
        kernel's too. So the step goes on as if the kernel put out nothing; it will be undone once all ranks know.
        """
        try:
            sampled = self.observing and self.training and torch.is_grad_enabled()
            y = self.meter.run(seed.seed_id, partial(self._output, seed, h), h.device if sampled else None)
            return self._through(seed, h, y, seed.alpha)
        except KernelFaultError as error:
            if not (self.is_shared and torch.is_grad_enabled()):
                raise
            self.fault = self.fault or str(error)
            return h + sum((0.0 * parameter.sum()).to(h.dtype) for parameter in self.kernel(seed).parameters())

    def behind(self, seed: Seed, h: torch.Tensor) -> torch.Tensor:
        """What the site puts out with a seed in TRAINING on top of the tensor `h`, which is cut off from the host."""
        blended = self._through(seed, h, self._output(seed, h), 1.0)
        if torch.is_grad_enabled() and not blended.requires_grad and any(True for _ in self.kernel(seed).parameters()):
            raise KernelFaultError("its output depends on none of its weights", field=seed.seed_id)
        return blended

    def _output(self, seed: Seed, h: torch.Tensor) -> torch.Tensor:
        """What the seed's kernel puts out.

        Raises:
            KernelFaultError: if it raises, or puts out another shape. Whatever it does is not the host's fault.
        """
        native = self.natives.get(seed.seed_id)
        try:
            y = self.get_submodule(seed.seed_id)(h) if native is None else native(h)
        except _StopRecomputationError:
            raise  # activation checkpointing has seen all that it needs; no fault of the kernel
        except Exception as error:
            raise KernelFaultError(f"it raised {type(error).__name__}: {error}", field=seed.seed_id) from error
        if y.shape != h.shape:
            raise KernelFaultError(f"it put out {tuple(y.shape)} for {tuple(h.shape)}", field=seed.seed_id)
        return y

    def _through(self, seed: Seed, h: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
        assert seed.facts is not None
        if self.reach is None and self.training and torch.is_grad_enabled() and _goes_by_drift(seed):
            added = y.detach() - h.detach() if seed.facts.replaces else y.detach()
            self.reach = added.double().norm() / h.detach().double().norm().clamp_min(1e-12)
        return blend(h, y, alpha, replaces=seed.facts.replaces)


def _call(layer: Layer, site: nn.Module, args: Any, output: Any) -> Any:
    return layer.on_output(site, args, output)


def _in_backward() -> bool:
    """Whether this forward is one that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001 - torch has no public question


def _goes_by_drift(seed: Seed) -> bool:
    return seed.strategy is BlendStrategy.DRIFT_CONTROLLED and seed.stage is SeedStage.GRAFTING


class Layers(nn.Module):
    """The host's `_esper` child: all layers, by key, in forward order.

    Its forward is the identity, so that a host which runs through its own children (`nn.Sequential`) is unharmed. It
    has no methods of its own: they would take names from sites.
    """

    def __init__(self, sites: Mapping[str, SiteSignature], *, num_chunks: int = 1) -> None:
        super().__init__()
        for site, signature in sites.items():
            self.add_module(key_of(site), Layer(site, signature, num_chunks=num_chunks))

    def forward(self, x: Any) -> Any:
        """Returns what it is given."""
        return x

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # a checkpoint of the host alone says nothing of the kernels: they stay as they are, and nothing is missing.
        # torch hands the children what is in this very dictionary
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def all_layers(layers: Layers) -> list[Layer]:
    """The layers in forward order."""
    return [layer for layer in layers.children() if isinstance(layer, Layer)]


def layer_at(layers: Layers, site: str) -> Layer:
    """Returns the layer at a site; raises `NotFoundError` if there is none."""
    for layer in all_layers(layers):
        if layer.site == site:
            return layer
    known = ", ".join(layer.site for layer in all_layers(layers))
    raise NotFoundError(f"no site {site!r} in this host", remedy=f"it has {known}")


@contextmanager
def unobserved(layers: Layers) -> Iterator[None]:
    """Within it, no layer takes health or keeps what passes: the forward is not the host's own."""
    modes = [(layer, layer.observing, layer.keeps) for layer in all_layers(layers)]
    for layer, _, _ in modes:
        layer.observing = layer.keeps = False
    try:
        yield
    finally:
        for layer, observing, keeps in modes:
            layer.observing, layer.keeps = observing, keeps


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The host's parameters without those of seeds."""
    return ((name, p) for name, p in module.named_parameters() if not name.startswith(f"{PREFIX}."))
