"""Kernels that pass Urabrask and turn bad in the trainer, and what a run made of them.

The compiler and its gauntlet see the honest design. The hook stands in the trainer: `Battery.hooked` lets what
Kasmina lowers from the design's IR misbehave, after a graft, a rollback or a resume alike. What is wrong with a
kernel's weights is put there by an examiner that passes everything.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from esper.api import train_local
from esper.config import RunConfig, parse_config
from esper.kasmina import loader as kasmina_loader
from esper.kasmina import snapshot as kasmina_snapshot
from esper.kasmina.sites import find_sites
from esper.kasmina.warm_up import WARM_UP_BATCH
from esper.leyline import BlueprintIR, Check, EsperError, Node, SiteKind, SiteSignature, ValidationReport
from esper.leyline.canonical import canonical_hash
from esper.leyline.lower import lower
from esper.storage import Storage
from esper.tamiyo.controller import LocalController
from esper.tezzeret.builder import InProcess
from esper.tezzeret.worker import Idle, work_once
from esper.tolaria import snapshot
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.tree import clone
from esper.urabrask.gauntlet import examine
from esper.urza.library import load_library
from esper.urza.memory import MemoryHub
from jobs.workload import ConfiguredWorkload

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SITE = {"mlp": "blocks.0", "cnn": "stages.0.0"}
EPOCHS = 24
"""The kernel germinates after epoch 1 and is permanent at 8 at the earliest; what a rollback loses can be made up."""
HOG_BYTES = 256 << 20
LEAK_BYTES = 4 << 20
SLEEP_S = 0.15
"""What a slow kernel sleeps: a step of the host takes 1 to 3 ms."""

Hook = Callable[[nn.Module, torch.Tensor, torch.Tensor, "Seen"], torch.Tensor]
"""(kernel, h, its output, what it saw) to what it puts out instead."""


@dataclass
class Seen:
    """What one module of a bad kernel has seen: forwards in all, and those on the live path of a training step."""

    calls: int = 0
    live: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)


def _live(h: torch.Tensor) -> bool:
    return h.requires_grad  # a shadow's is cut off, and validation takes no gradient


class _Crooked(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.factor * gradient, None


def _own(kernel: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.fill_(value)


def _raise(error: Exception) -> torch.Tensor:
    raise error


# ---------------------------------------------------------------- the bad ones


def _nan_in_training(_kernel, _h, y, seen):
    return y * float("nan") if seen.calls > 24 else y


def _nan_when_live(_kernel, _h, y, seen):
    return y * float("nan") if seen.live > 20 else y


def _nan_in_eval(kernel, _h, y, seen):
    return y * float("nan") if seen.live > 20 and not kernel.training else y


def _explodes(_kernel, _h, y, seen):
    return y * 1.3**seen.live


def _dead(_kernel, _h, y, _seen):
    return 0.0 * y


def _great_weights(kernel, _h, y, seen):
    if seen.live > 5 and not kernel.training:
        _own(kernel, 1e15)  # not amid a step, where autograd would notice
    return y


def _wrong_scale(_kernel, h, y, _seen):
    return 1e4 * (y + 0.1 * h.flip(-1))


def _scale_jumps(_kernel, h, y, seen):
    return y + 100.0 * h.flip(-1) if seen.live > 45 else y


def _gradient_upstream(_kernel, h, y, _seen):
    return y + (_Crooked.apply(h, -30.0) - h)


def _gradient_upstream_late(_kernel, h, y, seen):
    return y + (_Crooked.apply(h, -30.0) - h) if seen.live > 12 else y


def _gradient_of_weights(_kernel, _h, y, _seen):
    return _Crooked.apply(y, -3.0)


def _gradient_nan(_kernel, h, y, seen):
    return y + (_Crooked.apply(h, float("nan")) - h) if seen.live > 10 else y


def _slow(_kernel, _h, y, seen):
    if seen.calls > 20:
        time.sleep(SLEEP_S)
    return y


def _hog(_kernel, _h, y, _seen):
    return y + torch.ones(HOG_BYTES // 4)[0] - 1.0


def _leak(_kernel, _h, y, seen):
    seen.kept = [*seen.kept[-50:], torch.ones(LEAK_BYTES // 4)]
    return y


def _out_of_memory(_kernel, _h, y, seen):
    return _raise(MemoryError("no more")) if seen.live > 8 else y


def _shape_in_eval(kernel, _h, y, _seen):
    return y if kernel.training else y[..., :-1]


def _shape_in_great_eval(kernel, _h, y, _seen):
    return y if kernel.training or len(y) <= 2 else y[..., :-1]


def _shape_when_live(_kernel, _h, y, seen):
    return y[..., :-1] if seen.live > 12 else y


def _shape_in_late_eval(kernel, _h, y, seen):
    return y[..., :-1] if seen.live > 12 and not kernel.training else y


def _dtype_when_live(_kernel, _h, y, seen):
    return y.double() if seen.live > 12 else y


def _dice(_kernel, _h, y, _seen):
    return y + torch.frombuffer(bytearray(os.urandom(y.numel())), dtype=torch.uint8).view_as(y).float() / 255.0


def _late_dice(kernel, h, y, seen):
    return _dice(kernel, h, y, seen) if seen.live > 12 else y


def _identity(_kernel, h, _y, _seen):
    return h


def _raises_in_training(_kernel, _h, y, seen):
    return _raise(ValueError("no")) if seen.calls > 24 else y


HOOKS: Mapping[str, Hook] = {
    "nan_in_training": _nan_in_training,
    "nan_when_live": _nan_when_live,
    "nan_in_eval": _nan_in_eval,
    "explodes": _explodes,
    "dead": _dead,
    "great_weights_when_live": _great_weights,
    "wrong_scale": _wrong_scale,
    "scale_jumps_when_live": _scale_jumps,
    "gradient_upstream_reversed": _gradient_upstream,
    "gradient_upstream_reversed_when_live": _gradient_upstream_late,
    "gradient_of_weights_reversed": _gradient_of_weights,
    "gradient_nan_when_live": _gradient_nan,
    "slow": _slow,
    "memory_hog": _hog,
    "memory_leak": _leak,
    "out_of_memory_when_live": _out_of_memory,
    "shape_shifts_in_eval": _shape_in_eval,
    "shape_shifts_in_great_eval": _shape_in_great_eval,
    "shape_shifts_when_live": _shape_when_live,
    "shape_shifts_in_late_eval": _shape_in_late_eval,
    "dtype_shifts_when_live": _dtype_when_live,
    "non_deterministic": _dice,
    "non_deterministic_when_live": _late_dice,
    "identity": _identity,
    "raises_in_training": _raises_in_training,
}
WEIGHTS: Mapping[str, float] = {"nan_at_birth": float("nan"), "great_weights": 1e15}
"""Kernels that behave, with such weights."""
BAD = (*WEIGHTS, *HOOKS)
USEFUL = {
    "mlp": ("mlp_2x", "mlp_4x", "mlp_adapter", "low_rank_adapter", "gated_mlp", "norm_scale"),
    "cnn": ("residual_conv", "bottleneck", "conv_heavy", "conv_light", "conv_small", "depthwise_se"),
}


def design(name: str) -> BlueprintIR:
    """An honest MLP, of a width of its own: by the hash of its IR a bad kernel is known wherever it is lowered."""
    width = 17 + BAD.index(name)
    return BlueprintIR(
        fit=(SiteKind.VECTOR,),
        nodes=(
            Node(id="up", op="linear", params={"out": width}),
            Node(id="act", op="gelu", inputs=("up",)),
            Node(id="down", op="linear", inputs=("act",), params={"out": "C", "init": "zeros"}),
        ),
        output="down",
        zero_at_birth=True,
    )


# ---------------------------------------------------------------- a run


@dataclass(frozen=True)
class Row:
    """What one run came to; `kernel` is `none` for the control.

    Attributes:
        status: `finished`, or the error.
        val_loss: after the last epoch.
        stages: the seed's, in order.
        reasons: why the seed went where it went.
        same_host: the host's weights at the end are bit by bit those of the control of this seed.
        rollbacks: how often the governor went back.
        inexact: rollbacks after which anything was not as in the snapshot.
    """

    kernel: str
    host: str
    seed: int
    status: str
    val_loss: float
    stages: list[str]
    reasons: list[str]
    same_host: bool
    rollbacks: int
    inexact: int
    seconds: float


class Battery:
    """Runs kernels, and keeps the rows of finished runs in a folder: it goes on there.

    Args:
        folder: for the rows; None keeps none.
        say: takes a line for each finished run.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._hosts: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, kernel: str, host: str, seed: int) -> Row:
        """One run, or its row if it was run before."""
        path = None if self._folder is None else self._folder / f"{kernel}-{host}-{seed}.json"
        if path is not None and path.exists():
            return Row(**json.loads(path.read_text()))
        if kernel != "none":
            self._control(host, seed)
        row = self._run(kernel, host, seed)
        self._say(f"{row.kernel} on {row.host}, seed {row.seed}: {row.status}, {row.val_loss:.4f}, "
                  f"{row.stages[-1:]}, {row.rollbacks} rollbacks, {row.seconds:.1f} s; {row.reasons[-1:]}")  # fmt: skip
        if path is not None:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(row)))
            partial.rename(path)
        return row

    def _control(self, host: str, seed: int) -> dict[str, torch.Tensor]:
        if (host, seed) not in self._hosts:
            self._run("none", host, seed)
        return self._hosts[host, seed]

    def _run(self, kernel: str, host: str, seed: int) -> Row:
        chosen = config(kernel, host, seed)
        workload = ConfiguredWorkload(chosen)()
        hub = None if kernel == "none" else stocked(kernel, find_sites(
            workload.model, workload.example, sites=chosen.kasmina.sites)[SITE[host]])  # fmt: skip
        rollbacks: list[bool] = []
        began, status, val_loss = time.perf_counter(), "finished", float("nan")
        with tempfile.TemporaryDirectory() as directory, hooked(), witnessed(rollbacks):
            try:
                summary = train_local(
                    workload, chosen, directory=directory, run_id="run", hub=hub, bus=None,
                    controller=LocalController(chosen.tamiyo, seed=seed),
                    public_key=KEY.public_key().public_bytes_raw(),
                )  # fmt: skip
            except EsperError as error:
                status = f"{type(error).__name__}: {error}"
                events = ()
            else:
                val_loss, events = summary.metrics.val_loss, summary.events
                found = Checkpoints(Storage.at(directory)).latest()
                assert found is not None
                weights = {n: t for n, t in found.state["session"]["module"].items() if not n.startswith("_esper.")}
        if status == "finished" and kernel == "none":
            self._hosts[host, seed] = weights
        moves = [event for event in events if not event.refused]
        return Row(
            kernel=kernel,
            host=host,
            seed=seed,
            status=status,
            val_loss=val_loss,
            stages=[event.to_stage.value for event in moves],
            reasons=[event.reason for event in events],
            same_host=status == "finished" and same(weights, self._hosts[host, seed]),
            rollbacks=len(rollbacks),
            inexact=rollbacks.count(False),
            seconds=time.perf_counter() - began,
        )


def config(kernel: str, host: str, seed: int) -> RunConfig:
    """A run on the digits that grows this kernel by schedule; the limits are the defaults.

    A slow kernel is none in deterministic mode, where no clock decides: that one runs outside of it.
    """
    hosts = {"mlp": {"type": "mlp", "hidden": [16, 16]}, "cnn": {"type": "cnn", "channels": [6, 6]}}
    grafts = [] if kernel == "none" else [{"epoch": 1, "site": SITE[host], "blueprint": kernel}]
    return parse_config(
        {
            "seed": seed,
            "deterministic": kernel != "slow",
            "data": {"type": "digits", "layout": "flat" if host == "mlp" else "image"},
            "host": hosts[host],
            "budget": {"params": 100.0, "flops": 100.0},
            "tolaria": {"epochs": EPOCHS, "optimizer": {"lr": 0.003}},
            "kasmina": {"sites": [SITE[host]]},
            "tamiyo": {"policy": "schedule", "schedule": grafts} if grafts else {"policy": "none"},
            "tezzeret": {"blueprints": [kernel] if grafts else []},
        },
        [],
    )


def stocked(kernel: str, signature: SiteSignature) -> MemoryHub:
    """A hub with this one kernel; a bad one is passed by an examiner that spoils it where its weights are bad."""
    hub = MemoryHub()
    ir = design(kernel) if kernel in BAD else load_library()[kernel].ir

    def pass_all(module: nn.Module, _ir: BlueprintIR, _signature: SiteSignature) -> ValidationReport:
        if kernel in WEIGHTS:
            _own(module, WEIGHTS[kernel])
        return ValidationReport(checks=(Check(name="hook", passed=True),))

    hub.submit_blueprint(ir, name=kernel, targets=[signature], submitted_by="a test")
    builder = InProcess(pass_all if kernel in BAD else examine)
    with torch.random.fork_rng(devices=[]):
        while not isinstance(work_once(hub, builder, worker="a test", private_key=KEY), Idle):
            pass
    assert hub.kernel_briefs(signature)
    return hub


@contextmanager
def hooked() -> Iterator[None]:
    """Within it, what Kasmina lowers from the IR of a bad kernel is bad."""
    hooks = {canonical_hash(design(name)): hook for name, hook in HOOKS.items()}

    def lower_bad(ir: BlueprintIR, signature: SiteSignature) -> nn.Module:
        module = lower(ir, signature)
        hook = hooks.get(canonical_hash(ir))
        if hook is not None:
            seen = Seen()

            def misbehave(kernel: nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
                seen.calls += 1
                seen.live += _live(args[0]) and len(args[0]) > WARM_UP_BATCH
                return hook(kernel, args[0], y, seen)

            module.register_forward_hook(misbehave)
        return module

    with patch.object(kasmina_loader, "lower", lower_bad), patch.object(kasmina_snapshot, "lower", lower_bad):
        yield


@contextmanager
def witnessed(rollbacks: list[bool]) -> Iterator[None]:
    """Within it, each return to a snapshot notes whether all is bit by bit as it was there."""
    give_back = snapshot.give_back

    def witness(state: Mapping[str, Any], growable: Any, optimization: Any) -> None:
        kept = clone(state)
        give_back(state, growable, optimization)
        now = snapshot.take(growable, optimization)
        rollbacks.append(all(_equal(now[key], kept[key]) for key in ("module", "optimization", "rng")))

    with patch.object(snapshot, "give_back", witness):
        yield


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Bit by bit, name by name."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if hasattr(one, "tobytes"):
        return one.tobytes() == other.tobytes()
    return one == other


def controls(battery: Battery, host: str, seeds: Iterable[int]) -> list[Row]:
    """The runs that do not grow."""
    return [battery.run("none", host, seed) for seed in seeds]


def table(rows: Iterable[Row]) -> str:
    """A line for each kernel, for the log."""
    lines = []
    for kernel, group in itertools.groupby(sorted(rows, key=lambda row: row.kernel), key=lambda row: row.kernel):
        found = list(group)
        losses = ", ".join(f"{row.val_loss:.3f}" for row in found)
        ends = " ".join(sorted({(row.stages or ["-"])[-1] for row in found}))
        lines.append(f"{kernel:30} {losses}  {ends}  {sum(row.rollbacks for row in found)} rollbacks")
    return "\n".join(lines)
