"""Optimizers and learning rates by configuration: what `tolaria.optimizer` and `tolaria.scheduler` stand for."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from esper.config import OptimizerConfig, SchedulerConfig
from esper.leyline.errors import ConfigError
from esper.tolaria.optim import OptimizerFactory, SchedulerFactory


def optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Returns the factory of the configured optimizer.

    Raises:
        ConfigError: for an option that the class has not; the factory, if the class refuses values or parameters.
    """
    chosen = _optimizer_class(config.type)
    known = inspect.signature(chosen).parameters
    settings: dict[str, Any] = {"lr": config.lr}
    if "weight_decay" in known:
        settings["weight_decay"] = config.weight_decay
    if chosen is SGD:
        settings["momentum"] = config.momentum
    for name in config.options:
        if name not in known or name in {"params", "lr"}:
            raise ConfigError(
                f"{chosen.__name__} has no option {name!r}",
                field="tolaria.optimizer.options",
                remedy=f"one of {', '.join(key for key in known if key not in {'params', 'lr'})}",
            )
    settings |= config.options

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        try:
            return chosen(parameters, **settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{chosen.__name__}: {error}", field="tolaria.optimizer") from error

    return make


def _optimizer_class(name: str) -> type[Optimizer]:
    return next(kind for key, kind in vars(torch.optim).items() if key.lower() == name and isinstance(kind, type))


def scheduler_factory(config: SchedulerConfig) -> SchedulerFactory | None:
    """Returns the factory of the configured scheduler; None where the rate is constant from the first step."""
    if config.type == "constant" and config.warmup_fraction == 0:
        return None

    def make(optimizer: Optimizer, total_steps: int) -> LRScheduler:
        if config.type == "onecycle":
            return OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=total_steps + 1,  # it is stepped after the last step too
                pct_start=config.warmup_fraction or 0.3,
                cycle_momentum=bool({"momentum", "betas"} & set(optimizer.defaults)),
            )
        curve = RateCurve(
            shape=config.type,
            total=total_steps,
            warmup=round(total_steps * config.warmup_fraction),
            decay=max(1, round(total_steps * config.decay_fraction)),
        )
        return LambdaLR(optimizer, curve)

    return make


@dataclass
class RateCurve:
    """Factor of the base rate at a step. An object, not a lambda, so that a scheduler's state holds it.

    Attributes:
        shape: `constant`, `cosine` (to 0 at `total`) or `wsd` (warm up, stay, then linearly to 0 over `decay` steps;
            MiniCPM, arXiv 2404.06395).
        total, warmup, decay: in steps.
    """

    shape: str
    total: int
    warmup: int
    decay: int

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.shape == "cosine":
            progress = (step - self.warmup) / max(1, self.total - self.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if self.shape == "wsd":
            return min(1.0, max(0.0, (self.total - step) / self.decay))
        return 1.0
