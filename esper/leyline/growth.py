"""The seam between the trainer (Tolaria) and the layers that grow (Kasmina).

Tolaria owns the loop, the optimizer and time; Kasmina owns the sites, the seeds and their kernels. Tolaria calls, in
this order: `prepare` before each forward; the host's own forward, backward and optimizer step, untouched;
`train_shadows` after it; and at the end of an epoch `evidence` for every seed that wants some, `close_epoch` for
health and gates, and `apply` for each command. torch appears in annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from esper.leyline.blueprints import BlueprintIR
from esper.leyline.kernels import SiteSignature
from esper.leyline.native import RungChange
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import (
    BlendStrategy,
    Evidence,
    KasminaControlCommand,
    LayerHealthReport,
    LifecycleEvent,
    StageSpan,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIX = "_esper"
"""First part of the state-dict key of every tensor that belongs to a seed: `_esper.<site>.<seed>.<tensor>`."""

HEALTH_ROWS = 512
"""Rows (samples times positions) of a site's tensor whose variance and correlation a sampled step takes."""
HEALTH_CHANNELS = 64
"""Channels whose correlations are watched; more are sampled evenly."""
PROBE_FEATURES = 32
"""Features of the made-up kernel with which the growth potential is measured."""


ELSEWHERE = "it failed on another worker"
"""The fault of a seed whose kernel failed on another rank; in what words, that rank says."""


@dataclass(frozen=True, slots=True)
class SeedView:
    """One seed as others see it. Costs are those of its kernel, 0 without one.

    Attributes:
        lr_factor: its learning rate on the live path, as a factor of the host's.
        native: id of the kernel whose native code computes it; None where it runs from its IR.
        trace_id: of the adaptation under way: the id of the command that began it; empty without one.
        trial: what its fork came to, where the adaptation has won a trial.
        fault: how its kernel failed in use; empty while it did not.
    """

    seed_id: str
    site: str
    signature: SiteSignature
    stage: SeedStage
    alpha: float = 0.0
    strategy: BlendStrategy = BlendStrategy.RAMP
    lr_factor: float = 1.0
    blueprint: str | None = None
    blueprint_id: str | None = None
    kernel_id: str | None = None
    num_parameters: int = 0
    flops_per_sample: int = 0
    epochs_in_stage: int = 0
    spans: tuple[StageSpan, ...] = ()
    evidence: Evidence | None = None
    reason: str = ""
    native: str | None = None
    trace_id: str = ""
    fault: str = ""
    trial: Evidence | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What a call did to the seeds.

    Attributes:
        events: the transitions, in order; a refused command gives one event with `refused=True`.
        joined: (seed_id, parameters) that entered the live path and must enter the optimizer (and DDP).
        left: parameters that left the live path and must leave the optimizer.
        path_changed: whether the live path computes something else from now on (a graft or a removal).
        rungs: kernels that run from native code, or no longer do, from now on: the same function, up to rounding.
    """

    events: tuple[LifecycleEvent, ...] = ()
    joined: tuple[tuple[str, tuple[nn.Parameter, ...]], ...] = ()
    left: tuple[nn.Parameter, ...] = ()
    path_changed: bool = False
    rungs: tuple[RungChange, ...] = ()

    def __add__(self, other: Change) -> Change:
        return Change(
            self.events + other.events,
            self.joined + other.joined,
            self.left + other.left,
            self.path_changed or other.path_changed,
            self.rungs + other.rungs,
        )


@dataclass(frozen=True, slots=True)
class ShadowStep:
    """What one call of `train_shadows` did, for each seed in TRAINING: its finite loss at this batch, and seconds."""

    losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SiteTensor:
    """What the module at a site puts out in one forward, before any kernel: a tensor to which a gradient comes back."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class GrownSite:
    """A site with kernels on the live path.

    Attributes:
        forward: from the tensor of the site's own module to what goes on behind the site.
        parameters: of those kernels.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    parameters: tuple[nn.Parameter, ...]


class Growable(Protocol):
    """A host with sites. `module` is the user's own model with one child, `_esper`, that holds the kernels."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def sites(self) -> Mapping[str, SiteSignature]:
        """Site name (module path) to signature, in forward order."""
        ...

    @property
    def topology_version(self) -> int:
        """Grows whenever the live path or the set of shadows changes: what was counted per topology is stale."""
        ...

    def seeds(self) -> list[SeedView]: ...

    def live_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters on the live path: the host's own first, then those of blended seeds, oldest first."""
        ...

    def grown_sites(self) -> Mapping[str, GrownSite]:
        """By site, what stands there on the live path; none for a site whose kernels are not on it."""
        ...

    def watched(self) -> AbstractContextManager[Mapping[str, SiteTensor]]:
        """Within it, one forward and backward of the module: afterwards it holds, by site, what the site's own module
        put out. A site that ran more than once (recomputed activations), or to which no gradient came, is left out.
        """
        ...

    def cache_counts(self) -> tuple[int, int]:
        """Look-ups in the kernel cache so far: those that found their kernel, and those that did not."""
        ...

    def share(self, mean: Callable[[Sequence[torch.Tensor]], None], *, world: int, patience_s: float = inf) -> None:
        """Says how telemetry, and figures that steer the live path, are averaged over `world` ranks, in place, under
        DDP. Collective then: all ranks call `prepare` and `close_epoch` in the same order, and sample the same steps.
        A kernel that is loaded in the background is taken in by all at one step, or by none: if one rank refuses it,
        or has not got it after `patience_s`.
        """
        ...

    def take_fault(self) -> str | None:
        """How a kernel on the live path failed since this was last asked. Where figures are shared over ranks such a
        kernel raises nothing under autograd: its step goes on without it, lest the other ranks wait, and is to be
        undone by all of them together.
        """
        ...

    # ---- at a step

    def prepare(self, step: int, *, epoch: int, steps_per_epoch: int, observe: bool, replays: int = 0) -> Change:
        """Readies the forward of `step`: takes in kernels the loader has finished, sets alpha, and arms the taking
        of health on this step if `observe`. Never blocks, never compiles.

        Args:
            step: its number.
            epoch: of the run.
            steps_per_epoch: which ramps go by.
            observe: whether health is sampled.
            replays: forwards of this step, at most, whose batches `train_shadows` will be given, in the same order:
                what their sites put out is kept for it, where the host's owner has said what follows.
        """
        ...

    def train_shadows(
        self,
        args: tuple[Any, ...],
        loss_of: Callable[[Any], torch.Tensor],
        *,
        all_reduce: Callable[[Sequence[torch.Tensor]], None] | None = None,
    ) -> ShadowStep:
        """Trains every sound seed in TRAINING on one batch, behind the host: afterwards the host's weights, buffers,
        gradients, optimizer state and RNG are bit-identical to what they were.

        Args:
            args: positional inputs of the host.
            loss_of: outputs of the host to a scalar loss.
            all_reduce: averages kernel gradients over ranks in place, under DDP. A kernel that fails on one rank is
                faulty on all from this call on.
        """
        ...

    def has_neighbours(self, site: str, ir: BlueprintIR) -> bool:
        """Whether the host has, for every node of a design that starts from a neighbour, a layer to copy from."""
        ...

    def request_native(self, seed_id: str, kernel_id: str) -> None:
        """Asks for the native code of kernel `kernel_id`, which is of the same design and signature as the seed's. It
        is loaded and tried in the background; `prepare` puts it in place once it is ready, on all ranks at one step,
        or tells why not. Parameters stay the same objects.

        Raises:
            NotFoundError: if there is no such seed, or it has no kernel.
        """
        ...

    # ---- at an epoch

    def shadowed(self, seed_id: str) -> AbstractContextManager[None]:
        """Within it, a forward runs with this TRAINING seed fully blended in: for paired validation."""
        ...

    def record_evidence(self, seed_id: str, evidence: Evidence) -> None: ...

    def fault(self, seed_id: str, words: str) -> None:
        """Notes that a seed's kernel fails in use: its gate asks for removal, and it is trained no more. Under DDP all
        ranks must say so together.
        """
        ...

    def close_epoch(self, *, run_id: str, epoch: int, step: int, val_loss: float | None) -> list[LayerHealthReport]:
        """Ends the interval: health of each site from the sampled steps (of all ranks), evidence of harm for blended
        seeds from `val_loss`, and each seed's gate.
        """
        ...

    def soundness(self) -> Mapping[str, tuple[int, int]]:
        """For each site, of this interval and this rank: samples of health that were finite, and sampled steps that
        were not.
        """
        ...

    def check(self, command: KasminaControlCommand) -> str | None:
        """Why this command cannot be applied now; None if it can. Under DDP all ranks must agree before `apply`."""
        ...

    def apply(self, command: KasminaControlCommand, *, run_id: str, epoch: int, step: int) -> Change:
        """Carries out one command. A shut gate, or a kernel that is refused, gives an event with the reason.

        Raises:
            IllegalTransitionError: if the command asks for a step the table does not hold.
        """
        ...

    # ---- for trials by fork

    def offer(
        self, seed_id: str, kernel_id: str, trial: Evidence | None, weights: Mapping[str, torch.Tensor] | None
    ) -> None:
        """Says what a fork found out about a kernel that is about to germinate in a DORMANT seed.

        Args:
            seed_id: whose.
            kernel_id: another kernel than this takes nothing of it.
            trial: what the fork came to; None withdraws the offer.
            weights: that the kernel begins with, by name; where they do not fit, it is refused. None: its own.

        Raises:
            NotFoundError: if there is no such seed.
        """
        ...

    def kernel_weights(self, seed_id: str) -> dict[str, torch.Tensor]:
        """Copies of the weights of a seed's kernel, by name.

        Raises:
            NotFoundError: if there is no such seed, or it has no kernel.
        """
        ...

    def graft_now(self, seed_id: str, *, run_id: str, epoch: int, step: int, reason: str) -> Change:
        """In a fork: grafts a seed in TRAINING whatever its gate says: the fork is there to find out.

        Raises:
            IllegalTransitionError: from any other stage.
            NotFoundError: if there is no such seed.
        """
        ...

    # ---- for checkpoints and rollback

    def growth_state(self) -> dict[str, Any]:
        """Everything but the weights: stages, evidence, kernels' IR, seeds' optimizers. JSON values and tensors."""
        ...

    def load_growth_state(self, state: Mapping[str, Any]) -> None:
        """Rebuilds the topology of `state`; `module.load_state_dict(..., strict=True)` fits afterwards. All
        parameters of seeds are new objects: the caller rebuilds its optimizer.
        """
        ...
