"""All that a host holds: what its `state_dict` gives, and the buffers that it leaves out (`persistent=False`).

A state_dict may hold more than tensors: `get_extra_state` of a module adds what it likes. That travels along, as far
as a checkpoint can hold it, which is JSON values and tensors, without pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from esper.leyline.errors import ConfigError
from esper.tolaria.tree import flatten


def contents(module: nn.Module) -> dict[str, Any]:
    """Returns everything that the module holds. Tensors are not copies."""
    unsaved = {name: owner._buffers[leaf] for name, owner, leaf in _unsaved(module)}  # noqa: SLF001 - torch has no list of them
    return {"module": dict(module.state_dict()), "buffers": unsaved}


def refill(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Inverse of `contents`, in place. A buffer left out of `state_dict` that came later stays: it is a cache.

    Args:
        module: with the tensors of the state.
        state: from `contents`; keys beside its own are not looked at.
    """
    module.load_state_dict(state["module"], strict=True)
    saved = state.get("buffers", {})  # younger than the first checkpoints
    for name, owner, leaf in _unsaved(module):
        if name not in saved:
            continue
        own, value = owner._buffers[leaf], saved[name]  # noqa: SLF001 - as above
        if own is not None and value is not None and own.shape == value.shape and own.dtype == value.dtype:
            with torch.no_grad():
                own.copy_(value)  # the same object: whoever compiled the host relies on it
        else:
            owner._buffers[leaf] = None if value is None else value.to(_device_of(module))  # noqa: SLF001


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every tensor that the module holds, by name; not copies."""
    state = contents(module)
    found = state["module"] | state["buffers"]
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def require_portable(module: nn.Module) -> None:
    """Refuses a host with extra state that a checkpoint cannot hold.

    Raises:
        ConfigError: names the module, and what it should give.
    """
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            continue
        try:
            flatten(value)
        except TypeError as error:
            path = name.rpartition(".")[0]
            where = f"{type(module.get_submodule(path)).__name__} at {path}" if path else type(module).__name__
            raise ConfigError(
                f"what get_extra_state of {where} gives cannot be saved: {error}",
                field="host",
                remedy="let it return JSON values and tensors, in dicts, lists and tuples",
            ) from error


def _unsaved(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name, owner and attribute of each buffer that `state_dict` leaves out, unset ones too."""
    for path, owner in module.named_modules():
        for leaf in sorted(owner._non_persistent_buffers_set):  # noqa: SLF001 - as above
            yield (f"{path}.{leaf}" if path else leaf), owner, leaf


def _device_of(module: nn.Module) -> torch.device:
    first = next(iter(module.parameters()), None)
    return torch.device("cpu") if first is None else first.device
