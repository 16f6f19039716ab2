"""A host with sites: the handle that a trainer holds. It implements `esper.leyline.growth.Growable`.

The user's model stays what it is, with the same class and keys; wrapping gives it one child, `_esper`, and nothing
else. The handle delegates what people call on a model to that model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import inf, isfinite
from time import perf_counter
from typing import Any

import torch
from torch import nn

from esper.config import KasminaConfig
from esper.kasmina import snapshot
from esper.kasmina.cache import KernelCache
from esper.kasmina.layer import Layers, all_layers, layer_at, own_parameters, unobserved
from esper.kasmina.lifecycle import Lifecycle, Moment
from esper.kasmina.loader import KernelLoader
from esper.kasmina.neighbour import has_neighbours
from esper.kasmina.outputs import path_of
from esper.kasmina.probe import tensors_of
from esper.kasmina.reports import layer_report
from esper.kasmina.seed import Offer
from esper.kasmina.shadow import AllReduce, train_shadow
from esper.kasmina.sites import find_sites
from esper.kasmina.sums import Sums, merged
from esper.kasmina.tails import applies, find_tails
from esper.kasmina.watch import watched
from esper.leyline.blueprints import BlueprintIR
from esper.leyline.chains import Tail
from esper.leyline.compiled import is_wrapper, runs_compiled
from esper.leyline.errors import ConflictError, KernelFaultError
from esper.leyline.growth import PREFIX, Change, GrownSite, SeedView, ShadowStep, SiteTensor
from esper.leyline.kernels import SiteSignature
from esper.leyline.ports import AssetHub
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Evidence, KasminaControlCommand, LayerHealthReport


def wrap(
    model: nn.Module,
    *,
    example: tuple[Any, ...],
    sites: str | Sequence[str] = "auto",
    causal: bool = False,
    config: KasminaConfig | None = None,
    tails: Mapping[str, Tail] | None = None,
) -> Host:
    """Makes a model able to grow. Until it does, it computes exactly what it did, and is as fast.

    Args:
        model: any module; it keeps its class, its weights and its keys, and gets one child, `_esper` (which is the
            identity, should the model run through its own children as `nn.Sequential` does).
        example: positional inputs of the model, such as one batch; one forward finds the sites and changes nothing.
        sites: `auto` (block outputs), a module path, glob or class name, or several; of an output with several
            tensors one is named, as `blocks.0#0` (see `outputs`).
        causal: whether sequence sites may only look back, as in language models.
        config: limits and rates; `sites` there is not read.
        tails: by site, what the model computes from that site's tensor on: `tail(model, h, *inputs)`. It saves the rest
            of each replay of a kernel in TRAINING; see `esper.kasmina.tails`.

    Raises:
        SiteError: if a site does not exist or cannot carry a seed, or a tail does not put out what the model does.
        ConflictError: if the model is wrapped already, or is what `torch.compile(model)` returned.
    """
    if is_wrapper(model):
        raise ConflictError(
            "this is torch.compile's wrapper around a model, not the model",
            remedy="compile the model in place, model.compile(...), and hand over the model",
        )
    if hasattr(model, PREFIX):
        raise ConflictError("this model is wrapped already", remedy="use the handle that wrap() returned")
    wanted = sites if sites == "auto" else (sites,) if isinstance(sites, str) else tuple(sites)
    signatures = find_sites(model, example, sites=wanted, causal=causal)
    known = find_tails(model, example, signatures, tails or {})
    chosen = config or KasminaConfig()
    layers = Layers(signatures, num_chunks=chosen.chunks).train(model.training)
    model.add_module(PREFIX, layers)
    first = next(model.parameters(), None)
    if first is not None:
        layers.to(first.device)
    for layer in all_layers(layers):
        layer.tail = known.get(layer.site)
        if runs_compiled(model, layer.path):
            layer.fix(model.get_submodule(layer.path))
    return Host(model, layers, chosen)


class Host:
    """A wrapped model. See `Growable` for the order in which a trainer calls it."""

    def __init__(self, module: nn.Module, layers: Layers, config: KasminaConfig) -> None:
        self._module = module
        self._layers = layers
        self._life = Lifecycle(module, layers, config)
        self._observing = False
        self._replays = 0
        self.cache = KernelCache(config.cache_mb << 20)
        for layer in all_layers(layers):
            for _ in range(config.race):
                self._life.plant(layer)

    # ---- what people call on a model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Host({type(self._module).__name__}, sites={list(self.sites)})"

    @property
    def module(self) -> nn.Module:
        return self._module

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._module.parameters()

    def state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> Any:
        return self._module.load_state_dict(state, strict=strict)

    def train(self, mode: bool = True) -> Host:
        self._module.train(mode)
        return self

    def eval(self) -> Host:
        return self.train(mode=False)

    def to(self, *args: Any, **kwargs: Any) -> Host:
        """Moves or casts the model, and the optimizers of kernels in TRAINING with it."""
        self._module.to(*args, **kwargs)
        for layer in all_layers(self._layers):
            for seed in layer.candidates:
                if seed.optimizer is not None:
                    seed.optimizer.load_state_dict(seed.optimizer.state_dict())
        return self

    # ---- what the port asks

    @property
    def sites(self) -> Mapping[str, SiteSignature]:
        return {layer.site: layer.signature for layer in all_layers(self._layers)}

    @property
    def topology_version(self) -> int:
        return self._life.version

    @property
    def is_loading(self) -> bool:
        """Whether kernels, or their native code, are being loaded in the background."""
        return self._life.arrivals.is_loading

    def seeds(self) -> list[SeedView]:
        """All seeds, site by site in forward order, oldest first at each."""
        return [seed.view(layer.signature) for layer in all_layers(self._layers) for seed in layer.seeds]

    def live_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from own_parameters(self._module)
        blended = [(layer, seed) for layer in all_layers(self._layers) for seed in layer.blended()]
        for layer, seed in sorted(blended, key=lambda pair: pair[1].figure("graft_order")):
            for name, parameter in layer.kernel(seed).named_parameters():
                yield f"{PREFIX}.{layer.key}.{seed.seed_id}.{name}", parameter

    def grown_sites(self) -> Mapping[str, GrownSite]:
        found: dict[str, GrownSite] = {}
        for layer in all_layers(self._layers):
            if blended := layer.blended():
                parameters = tuple(p for seed in blended for p in layer.kernel(seed).parameters())
                found[layer.site] = GrownSite(layer.live, parameters)
        return found

    def watched(self) -> AbstractContextManager[Mapping[str, SiteTensor]]:
        return watched(self._module, self._layers)

    def share(self, mean: AllReduce, *, world: int, patience_s: float = inf) -> None:
        self._life.share(mean, world, patience_s)
        for layer in all_layers(self._layers):
            layer.is_shared = True

    def take_fault(self) -> str | None:
        faults = [layer.fault for layer in all_layers(self._layers) if layer.fault is not None]
        for layer in all_layers(self._layers) if faults else ():
            layer.fault = None
        return faults[0] if faults else None

    def prepare(self, step: int, *, epoch: int, steps_per_epoch: int, observe: bool, replays: int = 0) -> Change:
        change = self._life.step(Moment(self._life.moment.run_id, epoch, step), steps_per_epoch)
        if observe != self._observing:
            self._observe(observe)
        if replays or self._replays:
            self._keep(replays)
        return change

    def has_neighbours(self, site: str, ir: BlueprintIR) -> bool:
        return has_neighbours(self.module, path_of(site), ir, self.sites[site])

    def request_native(self, seed_id: str, kernel_id: str) -> None:
        layer, seed = self._life.find(seed_id)
        self._life.arrivals.request_native(layer, seed, kernel_id)

    def train_shadows(
        self,
        args: tuple[Any, ...],
        loss_of: Callable[[Any], torch.Tensor],
        *,
        all_reduce: AllReduce | None = None,
    ) -> ShadowStep:
        if not self._life.shadows:
            return ShadowStep()
        losses: dict[str, float] = {}
        seconds: dict[str, float] = {}
        starts = self._starts(args)
        with unobserved(self._layers):
            for layer, seed in self._life.shadows:
                if seed.fault:
                    continue
                began = perf_counter()
                try:
                    loss = train_shadow(
                        self._module, layer, seed, args, loss_of, start=starts.get(layer.site), all_reduce=all_reduce
                    )
                except KernelFaultError as error:
                    seed.fault = error.message
                    continue
                seconds[seed.seed_id] = perf_counter() - began
                if isfinite(loss):
                    losses[seed.seed_id] = loss
                    seed.losses = (seed.losses[0] + loss, seed.losses[1] + 1)
        return ShadowStep(losses, seconds)

    @contextmanager
    def shadowed(self, seed_id: str) -> Iterator[None]:
        layer, seed = self._life.find(seed_id)
        if seed.stage is not SeedStage.TRAINING:
            raise ConflictError(f"seed {seed_id} is {seed.stage}: only one in TRAINING has a shadow")
        with unobserved(self._layers), layer.shadow(seed, self._module.get_submodule(layer.path)):
            yield

    def record_evidence(self, seed_id: str, evidence: Evidence) -> None:
        """Keeps what was measured of a seed in TRAINING; its gate reads it at the end of the interval.

        Raises:
            ConflictError: in any other stage: the host may lean on the kernel, and worth cannot be told any more.
        """
        _, seed = self._life.find(seed_id)
        if seed.stage is not SeedStage.TRAINING:
            raise ConflictError(f"seed {seed_id} is {seed.stage}: evidence of worth is taken in TRAINING")
        seed.evidence = evidence

    def fault(self, seed_id: str, words: str) -> None:
        self._life.find(seed_id)[1].fault = words

    def close_epoch(self, *, run_id: str, epoch: int, step: int, val_loss: float | None) -> list[LayerHealthReport]:
        moment = Moment(run_id, epoch, step)
        self._life.close_interval(moment, val_loss)
        layers = all_layers(self._layers)
        reports = [
            layer_report(layer, sums, moment, self._life.gate) for layer, sums in zip(layers, self._sums(), strict=True)
        ]
        for layer in layers:
            layer.observer.reset()
            layer.meter.reset()
            for seed in layer.candidates:
                seed.losses = (0.0, 0)
        return reports

    def soundness(self) -> Mapping[str, tuple[int, int]]:
        found = {layer.site: layer.observer.sums() for layer in all_layers(self._layers)}
        return {site: (sums.samples, sums.skipped) for site, sums in found.items()}

    def check(self, command: KasminaControlCommand) -> str | None:
        return self._life.check(command)

    def apply(self, command: KasminaControlCommand, *, run_id: str, epoch: int, step: int) -> Change:
        return self._life.apply(command, Moment(run_id, epoch, step))

    def offer(
        self, seed_id: str, kernel_id: str, trial: Evidence | None, weights: Mapping[str, torch.Tensor] | None
    ) -> None:
        self._life.find(seed_id)[1].offer = None if trial is None else Offer(kernel_id, trial, weights)

    def kernel_weights(self, seed_id: str) -> dict[str, torch.Tensor]:
        layer, seed = self._life.find(seed_id)
        return {name: tensor.detach().clone() for name, tensor in layer.kernel(seed).state_dict().items()}

    def graft_now(self, seed_id: str, *, run_id: str, epoch: int, step: int, reason: str) -> Change:
        return self._life.graft_now(seed_id, reason, Moment(run_id, epoch, step))

    def growth_state(self) -> dict[str, Any]:
        return snapshot.save(self._life)

    def load_growth_state(self, state: Mapping[str, Any]) -> None:
        snapshot.restore(self._life, state)

    def configure(self, config: KasminaConfig) -> None:
        """Goes by these limits and rates from now on. `sites`, `chunks` and `race` stay as the model was wrapped."""
        self._life.configure(config)
        self.cache.resize(config.cache_mb << 20)

    # ---- kernels

    def cache_counts(self) -> tuple[int, int]:
        """See `Growable`."""
        return self.cache.hits, self.cache.misses

    def attach(self, hub: AssetHub, public_key: bytes, *, wait: bool, native: bool = True) -> None:
        """Says where kernels come from and whose signature they must bear.

        Args:
            hub: the asset hub.
            public_key: Ed25519, the raw 32 bytes, from the run's configuration.
            wait: GERMINATE loads at once and within the call (deterministic mode, DDP), not in the background.
            native: whether kernels may run native code (not in deterministic mode).
        """
        self.close()
        self._life.arrivals.loader = KernelLoader(hub, public_key, self.cache, native=native)
        self._life.arrivals.wait = wait
        self._life.restore_requests()

    def load_kernel(self, site: str, seed_id: str, kernel_id: str) -> SeedView:
        """Pulls a kernel, verifies it and puts it into a DORMANT seed, which becomes GERMINATED.

        Raises:
            NotFoundError: if there is no such site, seed or kernel, or no hub is attached.
            IllegalTransitionError: if the seed is not DORMANT.
            TamperedError, KernelRejectedError: if the kernel fails a check.
        """
        layer = layer_at(self._layers, site)
        seed = layer.seed(seed_id)
        self._life.load(layer, seed, kernel_id)
        return seed.view(layer.signature)

    def close(self) -> None:
        """Lets the loader's thread end. The model goes on as it is."""
        arrivals = self._life.arrivals
        arrivals.forget_all()
        if arrivals.loader is not None:
            arrivals.loader.close()
            arrivals.loader = None

    def _keep(self, replays: int) -> None:
        """Lets the sites at which kernels train leave their tensors, where it is known what follows them."""
        self._replays = replays
        training = {layer.site for layer, _ in self._life.shadows} if replays else set()
        for layer in all_layers(self._layers):
            on = layer.site in training and layer.tail is not None
            on = on and applies(self._module, layer.path, layer.hook_id)
            if on or layer.keeps:
                layer.keep(self._module.get_submodule(layer.path), on=on)

    def _starts(self, args: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        """By site, what the step's own forward left there for these inputs.

        Nothing where it cannot be told which forward that was: more of them than were announced, or another number of
        samples, as in an own loop that sums gradients over several forwards. Such a step is replayed whole.
        """
        inputs = next(tensors_of(args), None)
        starts: dict[str, torch.Tensor] = {}
        for layer in {layer.site: layer for layer, _ in self._life.shadows}.values():
            is_clear = layer.num_kept <= self._replays
            h = layer.kept()
            if h is not None and is_clear and inputs is not None and len(h) == len(inputs):
                starts[layer.site] = h
        return starts

    def _sums(self) -> list[Sums]:
        """What was sampled at each site since the last interval, over all ranks. Collective under DDP."""
        observers = [layer.observer for layer in all_layers(self._layers)]
        own = [observer.sums() for observer in observers]
        if self._life.mean is None:
            return own
        return merged(own, [observer.watched for observer in observers], self._life.mean, self._life.world)

    def _observe(self, observe: bool) -> None:
        self._observing = observe
        for layer in all_layers(self._layers):
            layer.observing = observe
            layer.sync(self._module.get_submodule(layer.path))
