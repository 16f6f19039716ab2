"""What is being learned: the loss, and the figures people look at. Knows no data and no model.

Shape suffixes: B samples, C classes, T positions, V characters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from esper.leyline.errors import ConfigError

LossFn = Callable[[Any, Any], torch.Tensor]
"""(outputs, targets) -> scalar, the mean over the batch."""

MetricFn = Callable[[Any, Any], "torch.Tensor | float"]
"""(outputs, targets) -> the batch's mean of the figure."""


@dataclass(frozen=True)
class Task:
    """A loss and its metrics.

    Attributes:
        loss_fn: (outputs, targets) to a scalar, the mean over the batch.
        metrics: name to (outputs, targets) -> batch mean; the first one is the headline.
        per_sample_loss: (outputs, targets) to (B,); with it, evidence is paired sample by sample instead of batch
            by batch, which needs less data for the same certainty.
        name: what the summary calls it.
        higher_is_better: which way the headline metric points.
    """

    loss_fn: LossFn
    metrics: Mapping[str, MetricFn] = field(default_factory=dict)
    per_sample_loss: LossFn | None = None
    name: str = "custom"
    higher_is_better: bool = True

    @property
    def headline(self) -> str | None:
        """Name of the metric that charts and early stopping use; None without metrics."""
        return next(iter(self.metrics), None)


def resolve_task(task: Task | str) -> Task:
    """Returns the task, by name or as given.

    Raises:
        ConfigError: if no task has this name.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ConfigError(f"no task {task!r}", field="task", remedy=f"one of {', '.join(TASKS)}, or an esper.Task")
    return TASKS[task]


def _accuracy(logits_bc: torch.Tensor, targets_b: torch.Tensor) -> torch.Tensor:
    return (logits_bc.argmax(dim=-1) == targets_b).float().mean()


def _mean_per_sample(losses: torch.Tensor) -> torch.Tensor:
    return losses.flatten(1).mean(dim=1) if losses.dim() > 1 else losses


def _squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # (B, 1) against (B,) would broadcast to (B, B) and learn the mean
    if outputs.shape != targets.shape:
        targets = targets.reshape(outputs.shape)
    return (outputs - targets) ** 2


def _regression_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _squared_error(outputs, targets).mean()


def _regression_per_sample(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _mean_per_sample(_squared_error(outputs, targets))


def _classification_per_sample(logits_bc: torch.Tensor, targets_b: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_bc, targets_b, reduction="none")


def _language_loss(logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten())


def _language_per_sample(logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    losses_n = F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="none")
    return losses_n.view_as(targets_bt).mean(dim=1)


TASKS: Mapping[str, Task] = {
    "classification": Task(
        F.cross_entropy, {"accuracy": _accuracy}, per_sample_loss=_classification_per_sample, name="classification"
    ),
    "regression": Task(
        _regression_loss,
        {"mse": _regression_loss},
        per_sample_loss=_regression_per_sample,
        name="regression",
        higher_is_better=False,
    ),
    "language_model": Task(
        _language_loss, {"accuracy": _accuracy}, per_sample_loss=_language_per_sample, name="language_model"
    ),
}
"""The built-in tasks: (B, C) against (B,), (B, ...) against (B, ...), (B, T, V) against (B, T)."""
