"""Optimizers and learning rates by configuration: what `tolaria.optimizer` and `tolaria.scheduler` stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from esper.config import OptimizerConfig, SchedulerConfig
from esper.tolaria.optim import OptimizerFactory, SchedulerFactory


def optimizer_factory(config: OptimizerConfig) -> OptimizerFactory:
    """Returns the factory of the configured optimizer."""

    def make(parameters: list[nn.Parameter]) -> Optimizer:
        if config.type == "sgd":
            return SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        return AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

    return make


def scheduler_factory(config: SchedulerConfig) -> SchedulerFactory | None:
    """Returns the factory of the configured scheduler; None where the rate is constant from the first step."""
    if config.type == "constant" and config.warmup_fraction == 0:
        return None

    def make(optimizer: Optimizer, total_steps: int) -> LRScheduler:
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
