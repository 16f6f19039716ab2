"""Running a module on other tensors than its own: its forward, and what is done with its outcome, the backward too.

`torch.func.functional_call` gives the module its own tensors back when the forward ends. But a module that recomputes
activations (`torch.utils.checkpoint`) runs parts of itself again in the backward, and would then run on its own: write
to its running statistics, and save other tensors than the first time, which torch refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def with_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], run: Callable[[], T]) -> T:
    """Returns `run()`, in which the module has these tensors, by name, in place of its own."""
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return torch.func.functional_call(_Running(module, run), named, ())


class _Running(nn.Module):
    def __init__(self, module: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self._run = run

    def forward(self) -> Any:
        return self._run()
