"""What the owner of a model has compiled (`torch.compile`), and how to call it as if nothing were.

Esper compiles nothing. But a model may come compiled, as a whole or in parts; docs/adr/0008 says how it grows then.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def is_wrapper(module: nn.Module) -> bool:
    """Whether this is what `torch.compile(module)` returned, a module around the model."""
    # whoever compiled something has imported dynamo; to import it here would take seconds
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module's own call is compiled: by `module.compile()`, as a wrapper, or its `forward` alone."""
    if module._compiled_call_impl is not None or is_wrapper(module):  # noqa: SLF001 - torch has no public question
        return True
    # torch marks what compile() and disable() return alike, but for the second mark
    forward = module.forward
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)


def runs_compiled(root: nn.Module, path: str) -> bool:
    """Whether the module at `path` runs in a region that its owner compiled: itself, or something around it."""
    parts = path.split(".")
    return any(is_compiled(root.get_submodule(".".join(parts[:depth]))) for depth in range(len(parts) + 1))


def eagerly(module: nn.Module) -> AbstractContextManager[object]:
    """Within it, the module and all in it run as if nobody had compiled them, and nothing is compiled."""
    if not any(is_compiled(submodule) for submodule in module.modules()):
        return nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")


@functools.cache
def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, marked so that compiled code ends before it, calls it as it is at that moment, and goes on after.

    Imports dynamo: only for a model that is compiled.
    """
    import torch

    return torch.compiler.disable(function)
