"""Trials by fork: what Tamiyo may ask for before an adaptation begins, and what it is told (docs/adr/0013).

Forks of a run start from one checkpoint, see the same data in the same order, and differ in one thing: one does not
grow, each of the others grows by one candidate. What a candidate's fork loses less on validation data is what its
growth causes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from esper.leyline.contract import Contract, Finite
from esper.leyline.evidence import BlendStrategy, Evidence


class TrialCandidate(Contract):
    """One way to grow.

    Attributes:
        seed_id: the dormant seed that takes the kernel.
        flops_per_sample: of the kernel, forward.
    """

    site: str
    seed_id: str
    kernel_id: str
    blueprint_id: str
    blueprint: str
    strategy: BlendStrategy = BlendStrategy.RAMP
    lr_factor: Annotated[Finite, Field(gt=0)] = 1.0
    num_parameters: Annotated[int, Field(ge=0)] = 0
    flops_per_sample: Annotated[int, Field(ge=0)] = 0

    @property
    def in_words(self) -> str:
        """Kernel, site and strategy."""
        return f"{self.blueprint} at {self.site} ({self.strategy})"


def key_of(candidate: TrialCandidate) -> str:
    """Names a candidate within its trial."""
    return f"{candidate.site}/{candidate.kernel_id}/{candidate.strategy}"


class TrialRequest(Contract):
    """Tamiyo asks for a trial.

    Attributes:
        epoch: after which.
        steps: that each fork trains.
        seeds: how many pairs of forks each candidate gets; all but the first see other orders of data.
    """

    trial_id: str
    epoch: Annotated[int, Field(ge=0)]
    candidates: Annotated[tuple[TrialCandidate, ...], Field(min_length=1)]
    steps: Annotated[int, Field(ge=1)]
    seeds: Annotated[int, Field(ge=1)] = 1

    @property
    def num_forks(self) -> int:
        """Those that grow, and those that do not."""
        return (len(self.candidates) + 1) * self.seeds


class TrialOutcome(Contract):
    """What one candidate came to.

    Attributes:
        evidence: of kind FORK, against the forks that did not grow; None where its forks failed.
        flops, seconds: of its forks.
        weights: sha256 of the weights that its fork of the first seed trained; None where it left none (`direct`).
        failure: why it is out; empty where it is not.
    """

    candidate: TrialCandidate
    evidence: Evidence | None = None
    flops: Annotated[int, Field(ge=0)] = 0
    seconds: Finite = 0.0
    weights: str | None = None
    failure: str = ""

    def low(self, z: float) -> float | None:
        """The lower end of the gain's interval of `z` standard errors; None without evidence."""
        return None if self.evidence is None else self.evidence.gain - z * self.evidence.stderr

    def in_words(self, z: float) -> str:
        """The candidate, and its gain with its interval, or why it has none."""
        if self.evidence is None:
            return f"{self.candidate.in_words} failed: {self.failure}"
        reach = z * self.evidence.stderr
        return f"{self.candidate.in_words} gained {self.evidence.gain:.4g} ± {reach:.2g}"


class TrialResult(Contract):
    """What a trial came to.

    Attributes:
        epoch: after which it was asked for.
        told: after which it ended.
        outcomes: one for each candidate, in the order of the request.
        flops, seconds: of all forks.
        failure: why it says nothing at all; empty where it does.
    """

    trial_id: str
    epoch: Annotated[int, Field(ge=0)]
    told: Annotated[int, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)]
    outcomes: tuple[TrialOutcome, ...] = ()
    flops: Annotated[int, Field(ge=0)] = 0
    seconds: Finite = 0.0
    failure: str = ""


HOST_FACTOR, KERNEL_FACTOR = 3, 4
"""A fork may cost so many times what the host costs for as many steps, its replay behind the host among them, and so
many forwards of its kernel for each sample: forward, both gradients, and what is not a product."""


class ForkPrice(Contract):
    """What a fork of a run costs.

    Attributes:
        step: FLOPs of an average step of the host so far.
        samples: of a step.
        validation: FLOPs of one validation of the host.
        val_samples: of it.
    """

    step: Annotated[int, Field(ge=0)]
    samples: Annotated[int, Field(ge=0)]
    validation: Annotated[int, Field(ge=0)]
    val_samples: Annotated[int, Field(ge=0)]

    def limit(self, steps: int, candidate: TrialCandidate | None) -> int:
        """FLOPs that a fork of so many steps may cost; it stops itself before it exceeds them."""
        kernel = 0 if candidate is None else candidate.flops_per_sample * (steps * self.samples + self.val_samples)
        return HOST_FACTOR * (steps * self.step + self.validation) + KERNEL_FACTOR * kernel


class TrialState(Contract):
    """What a run can say of trials when it asks for a decision.

    Attributes:
        idle: how many forks could begin at once; none: no trial now.
        flops_left: that a trial may cost.
        price: of a fork; None where there can be none.
        reason: why there can be none, in words.
        under_way: id of the trial that runs; empty for none.
        result: of one that has ended and about which nothing was decided yet.
    """

    idle: Annotated[int, Field(ge=0)] = 0
    flops_left: Annotated[int, Field(ge=0)] = 0
    price: ForkPrice | None = None
    reason: str = ""
    under_way: str = ""
    result: TrialResult | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """What one fork does.

    Attributes:
        fork_id: unique within the trial.
        candidate: None does not grow.
        seed: 0 goes on exactly as the run would; others draw their data and dropout anew.
        steps: that it trains.
        max_flops: it stops beyond them.
        behind, blending: steps in which its kernel trains behind the host, and is blended in; 0: their usual shares.
    """

    fork_id: str
    candidate: TrialCandidate | None
    seed: int
    steps: int
    max_flops: int
    behind: int = 0
    blending: int = 0


@dataclass(frozen=True, slots=True)
class ForkResult:
    """How a fork ended.

    Attributes:
        losses: of each validation sample, in order; empty where it failed.
        loss: their mean.
        flops, seconds: that it took; of one that was killed its limit, since nobody knows better.
        weights: of the kernel, as safetensors, from before it was grafted.
        failure: why it says nothing; empty where it does.
    """

    fork_id: str
    losses: tuple[float, ...] = ()
    loss: float = 0.0
    flops: int = 0
    seconds: float = 0.0
    weights: bytes | None = None
    failure: str = ""
