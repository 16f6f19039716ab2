"""Native code, opened and called. Whoever opens it has verified where it came from: loading a library runs its code.

A `NativeModule` computes what a module lowered from the IR computes, with that module's own parameters. It checks what
the code itself does not: raw calls of it read tensors of another layout or dtype as if they were right. What the code
cannot compute (autocast, a batch that it was not generated for, another dtype or device) runs from the IR.

Opened libraries stay open until the process ends: a library that is closed and whose file descriptor is used again
would be found under its old name.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from esper.leyline.errors import KernelRejectedError
from esper.leyline.native import BACKWARD, FORWARD, FRESH, OUTPUT, NativeFacts
from esper.leyline.target import target_here

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class NativeKernel:
    """The two libraries of one kernel. Stateless: copies share it, and it does not pickle.

    Attributes:
        name: of the content, such as the kernel's id.
        facts: from its manifest.
        is_proven: whether it was tried against its module in this process, and did well.
    """

    def __init__(self, name: str, facts: NativeFacts, forward: Run, backward: Run) -> None:
        self.name = name
        self.facts = facts
        self.is_proven = False
        self.forward = forward
        self.backward = backward
        self._dtype = getattr(torch, facts.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> NativeKernel:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"native code of kernel {self.name[:12]} does not pickle: keep its parameters and its id")

    def conflict(self, h: torch.Tensor) -> str | None:
        """Why it will compute no input of this kind; None if it may. Any layout of h will do."""
        facts, device = self.facts, h.device.type
        if torch.is_autocast_enabled(device):
            return f"autocast is active, and native code computes in {facts.dtype}"
        if h.dtype != self._dtype:
            return f"h is {h.dtype}, and native code computes in {facts.dtype}"
        if device != facts.target.device:
            return f"h is on {device}, and native code runs on {facts.target.device}"
        if h.shape[1:] != facts.shape:
            return f"a sample of h is {tuple(h.shape[1:])}, and native code takes {facts.shape}"
        return None

    def exception(self, h: torch.Tensor) -> str | None:
        """Why it does not compute this very input; None if it can."""
        facts = self.facts
        if not facts.min_batch <= h.shape[0] <= facts.max_batch:
            return f"a batch of {h.shape[0]} is outside {facts.min_batch} to {facts.max_batch}"
        if torch._C._len_torch_dispatch_stack():  # noqa: SLF001 - it has no public name
            return "its ops are being watched, and one cannot see into native code"
        return None


class NativeModule:
    """A module and native code for it: called with h, it computes `module(h)`, by the code wherever the code can.

    It reads the module's present parameters at each call, so `functional_call`, optimizers and DDP see one set of
    parameters only. Not an `nn.Module`: it owns nothing.

    Attributes:
        conflict: why the last call ran from the IR, and the next of its kind will; None if they do not.
        exception: why the last call alone did.
    """

    def __init__(self, kernel: NativeKernel, module: nn.Module) -> None:
        self.kernel = kernel
        self.module = module
        self.conflict: str | None = None
        self.exception: str | None = None
        self._owners = [_owner(module, name) for name in kernel.facts.parameters]

    @property
    def fallback(self) -> str | None:
        """Why the last call ran from the IR; None if it ran natively."""
        return self.conflict or self.exception

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """Computes `module(h)`. Gradients reach the parameters and h; native code has no second derivative."""
        self.conflict = self.kernel.conflict(h)
        self.exception = None if self.conflict else self.kernel.exception(h)
        if self.conflict or self.exception:
            return self.module(h)
        # `_parameters`, not getattr: a quarter of the cost, and `functional_call` swaps tensors there
        parameters = [owner._parameters[name] for owner, name in self._owners]  # noqa: SLF001
        y = _Call.apply(self.kernel, h, *parameters)
        assert isinstance(y, torch.Tensor)
        return y


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


class _Call(torch.autograd.Function):
    """h and y are saved too where something that is saved shares their memory: then torch finds out if anyone wrote
    into them before the backward, as it does for its own ops.
    """

    @staticmethod
    def forward(ctx: Any, kernel: NativeKernel, h: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        facts = kernel.facts
        inputs = [*(parameter.contiguous() for parameter in parameters), h.contiguous()]
        y, *fresh = kernel.forward(inputs)
        rest = iter(fresh)
        saved = [next(rest) if at == FRESH else y if at == OUTPUT else inputs[at] for at in facts.saved]
        if facts.keeps_input:
            saved.append(inputs[-1])
        if facts.keeps_output:
            saved.append(y)
        ctx.kernel = kernel
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides its names
        ctx: Any, *tangents: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        kernel: NativeKernel = ctx.kernel
        facts = kernel.facts
        saved = ctx.saved_tensors[: len(facts.saved)]
        found = kernel.backward([*saved, tangents[0].contiguous()])
        gradients: list[torch.Tensor | None] = [None] * (len(facts.parameters) + 1)
        for at, gradient in zip(facts.gradients, found, strict=True):
            gradients[at] = gradient
        return None, gradients[-1], *gradients[:-1]


_OPENED: dict[str, NativeKernel] = {}
_LOCK = threading.Lock()


def open_native(name: str, facts: NativeFacts, payload: Mapping[str, bytes]) -> NativeKernel:
    """Loads both libraries, once a process for each `name`. The caller has verified the container they came in.

    Args:
        name: of the content, such as the kernel's id.
        facts: from the manifest.
        payload: the container's native members.

    Raises:
        KernelRejectedError: if they are for another machine or build, are not all there, or do not load.
    """
    misfit = facts.target.misfit(target_here(facts.target.device))
    if misfit is not None:
        raise KernelRejectedError(misfit, field="native.target")
    if not facts.is_consistent:
        raise KernelRejectedError("the description of its native code contradicts itself", field="native")
    with _LOCK:
        if name not in _OPENED:
            _OPENED[name] = NativeKernel(name, facts, _open(facts, FORWARD, payload), _open(facts, BACKWARD, payload))
        return _OPENED[name]


def _open(facts: NativeFacts, which: str, payload: Mapping[str, bytes]) -> Run:
    library = payload.get(facts.member(which))
    if library is None:
        raise KernelRejectedError("the container has no such member", field=facts.member(which))
    proxy = payload.get(facts.member(which, "json"))
    try:
        if proxy is None:
            return _runner(_in_memory(library), facts.target.device)
        # torch looks for the JSON by the library's own path; a loaded library needs its file no more
        with tempfile.TemporaryDirectory(prefix="esper-kernel-") as folder:
            path = Path(folder) / "kernel.so"
            path.write_bytes(library)
            path.with_suffix(".json").write_bytes(proxy)
            return _runner(str(path), facts.target.device)
    except (OSError, RuntimeError) as error:
        words = " ".join(str(error).split())[:300]
        raise KernelRejectedError(f"the library does not load: {words}", field=facts.member(which)) from error


def _runner(path: str, device: str) -> Run:
    runners: Any = torch._C._aoti  # pyright: ignore[reportAttributeAccessIssue] # noqa: SLF001 - torch has no public one
    if device == "cuda":
        return runners.AOTIModelContainerRunnerCuda(path, 1, "cuda").run
    return runners.AOTIModelContainerRunnerCpu(path, 1).run


def _in_memory(library: bytes) -> str:
    """An anonymous file: nobody can change it between the check and the loading."""
    descriptor = os.memfd_create("esper-kernel", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(library)
    return f"/proc/self/fd/{descriptor}"
