"""Validation, and paired comparison of two validations. Leaves the model's mode, buffers and the RNG as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from esper.leyline.autocast import no_autocast_cache
from esper.leyline.errors import DataError, KernelFaultError, NonFiniteError
from esper.leyline.generators import drawn_apart
from esper.leyline.signals import Evidence, EvidenceKind
from esper.tolaria.precision import FULL, Precision
from esper.tolaria.ranks import Ranks
from esper.tolaria.task import Task
from esper.tolaria.workload import Batch, batch_len, model_args, to_device

CountFlops = Callable[[Callable[[], Any], tuple[Any, ...]], Any]
"""Runs the first argument, a forward of the second, and books what it costs."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One pass over a split.

    Attributes:
        loss: mean over all samples of all ranks.
        metrics: means over all samples of all ranks.
        losses: this rank's loss of each sample; of each batch where the task has no per-sample loss. On the CPU.
        num_samples: over all ranks.
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)
    losses: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    num_samples: int = 0


def evaluate(
    module: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    *,
    ranks: Ranks,
    device: torch.device,
    run: CountFlops | None = None,
    precision: Precision = FULL,
) -> Evaluation:
    """Runs the model over all batches without gradients, in eval mode.

    Args:
        module: the host, not its DDP wrapper: ranks may hold different numbers of batches.
        batches: this rank's share.
        task: whose loss and metrics to take.
        ranks: over which to average.
        device: where the model lies.
        run: called with each forward, to count it.
        precision: of the forwards.

    Raises:
        DataError: if no rank has a batch.
        NonFiniteError: if the loss is not finite.
        KernelFaultError: if a kernel failed on this rank or on another. All of these are raised by every rank.
    """
    names = list(task.metrics)
    sums = torch.zeros(2 + len(names), dtype=torch.float64)  # samples, loss, metrics
    parts: list[torch.Tensor] = []
    fault: KernelFaultError | None = None
    with _undisturbed(module), torch.no_grad(), no_autocast_cache():
        for batch in batches:
            inputs, targets = to_device(batch, device)
            args = model_args(inputs)
            try:
                with precision.forward():
                    outputs = module(*args) if run is None else run(lambda args=args: module(*args), args)
            except KernelFaultError as error:
                fault = error
                break
            outputs = precision.full(outputs)
            num = batch_len((inputs, targets))
            losses = _losses(task, outputs, targets)
            parts.append(losses.double().cpu())
            figures = [float(losses.double().mean()), *(float(task.metrics[name](outputs, targets)) for name in names)]
            sums += torch.tensor([1.0, *figures], dtype=torch.float64) * num
    words = ranks.agree(None if fault is None else str(fault))  # the others must not wait for its sums
    if words is not None:
        raise fault if fault is not None and ranks.world == 1 else KernelFaultError(words)
    # sums over ranks are means times the number of ranks, which cancels in every quotient below
    sums_shared = sums.to(device) if ranks.world > 1 else sums
    ranks.mean_([sums_shared])
    total, loss, *metrics = sums_shared.tolist()
    if total == 0:
        raise DataError("the split has no batches")
    if not math.isfinite(loss):
        raise NonFiniteError("the validation loss is not finite")
    return Evaluation(
        loss=loss / total,
        metrics={name: value / total for name, value in zip(names, metrics, strict=True)},
        losses=torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64),
        num_samples=round(total * ranks.world),
    )


def compare(baseline: Evaluation, candidate: Evaluation, *, ranks: Ranks, device: torch.device) -> Evidence:
    """Pairs two passes over the same samples: gain is the mean of baseline minus candidate.

    Raises:
        ValueError: if the passes do not pair up.
    """
    if baseline.losses.shape != candidate.losses.shape:
        raise ValueError(f"{len(baseline.losses)} losses do not pair with {len(candidate.losses)}")
    gains = baseline.losses - candidate.losses
    sums = torch.tensor([len(gains), float(gains.sum())], dtype=torch.float64, device=device)
    ranks.mean_([sums])
    count, total = (value * ranks.world for value in sums.tolist())
    gain = total / count
    # around the common mean, in a second pass: sums of squares would cancel
    square = ((gains - gain) ** 2).sum().reshape(1).to(device)
    ranks.mean_([square])
    variance = float(square) * ranks.world / max(1.0, count - 1)
    return Evidence(
        kind=EvidenceKind.SHADOW,
        gain=gain,
        stderr=math.sqrt(variance / count),
        baseline=baseline.loss,
        candidate=candidate.loss,
        num_pairs=round(count),
    )


def _losses(task: Task, outputs: Any, targets: Any) -> torch.Tensor:
    if task.per_sample_loss is None:
        return task.loss_fn(outputs, targets).reshape(1)
    return task.per_sample_loss(outputs, targets)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards each submodule's own mode (frozen ones stay in eval) is restored. Random numbers are
    drawn apart: a seed in TRAINING costs a validation more, which the host must not notice.
    """
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with drawn_apart(range(torch.cuda.device_count())):
            yield
    finally:
        for child, training in modes:
            child.training = training
