"""What a choice was worth beyond what was expected: generalised advantage estimation, and V-trace for others' choices.

Both work on one or more episodes laid end to end, in numpy. `values` has one entry more than `rewards`: the value of
what came after the last choice, which counts only where the last is not `done`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimates:
    """For each choice.

    Attributes:
        advantages: of the choice over what was expected, (N,).
        returns: what the value is to become, (N,).
    """

    advantages: np.ndarray
    returns: np.ndarray


def gae(rewards: np.ndarray, values: np.ndarray, dones: np.ndarray, *, gamma: float, lam: float) -> Estimates:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

    Args:
        rewards: (N,).
        values: (N + 1,).
        dones: (N,) whether an episode ends with this choice.
        gamma: discount.
        lam: 0 trusts the values, 1 the rewards.
    """
    going = 1.0 - dones.astype(float)
    deltas = rewards + gamma * values[1:] * going - values[:-1]
    advantages = np.zeros(len(rewards))
    ahead = 0.0
    for t in reversed(range(len(rewards))):
        ahead = deltas[t] + gamma * lam * going[t] * ahead
        advantages[t] = ahead
    return Estimates(advantages, advantages + values[:-1])


def vtrace(
    rewards: np.ndarray,
    values: np.ndarray,
    dones: np.ndarray,
    log_ratios: np.ndarray,
    *,
    gamma: float,
    rho: float = 1.0,
    c: float = 1.0,
) -> Estimates:
    """V-trace (Espeholt et al. 2018, section 4.1): the same of the present policy, from what another one chose.

    Args:
        rewards: (N,).
        values: (N + 1,), of the present policy.
        dones: (N,) whether an episode ends with this choice.
        gamma: discount.
        log_ratios: (N,) log-probability of the choice under the present policy, less that under the one that chose.
        rho: ratios are cut to it: what the values converge to.
        c: ratios that reach back are cut to it: how fast they do.
    """
    going = 1.0 - dones.astype(float)
    ratios = np.exp(np.minimum(log_ratios, 20.0))
    cut, back = np.minimum(ratios, rho), np.minimum(ratios, c)
    deltas = cut * (rewards + gamma * values[1:] * going - values[:-1])
    correction = np.zeros(len(rewards))
    ahead = 0.0
    for t in reversed(range(len(rewards))):
        ahead = deltas[t] + gamma * going[t] * back[t] * ahead
        correction[t] = ahead
    targets = values[:-1] + correction
    after = np.append(targets[1:], values[-1])
    advantages = cut * (rewards + gamma * after * going - values[:-1])
    return Estimates(advantages, targets)


def effective_share(log_ratios: np.ndarray) -> float:
    """How many samples those of another policy are worth, as a share of their number, in [0, 1]: with weights w of n
    samples (sum w)^2 / (n sum w^2) (Kish 1965). 1 where both policies are one; what is too little is not learned from.
    """
    if not len(log_ratios):
        return 0.0
    weights = np.exp(log_ratios - log_ratios.max())
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))
