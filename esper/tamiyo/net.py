"""The policy's network: the encoder, a head for each part of a choice, a value, and an ensemble that knows its doubt.

A choice is drawn in parts: the operation, then what it is done to (a site for GERMINATE, then one of its kernels, then
the strategy; a seed for ADVANCE, CULL and FOSSILIZE). Its log-probability is the sum over the parts. Masks and the
floor (`NetShape.floor`) belong to the distributions themselves, so what is evaluated is what was drawn from.

The value head sees the graph alone: a baseline that knew the operation would explain its worth away. The ensemble
(`Outcomes`) does see the choice, forecasts what comes of it, and is trained apart (`calibration`).

Shapes: B observations of a batch, S sites, N seeds, K kernels, P options of chosen sites, D the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from esper.leyline import TamperedError
from esper.tamiyo.actions import STRATEGIES, WAIT, ActionChoice, Operation
from esper.tamiyo.batch import Batch, Targets, collate, options_of, targets_of
from esper.tamiyo.encoder import HIDDEN_SCORE, Encoded, Encoder, segment_log_softmax
from esper.tamiyo.features import SEED_FEATURES
from esper.tamiyo.observation import KERNEL_FEATURES, RUN_FEATURES, SITE_FEATURES, TENDED, Observation
from esper.tamiyo.outcomes import Outcomes
from esper.tamiyo.shape import NetShape

__all__ = ["Decided", "NetShape", "Observation", "PolicyNet", "collate"]


class Drawn(Enum):
    """What of a choice is left to chance: nothing, only what is done (without the floor), or every part of it."""

    NONE = 0
    OPERATION = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class Decided:
    """One choice and what it was drawn from.

    Attributes:
        log_prob: of the choice, under the distributions that it was drawn from.
        entropy: of the operation, and of what the other operations might have been done to; of kernel and strategy
            where they were chosen. Natural logarithm.
        value: what the value head expects of the run from here on.
        probabilities: by part: `operation`, then of the choice's own path `site`, `option`, `strategy` or `seed`, each
            over the observation's own places (`option`: over the site's options, in their order).
    """

    choice: ActionChoice
    log_prob: float
    entropy: float
    value: float
    probabilities: dict[str, np.ndarray]


@dataclass(frozen=True)
class Judged:
    """The distributions of a batch, as far as they do not depend on what is chosen: log-probabilities, with
    `HIDDEN_SCORE` and less for what is masked.
    """

    encoded: Encoded
    operation: Tensor  # (B, Operation)
    site: Tensor  # (S,)
    seed: Tensor  # (N, TENDED)
    value: Tensor  # (B,)


class PolicyNet(nn.Module):
    """See the module's text.

    Args:
        shape: hyper-parameters.
        seed: of the initial weights, which depend on nothing else.
    """

    def __init__(self, shape: NetShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        width = shape.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(shape)
            self.operation = _head(width, width, len(Operation))
            self.site = _head(2 * width, width, 1, bias=False)
            self.option = _head(3 * width, width, 1, bias=False)
            self.strategy = _head(3 * width, width, len(STRATEGIES))
            self.seed = _head(2 * width, width, len(TENDED), bias=False)
            self.value = _head(width, width, 1)
            self.outcomes = Outcomes(shape)

    # ------------------------------------------------------------ what is drawn

    @torch.no_grad()
    def act(self, batch: Batch, *, generator: torch.Generator | None = None, greedy: bool = False) -> list[Decided]:
        """Chooses for every observation of a batch.

        Args:
            batch: observations.
            generator: where chance comes from; None is torch's own.
            greedy: takes the most probable part each time instead, and draws nothing.

        Raises:
            FloatingPointError: if a probability is not finite.
        """
        drawn = Drawn.NONE if greedy else Drawn.ALL
        return self.decide(batch, self.judge(batch), [generator] * len(batch), [drawn] * len(batch))[0]

    def decide(
        self,
        batch: Batch,
        judged: Judged,
        generators: Sequence[torch.Generator | None],
        parts: Sequence[Drawn],
    ) -> tuple[list[Decided], Tensor]:
        """Chooses for every observation from its distributions; also returns the log-probabilities (B,) with their
        gradient, where one is kept. Each row has its own source of chance, and what is left to it; else as `act`.
        """
        drawn = [self._draw(batch, judged, row, generators[row], parts[row]) for row in range(len(batch))]
        targets = targets_of(batch, [choice for choice, _ in drawn])
        log_prob, entropy, value = self.score(batch, judged, targets)
        told = zip(drawn, log_prob.tolist(), entropy.tolist(), value.tolist(), strict=True)
        return [Decided(choice, p, doubt, worth, parts) for (choice, parts), p, doubt, worth in told], log_prob

    def evaluate(self, batch: Batch, choices: Sequence[ActionChoice]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log-probability, entropy and value of given choices, each (B,) and differentiable; see `Decided`.

        Raises:
            ValueError: if the masks of an observation do not allow its choice.
        """
        return self.score(batch, self.judge(batch), targets_of(batch, choices))

    def forecasts(self, batch: Batch, choices: Sequence[ActionChoice]) -> Tensor:
        """What each member of the ensemble expects to come of given choices: (B, members).

        The encoder and the heads get no gradient from it.

        Raises:
            ValueError: if the masks of an observation do not allow its choice.
        """
        with torch.no_grad():
            encoded = self.encoder(batch)
        return self.outcomes(chosen_features(batch, encoded, targets_of(batch, choices)))

    # ------------------------------------------------------------ distributions

    def judge(self, batch: Batch) -> Judged:
        """Encodes a batch, and returns the distributions that do not depend on a choice, and the value."""
        encoded = self.encoder(batch)
        num = len(batch)
        operation = torch.where(batch.operations, self.operation(encoded.graph), HIDDEN_SCORE).log_softmax(dim=1)
        operation = self._floored(operation, batch.operations.sum(dim=1)[:, None], batch.operations)
        scores = self.site(torch.cat([encoded.site, encoded.graph[batch.site_of]], dim=1))[:, 0]
        site = self._segments(scores, batch.can_germinate, batch.site_of, num)
        scores = self.seed(torch.cat([encoded.seed, encoded.graph[batch.seed_of]], dim=1))
        seed = self._segments(scores, batch.can, batch.seed_of, num)
        return Judged(encoded, operation, site, seed, self.value(encoded.graph)[:, 0])

    def score(self, batch: Batch, judged: Judged, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log-probability, entropy and value of choices, each (B,)."""
        rows = torch.arange(len(batch))
        log_prob = judged.operation[rows, targets.operation]
        chances = judged.operation.exp() * batch.operations
        entropy = _entropy(judged.operation, batch.operations).sum(dim=1)
        spread = _sums(_entropy(judged.site, batch.can_germinate), batch.site_of, len(batch))
        entropy = entropy + chances[:, Operation.GERMINATE] * spread
        spread = _sums(_entropy(judged.seed, batch.can), batch.seed_of, len(batch))
        entropy = entropy + (chances[:, list(TENDED)] * spread).sum(dim=1)
        tended = judged.seed[targets.seed, targets.column]
        log_prob = log_prob.index_add(0, targets.tending, tended)
        if len(targets.germinating):
            parts, doubt = self._begun(batch, judged, targets)
            log_prob = log_prob.index_add(0, targets.germinating, parts)
            entropy = entropy.index_add(0, targets.germinating, doubt)
        return log_prob, entropy, judged.value

    def _begun(self, batch: Batch, judged: Judged, targets: Targets) -> tuple[Tensor, Tensor]:
        """Log-probability of site, kernel and strategy of the germinating rows, and the entropy of the last two."""
        places, owner = options_of(batch, targets.site)
        options = self.options(batch, judged.encoded, targets.site, targets.germinating)
        chosen = torch.nonzero(places == targets.option[owner])[:, 0]
        kernels = batch.option_kernel[targets.option]
        ways = self.strategies(batch, judged.encoded, targets.site, targets.germinating, kernels)
        allowed = batch.strategies[kernels]
        log_prob = judged.site[targets.site] + options[chosen] + ways.gather(1, targets.strategy[:, None])[:, 0]
        everything = torch.ones_like(options, dtype=torch.bool)
        doubt = _sums(_entropy(options, everything), owner, len(targets.site)) + _entropy(ways, allowed).sum(dim=1)
        return log_prob, doubt

    def options(self, batch: Batch, encoded: Encoded, sites: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities of the kernels at chosen sites, one after the other: (P,); see `options_of`.

        Args:
            batch: observations.
            encoded: of them.
            sites: (G,) chosen sites.
            rows: (G,) the observation of each.
        """
        places, owner = options_of(batch, sites)
        kernels = encoded.kernel[batch.option_kernel[places]]
        seen = torch.cat([encoded.site[sites][owner], kernels, encoded.graph[rows][owner]], dim=1)
        every = torch.ones(len(places), dtype=torch.bool)
        return self._segments(self.option(seen)[:, 0], every, owner, len(sites))

    def strategies(self, batch: Batch, encoded: Encoded, sites: Tensor, rows: Tensor, kernels: Tensor) -> Tensor:
        """Log-probabilities of the strategies for chosen kernels (G,) at chosen sites: (G, STRATEGIES)."""
        allowed = batch.strategies[kernels]
        seen = torch.cat([encoded.site[sites], encoded.kernel[kernels], encoded.graph[rows]], dim=1)
        scores = torch.where(allowed, self.strategy(seen), HIDDEN_SCORE).log_softmax(dim=1)
        return self._floored(scores, allowed.sum(dim=1)[:, None], allowed)

    def _segments(self, scores: Tensor, mask: Tensor, owner: Tensor, size: int) -> Tensor:
        """Masked log-probabilities within segments: (E,), or (E, columns) with a distribution in each column."""
        log_p = segment_log_softmax(torch.where(mask, scores, HIDDEN_SCORE), owner, size)
        counts = torch.zeros((size, *mask.shape[1:])).index_add(0, owner, mask.float())
        return self._floored(log_p, counts[owner], mask)

    def _floored(self, log_p: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
        """Mixes in the even distribution over what the mask allows."""
        if self.shape.floor:
            even = np.log(self.shape.floor) - torch.log(counts.clamp_min(1.0))
            log_p = torch.logaddexp(log_p + np.log1p(-self.shape.floor), even.expand_as(log_p))
        return torch.where(mask, log_p, HIDDEN_SCORE)

    # ------------------------------------------------------------ one row

    def _draw(
        self, batch: Batch, judged: Judged, row: int, generator: torch.Generator | None, chance: Drawn
    ) -> tuple[ActionChoice, dict[str, np.ndarray]]:
        def drawn(log_p: Tensor, part: str) -> int:
            found[part] = np.exp(log_p.detach().double().numpy())
            return pick(found[part], part, generator, chance, floor=self.shape.floor)

        found: dict[str, np.ndarray] = {}
        operation = Operation(drawn(judged.operation[row], "operation"))
        if operation is Operation.WAIT:
            return WAIT, found
        if operation is not Operation.GERMINATE:
            start, end = batch.first_seed[row], batch.first_seed[row + 1]
            return ActionChoice(operation, seed=drawn(judged.seed[start:end, TENDED.index(operation)], "seed")), found
        start, end = batch.first_site[row], batch.first_site[row + 1]
        site = drawn(judged.site[start:end], "site")
        sites, rows = torch.tensor([start + site]), torch.tensor([row])
        nth = drawn(self.options(batch, judged.encoded, sites, rows), "option")
        option = int(batch.option_start[start + site]) + nth
        kernels = batch.option_kernel[option : option + 1]
        strategy = drawn(self.strategies(batch, judged.encoded, sites, rows, kernels)[0], "strategy")
        place = option - batch.first_option[row]
        return ActionChoice(operation, site=site, option=place, strategy=strategy), found

    # ------------------------------------------------------------ bytes

    def to_bytes(self) -> bytes:
        """Returns all weights as safetensors; those of the ensemble and its calibration among them."""
        return safetensors.torch.save({name: value.contiguous() for name, value in sorted(self.state_dict().items())})

    @classmethod
    def from_bytes(cls, weights: bytes, shape: NetShape) -> Self:
        """Reads what `to_bytes` wrote; the network is in evaluation mode.

        Raises:
            TamperedError: if the bytes are torn, of another shape, or hold a value that is not finite.
        """
        net = cls(shape)
        try:
            found = safetensors.torch.load(weights)
            net.load_state_dict(found)
        except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
            words = str(error).splitlines()[0]
            raise TamperedError(f"these are not the weights of a policy of this shape: {words}") from error
        broken = next((name for name, value in found.items() if not torch.isfinite(value).all()), None)
        if broken is not None:
            raise TamperedError(f"the policy's weights hold a value that is not finite, in {broken}")
        return net.eval()


def pick(p: np.ndarray, part: str, generator: torch.Generator | None, chance: Drawn, *, floor: float) -> int:
    """Returns a place by its probability, or the most probable.

    Args:
        p: probabilities.
        part: of the choice; see `Decided`.
        generator: where chance comes from; None is torch's own.
        chance: what is left to it.
        floor: the even share that is mixed into `p`: there to learn by, not to live by.

    Raises:
        FloatingPointError: if a probability is not finite.
    """
    if not np.isfinite(p).all() or not p.sum() > 0.0:
        raise FloatingPointError(f"the probabilities of the {part} are not finite")
    if chance is Drawn.NONE or (chance is Drawn.OPERATION and part != "operation"):
        return int(p.argmax())
    if chance is Drawn.OPERATION and p.max() < 1.0:
        p = np.maximum(p - floor / np.count_nonzero(p), 0.0)
    sums = np.cumsum(p)
    at = float(torch.rand((), generator=generator, dtype=torch.float64)) * sums[-1]
    return min(int(np.searchsorted(sums, at, side="right")), int(np.flatnonzero(p)[-1]))


def chosen_features(batch: Batch, encoded: Encoded, targets: Targets) -> Tensor:
    """What the ensemble sees of choices: graph, target, kernel and operation, (B, 3 D + Operation)."""
    blank = torch.zeros_like(encoded.graph)
    target = blank.index_add(0, targets.tending, encoded.seed[targets.seed])
    target = target.index_add(0, targets.germinating, encoded.site[targets.site])
    kernel = blank.index_add(0, targets.germinating, encoded.kernel[batch.option_kernel[targets.option]])
    operation = nn.functional.one_hot(targets.operation, len(Operation)).to(target.dtype)
    return torch.cat([encoded.graph, target, kernel, operation], dim=1)


FEATURES = {"site": SITE_FEATURES, "seed": SEED_FEATURES, "run": RUN_FEATURES, "kernel": KERNEL_FEATURES}
"""What each kind of node is described by."""


@torch.no_grad()
def forget(net: PolicyNet, seen: Mapping[str, np.ndarray]) -> list[str]:
    """Takes features out of a network, and returns their names as `kind.feature`.

    Args:
        net: changed in place. Where all of them were 0 in what it learned from, it chooses there as before.
        seen: by kind of node, (features,) bool: those that stay. A kind that is missing stays whole.
    """
    first: dict[str, nn.Linear] = {**net.encoder.enter, "kernel": net.encoder.kernel[0]}  # type: ignore[dict-item]
    gone: list[str] = []
    for kind, known in seen.items():
        first[kind].weight[:, torch.as_tensor(~known)] = 0.0
        gone += [f"{kind}.{name}" for name, stays in zip(FEATURES[kind], known.tolist(), strict=True) if not stays]
    return gone


def _head(into: int, width: int, out: int, *, bias: bool = True) -> nn.Sequential:
    """A small network; without a bias where its scores are compared with each other alone."""
    last = nn.Linear(width, out, bias=bias)
    nn.init.normal_(last.weight, std=0.01)  # the first policy chooses nearly evenly
    if bias:
        nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(into, width), nn.Tanh(), last)


def _entropy(log_p: Tensor, mask: Tensor) -> Tensor:
    """Each entry's part of the entropy; 0 for what is masked."""
    log_p = torch.where(mask, log_p, 0.0)
    return torch.where(mask, -log_p.exp() * log_p, 0.0)


def _sums(values: Tensor, owner: Tensor, size: int) -> Tensor:
    return values.new_zeros((size, *values.shape[1:])).index_add(0, owner, values)
