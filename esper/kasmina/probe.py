"""One forward of the host that changes nothing and tells what each submodule put out.

It runs in eval mode without gradients, on clones of the buffers and a forked RNG; the training flags are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from esper.leyline.compiled import eagerly
from esper.leyline.errors import SiteError
from esper.leyline.generators import drawn_apart


@dataclass(slots=True)
class Call:
    """What one submodule did: how often it was called, as which call of all (the first time), and its last output."""

    order: int
    count: int = 0
    output: Any = None


@dataclass(slots=True)
class Probe:
    """What was seen: calls by module path, and the storages of the tensors that the host put out."""

    calls: dict[str, Call] = field(default_factory=dict)
    batch: int = 0
    outputs: set[int] = field(default_factory=set)


@contextmanager
def forked_rng(module: nn.Module) -> Iterator[None]:
    """Within it, random numbers of torch (on the module's devices), numpy and Python are drawn from copies."""
    devices = {p.device for p in (*module.parameters(), *module.buffers()) if p.device.type == "cuda"}
    with drawn_apart(devices):
        yield


def detached(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's parameters without their gradient, and clones of its buffers, for `functional_call`."""
    tensors = {name: p.detach() for name, p in module.named_parameters()}
    tensors.update((name, b.detach().clone()) for name, b in module.named_buffers())
    return tensors


def probe(module: nn.Module, example: tuple[Any, ...]) -> Probe:
    """Runs `module(*example)` once and watches every submodule.

    Args:
        module: the host; bit-identical afterwards.
        example: positional inputs, such as one batch.

    Raises:
        SiteError: if a submodule hides behind an attribute of every `nn.Module`, such as `type`: torch can then not
            call the host with other tensors than its own, and so no shadow can be trained. Or if a lazy module has not
            made its weights yet.
    """
    for path, parent in module.named_modules():
        for name, child in parent.named_children():
            if getattr(parent, name) is not child:
                raise SiteError(f"a submodule of {path or 'the model'} is called {name!r}", remedy="rename it")
    lazy = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if is_lazy(tensor)]
    if lazy:
        words = f"{lazy[0]} does not exist yet: it is of a lazy module"
        raise SiteError(words, remedy="run the model once, on a batch")
    seen = Probe(batch=_batch_of(example))
    training = [(m, m.training) for m in module.modules()]
    with ExitStack() as stack:
        for name, submodule in module.named_modules():
            if name:
                stack.callback(submodule.register_forward_hook(_watcher(seen, name)).remove)
        stack.callback(lambda: [setattr(m, "training", mode) for m, mode in training])
        stack.enter_context(eagerly(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(forked_rng(module))
        module.eval()
        output = torch.func.functional_call(module, detached(module), example)
    seen.outputs = {_storage(tensor) for tensor in tensors_of(output)}
    return seen


def is_output(seen: Probe, tensor: torch.Tensor) -> bool:
    """Whether the tensor is (or shares memory with) what the host put out."""
    return _storage(tensor) in seen.outputs


def _watcher(seen: Probe, name: str) -> Any:
    def watch(_module: nn.Module, _args: Any, output: Any) -> None:
        call = seen.calls.setdefault(name, Call(order=len(seen.calls)))
        call.count += 1
        call.output = output

    return watch


def _batch_of(example: tuple[Any, ...]) -> int:
    for tensor in tensors_of(example):
        if tensor.ndim > 0:
            return tensor.shape[0]
    return 0


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in what goes into a model or comes out of it."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from tensors_of(getattr(value, one.name))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
