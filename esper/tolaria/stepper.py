"""One optimizer step of a run, or of a fork of it: the same code, so that both compute the same bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from esper.tolaria.optim import SEED_KEY, Optimization, clip_norms
from esper.tolaria.session import Session
from esper.tolaria.workload import Batch, batch_len, model_args, parts_of


class Stepper:
    """Takes steps around a session.

    Args:
        session: of the run; its course names the task and the settings.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._config = session.course.config.tolaria

    def step(self, batch: Batch) -> torch.Tensor | None:
        """One step on a batch that lies on the model's device; returns the headline metric, if there is one.

        Raises:
            KernelFaultError: if a kernel on the live path fails; nothing was trained then.
        """
        session, course = self._session, self._session.course
        optimization, headline = course.optimization, course.task.headline
        optimization.optimizer.zero_grad(set_to_none=True)
        loss, metric = torch.zeros((), device=course.device), torch.zeros((), device=course.device)
        parts = parts_of(batch, self._config.accumulate)
        for number, part in enumerate(parts):
            share = batch_len(part) / batch_len(batch)
            with _reducing(course.model, now=number == len(parts) - 1):
                outputs, part_loss = self._forward(part)
                (part_loss if len(parts) == 1 else share * part_loss).backward()
            loss = loss + share * part_loss.detach()
            if headline is not None:
                with torch.no_grad():
                    metric = metric + share * course.task.metrics[headline](outputs, part[1])
        if self._config.clip_norm is not None:
            clip_norms(_host_and_seeds(optimization), self._config.clip_norm)
        if self._config.freeze_host and (adapting := session.adapting()):
            optimization.hold_all_but(adapting)
        optimization.step()
        session.step(batch, loss)
        return None if headline is None else metric

    def _forward(self, part: Batch) -> tuple[Any, torch.Tensor]:
        session, (inputs, targets) = self._session, part
        with session.precision.forward():
            outputs = session.course.model(*model_args(inputs))
        outputs = session.precision.full(outputs)
        return outputs, session.course.task.loss_fn(outputs, targets)


def _reducing(model: torch.nn.Module, *, now: bool) -> AbstractContextManager[None]:
    """Around a forward and its backward: whether the gradients so far are averaged over ranks at its end."""
    if now or not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def _host_and_seeds(optimization: Optimization) -> list[list[torch.nn.Parameter]]:
    host: list[torch.nn.Parameter] = []
    seeds: list[torch.nn.Parameter] = []
    for group in optimization.optimizer.param_groups:
        (seeds if SEED_KEY in group else host).extend(group["params"])
    return [host, seeds]
