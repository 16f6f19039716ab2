"""One seed: its place in its layer's table, its kernel, and what is known of both.

A seed knows its own stage and how to leave it; it does not know when (gates), on whose word (commands) or what its
site does with it (the layer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from esper.kasmina.table import SeedTable
from esper.leyline.blueprints import BlueprintIR
from esper.leyline.contract import Contract
from esper.leyline.errors import KernelRejectedError
from esper.leyline.growth import SeedView
from esper.leyline.kernels import SiteSignature
from esper.leyline.seeds import SeedStage, advance
from esper.leyline.signals import BlendStrategy, Evidence, StageSpan


class KernelFacts(Contract):
    """What is known of a kernel that passed the loader's checks; enough to build its module again."""

    kernel_id: str
    blueprint: str
    blueprint_id: str
    ir: BlueprintIR
    signature: SiteSignature
    num_parameters: Annotated[int, Field(ge=0)]
    flops_per_sample: Annotated[int, Field(ge=0)]
    replaces: bool = False
    zero_at_birth: bool = False


@dataclass(frozen=True, slots=True)
class Offer:
    """What a fork found out about a kernel.

    Attributes:
        kernel_id: of which.
        trial: what the fork came to.
        weights: that the kernel begins with; None are its own.
    """

    kernel_id: str
    trial: Evidence
    weights: Mapping[str, torch.Tensor] | None = None

    def give_to(self, module: nn.Module) -> None:
        """Puts the weights into a kernel's module.

        Raises:
            KernelRejectedError: if they are not those of its design, or not finite.
        """
        if self.weights is None:
            return
        own = module.state_dict()
        if {name: (t.shape, t.dtype) for name, t in own.items()} != {
            name: (t.shape, t.dtype) for name, t in self.weights.items()
        }:
            raise KernelRejectedError("the weights that came from its trial are not those of its design")
        if not all(bool(tensor.isfinite().all()) for tensor in self.weights.values()):
            raise KernelRejectedError("the weights that came from its trial are not finite")
        module.load_state_dict(self.weights)


@dataclass(frozen=True, slots=True)
class Retirement:
    """A retirement under way: the alpha it started from, and why."""

    from_alpha: float
    reason: str


class Seed:
    """A seed at a site. Figures live in the layer's table; the rest lives here.

    Attributes:
        evidence: what was measured of its worth (`SHADOW`, or `NONE` for `direct`).
        harm: the last comparison with the pre-graft level in the present stage.
        baseline: validation loss before its graft.
        val_finite: whether the last validation loss since its graft was finite.
        native: id of the kernel whose native code computes it; None where it runs from its IR.
        native_wanted: id of the one that was asked for.
        optimizer: of the kernel, while it is in TRAINING.
        losses: sum and count of the shadow's losses since the last interval.
        fault: how its kernel failed in use; empty while it did not.
        trace_id: the id of the command that began its present life.
        offer: what a trial found out about the kernel that is to come.
        trial: what the kernel's fork came to, in its present life.
    """

    def __init__(self, seed_id: str, site: str, table: SeedTable, row: int) -> None:
        self.seed_id = seed_id
        self.site = site
        self.table = table
        self.row = row
        self.strategy = BlendStrategy.RAMP
        self.lr_factor = 1.0
        self.requested: str | None = None
        self.requested_blueprint: str | None = None
        self.facts: KernelFacts | None = None
        self.spans: list[StageSpan] = []
        self.evidence: Evidence | None = None
        self.harm: Evidence | None = None
        self.baseline: float | None = None
        self.val_finite = True
        self.retirement: Retirement | None = None
        self.native: str | None = None
        self.native_wanted: str | None = None
        self.optimizer: torch.optim.AdamW | None = None
        self.losses: tuple[float, int] = (0.0, 0)
        self.fault = ""
        self.trace_id = ""
        self.reason = ""
        self.offer: Offer | None = None
        self.trial: Evidence | None = None

    @property
    def stage(self) -> SeedStage:
        return SeedStage.from_code(int(self.table.get("stage", self.row)))

    @property
    def alpha(self) -> float:
        return float(self.table.get("alpha", self.row))

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.table.set("alpha", self.row, value)

    def figure(self, field: str) -> int:
        """An integer field of its row."""
        return int(self.table.get(field, self.row))

    def put(self, field: str, value: int) -> None:
        """Writes an integer field of its row."""
        self.table.set(field, self.row, value)

    def enter(self, stage: SeedStage, reason: str, *, clock: int) -> None:
        """Goes to `stage` and closes the span of the one it leaves; `clock` counts the host's steps.

        Raises:
            IllegalTransitionError: if the table has no such arrow.
        """
        old = self.stage
        advance(old, stage)
        if stage is SeedStage.DORMANT:
            self._forget()
        else:
            steps = clock - self.figure("entered")
            self.spans.append(StageSpan(stage=old, epochs=self.figure("epochs"), steps=steps))
        self.put("stage", stage.code)
        self.put("epochs", 0)
        self.put("entered", clock)
        self.harm = None
        self.reason = reason

    def mean_loss(self) -> float | None:
        """Mean of the shadow's losses since the last interval; None if there was none."""
        total, count = self.losses
        return total / count if count else None

    def view(self, signature: SiteSignature) -> SeedView:
        """The seed as others see it; `evidence` is that of its worth."""
        facts = self.facts
        return SeedView(
            seed_id=self.seed_id,
            site=self.site,
            signature=signature,
            stage=self.stage,
            alpha=self.alpha,
            strategy=self.strategy,
            lr_factor=self.lr_factor,
            blueprint=facts.blueprint if facts else self.requested_blueprint,
            blueprint_id=facts.blueprint_id if facts else None,
            kernel_id=facts.kernel_id if facts else self.requested,
            num_parameters=facts.num_parameters if facts else 0,
            flops_per_sample=facts.flops_per_sample if facts else 0,
            epochs_in_stage=self.figure("epochs"),
            spans=tuple(self.spans),
            evidence=self.evidence,
            reason=self.reason,
            native=self.native,
            trace_id=self.trace_id,
            fault=self.fault,
            trial=self.trial,
        )

    def begin_training(self, module: nn.Module, learning_rate: float) -> None:
        """Gives the kernel its own optimizer. Its parameters stay closed to autograd: only the shadow trains them."""
        parameters = list(module.parameters())
        # a design without parameters has nothing to train, and no optimizer takes an empty list
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True) if parameters else None

    def drop_kernel(self) -> None:
        """Lets go of all that belongs to a blended or trained kernel, but keeps what people read."""
        self.optimizer = None
        self.retirement = None
        self.native = self.native_wanted = None
        self.alpha = 0.0
        self.put("ramp_done", 0)
        self.put("ramp_total", 0)
        self.put("graft_order", 0)

    def _forget(self) -> None:
        """Becomes the blank seed that it was before its last life."""
        self.strategy = BlendStrategy.RAMP
        self.lr_factor = 1.0
        self.requested = self.requested_blueprint = self.facts = None
        self.spans = []
        self.evidence = self.baseline = self.trial = self.offer = None
        self.val_finite = True
        self.losses = (0.0, 0)
        self.fault = self.trace_id = ""
        self.put("errors", 0)
