"""The program of a compiler process: `python -m esper.tezzeret.child SETTINGS`. Builds one job after the other.

It holds no key and no way to the hub. Its worker writes orders to its standard input and reads answers from its
standard output; whatever else is printed goes to the standard error output, which the worker keeps the end of. It
ends, with all that it has started, when its worker does.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import queue
import resource
import signal
import sys
import threading
import traceback
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict

from esper.leyline.limits import DEFAULT_LIMITS, IRLimits

PR_SET_PDEATHSIG = 1


class Settings(BaseModel):
    """What a worker decides for its compiler.

    Attributes:
        examine: Urabrask's gauntlet, as `module:function`.
        examine_native: its judgement of native code, likewise; None: only FAST kernels are made.
        device: what is compiled for.
        memory_mb: of private memory that this process may ask for, and every other that it starts; None: any.
        num_threads: of torch, and of what it starts.
        limits: what one kernel may cost.
        parent: process id of the worker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    examine: str
    examine_native: str | None = None
    device: str = "cpu"
    memory_mb: int | None = None
    num_threads: int = 1
    limits: IRLimits = DEFAULT_LIMITS
    parent: int


def main(arguments: list[str]) -> None:
    """Says that it is ready, then answers orders until its standard input ends."""
    settings = Settings.model_validate_json(arguments[0])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not end up in an answer
    faulthandler.enable()
    _end_with(settings.parent)
    if settings.memory_mb is not None:
        _limit(resource.RLIMIT_DATA, settings.memory_mb << 20)
    _limit(resource.RLIMIT_CORE, 0)
    orders: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), name="orders", daemon=True).start()
    _serve(settings, orders, answers)


def _serve(settings: Settings, orders: queue.Queue[Any], answers: BinaryIO) -> None:
    import torch

    from esper.tezzeret import wire
    from esper.tezzeret.fingerprint import target_fingerprint

    torch.set_num_threads(settings.num_threads)
    examine = _named(settings.examine)
    examine_native = None if settings.examine_native is None else _named(settings.examine_native)
    _say(answers, wire.Ready(fingerprint=target_fingerprint(settings.device)))
    while True:
        order: wire.Order = orders.get()
        _say(answers, _answer(order, examine, examine_native, settings.limits))


def _named(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def _answer(order: Any, examine: Any, examine_native: Any, limits: IRLimits) -> Any:
    from esper.leyline import BlueprintError, Fault, KernelRejectedError
    from esper.tezzeret import wire
    from esper.tezzeret.compile import build

    try:
        return build(
            order.job, fingerprint=order.fingerprint, examine=examine, examine_native=examine_native, limits=limits
        )
    except (BlueprintError, KernelRejectedError) as error:
        return wire.Refused(reason=str(error))
    except Exception as error:  # noqa: BLE001 -- the process's loop edge: logged, and an answer
        traceback.print_exc()
        words = " ".join(str(error).split())[:300]
        return wire.Broken(fault=Fault.ERROR, reason=f"{type(error).__name__}: {words}")


def _say(answers: BinaryIO, message: Any) -> None:
    from esper.tezzeret import wire

    answers.write(wire.encode(message))
    answers.flush()


def _listen(orders: queue.Queue[Any]) -> None:
    """Reads orders beside the work: at the end of the input this process and all of its group end at once."""
    from esper.tezzeret import wire

    frames = wire.Frames()
    while data := os.read(0, 1 << 16):
        for message in frames.feed(data):
            orders.put(message)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _end_with(parent: int) -> None:
    """Asks Linux to kill this process when its worker dies, should it be too busy to see its input end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _limit(what: int, value: int) -> None:
    _soft, hard = resource.getrlimit(what)
    most = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main(sys.argv[1:])
