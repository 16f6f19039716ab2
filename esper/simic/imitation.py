"""The warm start: a net learns to choose as another policy did, from its logged runs, before it chooses for itself.

Cross-entropy on choices. To wait is most of them: rare operations count more (`ImitationConfig.balance`). So do
runs that came to more than others (`Lessons.weight`): where their choices were drawn at random, that is
advantage-weighted regression (Peng et al. 2019). Batches come from prioritised replay: what the net finds least likely
comes more often, with importance weights. The value learns
what came of the choices (`Lessons.returns`) beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from esper.simic.lessons import Lesson, Lessons
from esper.simic.ppo import ActorCritic
from esper.simic.replay import Replay
from esper.simic.settings import ImitationConfig
from esper.tamiyo.actions import ActionChoice, Operation


class Chooser(ActorCritic, Protocol):
    """A net that can choose as well."""

    def act(self, batch: Any, *, generator: torch.Generator | None = None, greedy: bool = False) -> list[Any]:
        """Returns what is chosen, each with `.choice`."""
        ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a net's choices compare with those it should make.

    Attributes:
        num: choices compared.
        same: share that is the same altogether.
        by_operation: of each operation that was chosen, (how often, share in which the net chose it too).
        log_prob: mean log-probability of what was chosen.
    """

    num: int
    same: float
    by_operation: dict[str, tuple[int, float]]
    log_prob: float


@dataclass(frozen=True, slots=True)
class ImitationReport:
    """What imitation came to: on the episodes it learned from, and on those held out (None without)."""

    num_episodes: int
    num_beyond: int
    learned: Agreement
    held_out: Agreement | None


def imitate(
    net: Chooser,
    collate: Callable[[Sequence[Any]], Any],
    lessons: Sequence[Lessons],
    held_out: Sequence[Lessons],
    config: ImitationConfig,
    *,
    seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> ImitationReport:
    """Teaches a net.

    Args:
        net: changed in place.
        collate: observations to a batch.
        lessons: to learn from.
        held_out: to judge by.
        config: see there.
        seed: of the order.
        told: hears of each epoch and its mean loss.

    Raises:
        ValueError: if there is nothing to learn from.
    """
    items = [
        (item, ret, one.weight) for one in lessons for item, ret in zip(one.items, one.returns().tolist(), strict=True)
    ]
    if not items:
        raise ValueError("no choices to imitate")
    weights = _balanced([item.choice.operation for item, _, _ in items], config.balance)
    replay: Replay[tuple[Lesson, float, float]] = Replay(len(items), seed=seed)
    for entry in items:
        replay.add(entry, 1.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
    for epoch in range(config.epochs):
        total, steps = 0.0, max(1, math.ceil(len(items) / config.minibatch))
        for _ in range(steps):
            places, drawn, importance = replay.sample(min(config.minibatch, len(items)))
            scale = np.array([weights[item.choice.operation] * weight for item, _, weight in drawn]) * importance
            loss, surprise = _loss(net, collate, [(item, ret) for item, ret, _ in drawn], scale, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            replay.update(places, surprise)
            total += loss.item()
        if told is not None:
            told(epoch, total / steps)
    return ImitationReport(
        num_episodes=len(lessons),
        num_beyond=sum(one.num_beyond for one in (*lessons, *held_out)),
        learned=agreement(net, collate, lessons),
        held_out=agreement(net, collate, held_out) if held_out else None,
    )


@torch.no_grad()
def agreement(net: Chooser, collate: Callable[[Sequence[Any]], Any], lessons: Sequence[Lessons]) -> Agreement:
    """Compares what the net would do, at its most probable, with what was done."""
    wanted: list[ActionChoice] = []
    chosen: list[ActionChoice] = []
    log_probs: list[float] = []
    for one in lessons:
        if not one.items:
            continue
        batch = collate([item.observation for item in one.items])
        choices = [item.choice for item in one.items]
        wanted += choices
        chosen += [decided.choice for decided in net.act(batch, greedy=True)]
        log_probs += net.evaluate(batch, choices)[0].tolist()
    pairs = list(zip(wanted, chosen, strict=True))
    counts = Counter(choice.operation for choice in wanted)
    found = Counter(choice.operation for choice, own in pairs if choice.operation == own.operation)
    return Agreement(
        num=len(pairs),
        same=sum(choice == own for choice, own in pairs) / max(1, len(pairs)),
        by_operation={
            Operation(operation).name: (num, found[operation] / num) for operation, num in sorted(counts.items())
        },
        log_prob=math.fsum(log_probs) / max(1, len(log_probs)),
    )


def _loss(
    net: Chooser,
    collate: Callable[[Sequence[Any]], Any],
    drawn: Sequence[tuple[Lesson, float]],
    scale: np.ndarray,
    config: ImitationConfig,
) -> tuple[torch.Tensor, np.ndarray]:
    """The loss of a minibatch, and how unlikely each choice was."""
    log_probs, _, values = net.evaluate(
        collate([item.observation for item, _ in drawn]), [item.choice for item, _ in drawn]
    )
    returns = torch.tensor([ret for _, ret in drawn])
    weights = torch.as_tensor(scale, dtype=log_probs.dtype)
    loss = -(weights * log_probs).sum() / weights.sum()
    return loss + config.value_weight * (values - returns).pow(2).mean(), -log_probs.detach().double().numpy()


def _balanced(operations: Sequence[Operation], balance: float) -> dict[Operation, float]:
    """What a choice of each operation counts: 1 on the average over all choices."""
    counts = Counter(operations)
    raw = {operation: (len(operations) / num) ** balance for operation, num in counts.items()}
    mean = sum(raw[operation] * num for operation, num in counts.items()) / len(operations)
    return {operation: weight / mean for operation, weight in raw.items()}
