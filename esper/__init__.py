"""Esper trains PyTorch networks that grow while they train.

    import esper

    run = esper.grow(model, train, val, task="classification", optimizer=make, epochs=30)   # see `esper.api.grow`
    grown = esper.wrap(model, example=(x,))                                                 # for one's own loop

Importing this package imports neither torch nor ray: names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.api import Grown, Run, export, grow, wrap
    from esper.config import Budget, RunConfig, load_config
    from esper.leyline.errors import EsperError, KernelFaultError
    from esper.tolaria.task import Task

_HOMES = {
    "Budget": "esper.config",
    "EsperError": "esper.leyline.errors",
    "Grown": "esper.api",
    "KernelFaultError": "esper.leyline.errors",
    "Run": "esper.api",
    "RunConfig": "esper.config",
    "Task": "esper.tolaria.task",
    "export": "esper.api",
    "grow": "esper.api",
    "load_config": "esper.config",
    "wrap": "esper.api",
}

__all__ = [
    "Budget",
    "EsperError",
    "Grown",
    "KernelFaultError",
    "Run",
    "RunConfig",
    "Task",
    "export",
    "grow",
    "load_config",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'esper' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
