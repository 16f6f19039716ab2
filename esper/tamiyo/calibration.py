"""Teaches the ensemble what came of choices, and measures on other runs how far its doubt can be trusted.

The encoder stays as it is: only the members of `Outcomes` learn, each from its own resampled part of the choices.
Then, on runs that no member has seen, the members' disagreement is scaled so that errors have the size that it says;
how often they do is measured on other runs again, before and after. All of it becomes part of the weights, and so of
the version.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from esper.leyline import DataError
from esper.tamiyo.actions import ActionChoice
from esper.tamiyo.batch import collate, targets_of
from esper.tamiyo.net import PolicyNet, chosen_features
from esper.tamiyo.observation import Observation
from esper.tamiyo.outcomes import Outcomes

MIN_GROUPS = 5
"""Runs that are needed at least: three to learn from, one to scale by, one to check with."""


@dataclass(frozen=True)
class Lesson:
    """One choice and what came of it.

    Attributes:
        outcome: the return from the choice on, as Simic reckons it.
        group: the run; choices of one run are not independent, so runs are held out whole.
    """

    observation: Observation
    choice: ActionChoice
    outcome: float
    group: str


def teach(
    net: PolicyNet,
    lessons: Iterable[Lesson],
    *,
    seed: int = 0,
    passes: int = 200,
    learning_rate: float = 3e-3,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Trains and calibrates `net.outcomes` in place.

    Args:
        net: whose encoder is as it will be used.
        lessons: choices, gone through once.
        seed: of the resampling and of which runs are held out.
        passes: over the choices, each in one step.
        learning_rate: of Adam.
        batch_size: of encoding.

    Returns:
        For the card: `num`, `num_groups`, `spread` (standard deviation of what came), `scale`, `rmse` of the mean and
        `baseline_rmse` of always saying the mean, the shares of errors `within_1` and `within_2` deviations (a normal
        error: 0.68, 0.95) and `within_1_before`, and `uncertainty` on the average; those on the runs held out last.

    Raises:
        DataError: if there are fewer than `MIN_GROUPS` runs, or all outcomes are the same.
    """
    chosen, outcomes, groups = _encode(net, lessons, batch_size)
    learned, scaled, checked = _split(groups, seed)
    model = net.outcomes
    center, spread = float(outcomes[learned].mean()), float(outcomes[learned].std())
    if not (math.isfinite(center) and math.isfinite(spread) and spread > 0.0):
        raise DataError("all choices had the same outcome, or one was not finite: there is nothing to forecast")
    model.get_buffer("center").fill_(center)
    model.get_buffer("spread").fill_(spread)
    model.get_buffer("scale").fill_(1.0)
    _fit(model, chosen[learned], (outcomes[learned] - center) / spread, seed, passes, learning_rate)
    with torch.no_grad():
        before = _within(model, chosen[checked], outcomes[checked], 1.0)
        mean, deviation = _forecast(model, chosen[scaled])
        ratio = (outcomes[scaled] - mean) / deviation
        # the likeliest scale of a normal error
        model.get_buffer("scale").fill_(float(ratio.square().mean().sqrt().clamp(1e-2, 1e3)))
        model.get_buffer("num_calibrated").fill_(len(outcomes))
        mean, _ = _forecast(model, chosen[checked])
        error = outcomes[checked] - mean
        return {
            "num": len(outcomes),
            "num_groups": len(set(groups)),
            "spread": spread,
            "scale": float(model.scale),
            "rmse": float(error.square().mean().sqrt()),
            "baseline_rmse": float((outcomes[checked] - center).square().mean().sqrt()),
            "within_1": _within(model, chosen[checked], outcomes[checked], 1.0),
            "within_2": _within(model, chosen[checked], outcomes[checked], 2.0),
            "within_1_before": before,
            "uncertainty": float(model.uncertainty(model(chosen[checked])).mean()),
        }


@torch.no_grad()
def _encode(net: PolicyNet, lessons: Iterable[Lesson], batch_size: int) -> tuple[Tensor, Tensor, list[str]]:
    rows: list[Tensor] = []
    outcomes: list[float] = []
    groups: list[str] = []
    waiting: list[Lesson] = []

    def flush() -> None:
        batch = collate([lesson.observation for lesson in waiting])
        targets = targets_of(batch, [lesson.choice for lesson in waiting])
        rows.append(chosen_features(batch, net.encoder(batch), targets))
        waiting.clear()

    for lesson in lessons:
        waiting.append(lesson)
        outcomes.append(lesson.outcome)
        groups.append(lesson.group)
        if len(waiting) == batch_size:
            flush()
    if waiting:
        flush()
    if len(set(groups)) < MIN_GROUPS:
        raise DataError(f"an uncertainty needs the choices of {MIN_GROUPS} runs at least, and has {len(set(groups))}")
    return torch.cat(rows), torch.tensor(outcomes), groups


def _split(groups: Sequence[str], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of the choices to learn from, to scale by and to check with: whole runs, three fifths and a fifth each."""
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    fifth = max(1, len(names) // 5)
    part = {names[place]: min(2, rank // fifth) for rank, place in enumerate(order)}
    parts = torch.tensor([part[group] for group in groups])
    return parts == 2, parts == 0, parts == 1


def _fit(model: Outcomes, chosen: Tensor, wanted: Tensor, seed: int, passes: int, learning_rate: float) -> None:
    """Each member fits its own resampled choices (Poisson weights, which is the bootstrap of many)."""
    members = model.first.shape[0]
    parameters = [model.first, model.first_bias, model.second, model.second_bias]
    flags = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_()
    weights = torch.poisson(torch.ones(len(chosen), members), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    center, spread = model.center, model.spread
    with torch.enable_grad():
        for _ in range(passes):
            found = (model(chosen) - center) / spread
            loss = (weights * functional.mse_loss(found, wanted[:, None].expand_as(found), reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = None


def _forecast(model: Outcomes, chosen: Tensor) -> tuple[Tensor, Tensor]:
    found = model(chosen)
    return found.mean(dim=1), (model.scale * found.std(dim=1)).clamp_min(1e-6 * model.spread)


def _within(model: Outcomes, chosen: Tensor, outcomes: Tensor, deviations: float) -> float:
    mean, deviation = _forecast(model, chosen)
    return float(((outcomes - mean).abs() <= deviations * deviation).float().mean())
