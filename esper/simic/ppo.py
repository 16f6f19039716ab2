"""PPO (Schulman et al. 2017): the clipped surrogate with an adaptive KL penalty, a value loss, an entropy term and a
limit for harm. Knows no graph and no environment: it speaks to a net through `evaluate` alone.

The limit for harm is a Lagrangian (Ray, Achiam and Amodei 2019): harm has an advantage of its own, which counts against
that of the reward by a multiplier that rises while episodes do more harm than allowed, and falls while they do less.

Probability floors under masks are the net's own (`evaluate` gives the log-probabilities of what was sampled): with a
floor, no choice that the masks allow ever becomes impossible, which an entropy term alone does not prevent (fact 11).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from esper.simic.settings import PpoConfig

if TYPE_CHECKING:
    from torch import Tensor


class ActorCritic(Protocol):
    """A policy with a value that depends on what is seen alone, not on what is chosen."""

    def evaluate(self, batch: Any, choices: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log-probability of each choice, entropy and value, each (B,), differentiable."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


@dataclass(frozen=True)
class Samples:
    """Choices to learn from; arrays are (N,).

    Attributes:
        observations: what was seen.
        choices: what was chosen.
        log_probs: of the choice when it was made.
        advantages, returns: see `gae`.
        harms: advantages of harm; zeros where none is counted.
    """

    observations: Sequence[Any]
    choices: Sequence[Any]
    log_probs: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    harms: np.ndarray

    def __len__(self) -> int:
        return len(self.choices)


@dataclass(frozen=True, slots=True)
class Losses:
    """The parts of one minibatch's loss.

    Attributes:
        policy: the clipped surrogate, negated.
        value: mean squared error of the value.
        entropy: mean.
        kl: estimate of the divergence from the policy that chose, by mean of (ratio - 1 - log ratio): never negative.
        clipped: share of ratios beyond the clip.
    """

    policy: Tensor
    value: Tensor
    entropy: Tensor
    kl: Tensor
    clipped: float


def losses(
    net: ActorCritic, batch: Any, choices: Sequence[Any], old: Tensor, advantages: Tensor, returns: Tensor, clip: float
) -> Losses:
    """Returns the parts of the loss of a minibatch.

    Args:
        net: the policy.
        batch: what was seen.
        choices: what was chosen.
        old: (B,) its log-probability then.
        advantages: (B,).
        returns: (B,).
        clip: ratios beyond 1 - clip and 1 + clip gain nothing more.
    """
    log_probs, entropy, values = net.evaluate(batch, choices)
    log_ratios = log_probs - old
    ratios = log_ratios.exp()
    cut = ratios.clamp(1.0 - clip, 1.0 + clip)
    policy = -torch.minimum(ratios * advantages, cut * advantages).mean()
    kl = (ratios - 1.0 - log_ratios).mean()
    clipped = float(((ratios - 1.0).abs() > clip).float().mean())
    return Losses(policy, (values - returns).pow(2).mean(), entropy.mean(), kl, clipped)


@dataclass(frozen=True, slots=True)
class Report:
    """What one update did.

    Attributes:
        num_steps: optimizer steps.
        policy, value, entropy, kl, clipped: means over them.
        gradient: largest gradient norm before it was clipped.
        kl_weight, harm_weight: as they are from now on.
    """

    num_steps: int
    policy: float
    value: float
    entropy: float
    kl: float
    clipped: float
    gradient: float
    kl_weight: float
    harm_weight: float


@dataclass
class Ppo:
    """Updates one net.

    Args:
        net: the policy.
        collate: observations to a batch.
        config: see `PpoConfig`.
        seed: of the order of minibatches.

    Attributes:
        kl_weight: of the KL penalty; doubled and halved to keep the KL near its target.
        harm_weight: the Lagrange multiplier of harm.
        entropy_weight: as it is for the next update.
    """

    net: ActorCritic
    collate: Callable[[Sequence[Any]], Any]
    config: PpoConfig
    seed: int = 0
    kl_weight: float = field(init=False)
    harm_weight: float = field(init=False, default=0.0)
    entropy_weight: float = field(init=False)

    def __post_init__(self) -> None:
        self.kl_weight = self.config.kl_weight
        self.entropy_weight = self.config.entropy_weight
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=self.config.lr, eps=1e-5)
        self._random = np.random.default_rng(self.seed)

    def update(self, samples: Samples, *, mean_harm: float = 0.0) -> Report:
        """Learns from fresh samples.

        Args:
            samples: of the net as it is.
            mean_harm: of an episode, in its own unit.

        Raises:
            ValueError: if there is none, or a number is not finite.
        """
        _check(samples)
        advantages = normalised(samples.advantages - self.harm_weight * samples.harms)
        done: list[tuple[Losses, float]] = []
        kl = 0.0
        for _ in range(self.config.epochs):
            moved = [self._step(part, samples, advantages) for part in self._parts(len(samples))]
            done += moved
            kl = _mean(float(one.kl) for one, _ in moved)
            if kl > 4.0 * self.config.target_kl:
                break
        self._adapt(kl, mean_harm)
        return Report(
            num_steps=len(done),
            policy=_mean(float(one.policy) for one, _ in done),
            value=_mean(float(one.value) for one, _ in done),
            entropy=_mean(float(one.entropy) for one, _ in done),
            kl=kl,
            clipped=_mean(one.clipped for one, _ in done),
            gradient=max(norm for _, norm in done),
            kl_weight=self.kl_weight,
            harm_weight=self.harm_weight,
        )

    def _parts(self, num: int) -> Iterator[np.ndarray]:
        order = self._random.permutation(num)
        for start in range(0, num, self.config.minibatch):
            yield order[start : start + self.config.minibatch]

    def _step(self, part: np.ndarray, samples: Samples, advantages: np.ndarray) -> tuple[Losses, float]:
        """One optimizer step; returns its losses and the gradient's norm."""
        config = self.config
        batch = self.collate([samples.observations[i] for i in part])
        found = losses(
            self.net,
            batch,
            [samples.choices[i] for i in part],
            _tensor(samples.log_probs[part]),
            _tensor(advantages[part]),
            _tensor(samples.returns[part]),
            config.clip,
        )
        loss = found.policy + config.value_weight * found.value - self.entropy_weight * found.entropy
        loss = loss + self.kl_weight * found.kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.net.parameters(), config.clip_norm))
        if not math.isfinite(norm):
            raise ValueError("the gradient of the policy is not finite")
        self.optimizer.step()
        detached = {name: getattr(found, name).detach() for name in ("policy", "value", "entropy", "kl")}
        return replace(found, **detached), norm

    def _adapt(self, kl: float, mean_harm: float) -> None:
        target = self.config.target_kl
        if kl > 1.5 * target:
            self.kl_weight = min(2.0 * self.kl_weight, 100.0)
        elif kl < target / 1.5:
            self.kl_weight = max(0.5 * self.kl_weight, 1e-4)
        self.harm_weight = max(0.0, self.harm_weight + self.config.harm_lr * (mean_harm - self.config.max_harm))

    def state_dict(self) -> dict[str, Any]:
        """All but the net, to go on with; later updates do not change it."""
        return {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "kl_weight": self.kl_weight,
            "harm_weight": self.harm_weight,
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_weight, self.harm_weight = state["kl_weight"], state["harm_weight"]
        self._random.bit_generator.state = state["random"]


def normalised(advantages: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1; one sample, or samples that are all alike, teach nothing and are 0."""
    spread = advantages.std()
    return (advantages - advantages.mean()) / spread if spread > 1e-8 else np.zeros_like(advantages)


def _check(samples: Samples) -> None:
    if not len(samples):
        raise ValueError("no samples to learn from")
    for name in ("log_probs", "advantages", "returns", "harms"):
        if not np.isfinite(getattr(samples, name)).all():
            raise ValueError(f"{name} are not all finite")


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=torch.get_default_dtype())


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)
