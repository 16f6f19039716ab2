"""Gradient health: twenty optimizer steps on random data, after which no parameter may be dead or exploding.

The optimizer is Kasmina's, AdamW at its default rate for seeds, written out here: the first `torch.optim` step of a
process imports the compiler, which costs more than all checks of a kernel. The data are fresh normal inputs and
targets, so a sound kernel has little to learn and nothing to grow for. Half precision learns in float32, as with
master weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from esper.urabrask.finding import Finding, verdict
from esper.urabrask.subject import Subject, forward, normal

NUM_STEPS = 20
LEARNING_RATE = 3e-3
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01

MAX_GRADIENT = 1e3
"""Largest norm of a parameter's gradient. The loss is the mean square error of unit targets: a sound kernel's
gradients are at most of order 1."""
MAX_OUTPUT = 1e2
"""Largest root mean square of the output after the steps, for inputs of 1."""


def gradient_health(subject: Subject) -> Finding:
    """No parameter whose gradient was exactly zero at every step (dead), not finite or above `MAX_GRADIENT`
    (exploding); no output above `MAX_OUTPUT` afterwards.
    """
    module = _trainable(subject)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    largest = dict.fromkeys(parameters, 0.0)
    seen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    states = {name: _AdamW(p) for name, p in parameters.items()}
    for step in range(NUM_STEPS if parameters else 0):
        gradients = _gradients(module, parameters, subject, step)
        for name, gradient in gradients.items():
            norm = float(gradient.norm())
            if not norm <= MAX_GRADIENT:
                words = f"the gradient of {name} has norm {norm:.3g} at step {step}"
                return verdict("gradient_health", False, limit=MAX_GRADIENT, detail=f"exploding: {words}")
            largest[name] = max(largest[name], norm)
            seen[name] |= gradient != 0.0
        for name, gradient in gradients.items():
            states[name].step(gradient)
    dead = [name for name, norm in largest.items() if norm == 0.0]
    return _judge(subject, module, dead, max(largest.values(), default=0.0), _silent_share(seen))


class _AdamW:
    """The optimizer's state of one parameter, with torch's default decay rates and weight decay."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._mean = torch.zeros_like(parameter)
        self._square = torch.zeros_like(parameter)
        self._num_steps = 0

    @torch.no_grad()
    def step(self, gradient: torch.Tensor) -> None:
        """Moves the parameter."""
        self._num_steps += 1
        self._mean.lerp_(gradient, 1.0 - BETAS[0])
        self._square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1.0 - BETAS[1])
        first, second = (1.0 - beta**self._num_steps for beta in BETAS)
        self._parameter.mul_(1.0 - LEARNING_RATE * WEIGHT_DECAY)
        root = self._square.sqrt().div_(second**0.5).add_(EPS)
        self._parameter.addcdiv_(self._mean, root, value=-LEARNING_RATE / first)


def _judge(subject: Subject, module: nn.Module, dead: list[str], gradient: float, silent: float) -> Finding:
    h = subject.first_input().to(_learning_dtype(subject))
    size = float(forward(module, h).square().mean().sqrt())
    figures = {"max_gradient": gradient, "silent_share": silent, "learned_output": size}
    if dead:
        words = f"dead: no gradient in {NUM_STEPS} steps for {', '.join(dead)}"
        return verdict("gradient_health", False, value=len(dead), limit=0, detail=words, figures=figures)
    if not size <= MAX_OUTPUT:
        words = f"exploding: the output is {size:.3g} for an input of 1 after {NUM_STEPS} steps"
        return verdict("gradient_health", False, value=size, limit=MAX_OUTPUT, detail=words, figures=figures)
    return verdict("gradient_health", True, value=gradient, limit=MAX_GRADIENT, figures=figures)


def _learning_dtype(subject: Subject) -> torch.dtype:
    return torch.float64 if subject.dtype is torch.float64 else torch.float32


def _trainable(subject: Subject) -> nn.Module:
    return copy.deepcopy(subject.module).to(_learning_dtype(subject))


def _gradients(
    module: nn.Module, parameters: Mapping[str, nn.Parameter], subject: Subject, step: int
) -> dict[str, torch.Tensor]:
    shape, dtype = subject.signature.shape(subject.batch), _learning_dtype(subject)
    h, target = (normal(shape, 1_000 + 2 * step + which).to(dtype) for which in (0, 1))
    with torch.enable_grad():
        loss = (module(h) - target).square().mean() / 2
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(parameters.items(), found, strict=True)
    }


def _silent_share(seen: Mapping[str, torch.Tensor]) -> float:
    """Share of all trainable values that never had a gradient."""
    total = sum(flags.numel() for flags in seen.values())
    return sum(int((~flags).sum()) for flags in seen.values()) / total if total else 0.0
