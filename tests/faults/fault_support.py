"""Runs that are killed on purpose: a small problem, scripts that kill, and how the ends are compared."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.cluster import NAMESPACE
from esper.config import RunConfig, parse_config
from esper.leyline import FaultPlan
from esper.storage import Storage
from esper.tolaria.checkpoint import Checkpoints
from esper.tolaria.workload import Workload
from jobs.workload import ConfiguredWorkload

SITE, BLUEPRINT = "stages.0.0", "residual_conv"
NUM_EPOCHS, STEPS_PER_EPOCH = 8, 16
SLOW_EPOCHS = 12
"""Outside deterministic mode: a kernel is loaded beside the steps there, and an epoch that it misses is one less."""
WAIT_S = 120.0
"""For an actor that is not there yet."""
STAGES = ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZING", "EVALUATING", "FINE_TUNING", "FOSSILIZED"]

# the schedule germinates after epoch 0, so that each of these lies within an epoch, in another part of growth
IN_TRAINING = 1 * STEPS_PER_EPOCH + 8
IN_GRAFTING = 3 * STEPS_PER_EPOCH + 8
IN_FINE_TUNING = 6 * STEPS_PER_EPOCH + 8


def config(storage: Path, **settings: object) -> RunConfig:
    """A run on the digits that grows one kernel by schedule; batch norm, dropout and a schedule of the rate included.

    Args:
        storage: its storage; the signing key lies there too.
        settings: dotted, with `__` for the dot.
    """
    tree = {
        "name": "fault",
        "seed": 3,
        "deterministic": True,
        "storage": str(storage),
        "data": {"type": "digits", "layout": "image"},
        "host": {"type": "cnn", "channels": [4], "blocks_per_stage": 1, "dropout": 0.1},
        "budget": {"params": 20.0, "flops": 20.0},
        "tolaria": {"epochs": NUM_EPOCHS, "optimizer": {"lr": 0.01}, "scheduler": {"type": "cosine"}},
        "kasmina": {"sites": [SITE], "evidence_z": 0.0, "min_training_epochs": 1, "harm_tolerance": 5.0},
        "tamiyo": {"policy": "schedule", "schedule": [{"epoch": 0, "site": SITE, "blueprint": BLUEPRINT}]},
        "tezzeret": {"blueprints": [BLUEPRINT], "key_file": str(storage / "key.pem"), "lease_s": 5.0},
        "nissa": {"view": "quiet"},
    }
    return parse_config(tree, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])


def final_weights(directory: str | Path) -> dict[str, torch.Tensor]:
    """The module's tensors in the last checkpoint, which must be that of the last epoch."""
    found = Checkpoints(Storage.at(directory)).latest()
    assert found is not None
    assert found.epoch == NUM_EPOCHS - 1
    return found.state["session"]["module"]


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit by bit, or are in one of the two alone."""
    names = sorted(one.keys() | other.keys())
    return [name for name in names if name not in one or name not in other or not torch.equal(one[name], other[name])]


def stages(summary: Any) -> list[str]:
    """The stages that the one seed went through, in order."""
    return [event.to_stage.value for event in summary.events if not event.refused]


@dataclass(frozen=True)
class KillSelf:
    """Kills the process that reaches a place, as `kill -9` does, once.

    Attributes:
        place, step: where.
        marker: a file that says that it fired; it outlives the process.
        rank: of the trainer that dies.
    """

    place: str
    step: int
    marker: Path
    rank: int = 0

    def at(self, place: str, step: int) -> None:
        if (place, step) == (self.place, self.step) and self.rank == own_rank() and first_at(self.marker):
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KillActors:
    """Kills the processes of actors from within the trainer, once, as `kill -9` does.

    Attributes:
        place, step: where.
        marker: a file that says that it fired, and the process ids.
        names: beginnings of the actors' names.
        namespace: of the actors.
    """

    place: str
    step: int
    marker: Path
    names: Sequence[str]
    namespace: str = NAMESPACE

    def at(self, place: str, step: int) -> None:
        if (place, step) != (self.place, self.step) or not first_at(self.marker):
            return
        pids = living_pids(self.namespace, self.names)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.marker.write_text(" ".join(map(str, pids)))


@dataclass(frozen=True)
class WatchedWorkload:
    """A configured workload whose model a script of faults can look at, and spoil."""

    config: RunConfig

    def __call__(self) -> Workload:
        workload = ConfiguredWorkload(self.config)()
        _WATCHED["model"] = workload.model
        return workload


_WATCHED: dict[str, torch.nn.Module] = {}


def forget_watched() -> None:
    """Lets go of a run's model: this module travels to workers by value, and native code does not pickle."""
    _WATCHED.clear()


def spoil_watched() -> None:
    """Makes a weight of the watched model NaN."""
    next(_WATCHED["model"].parameters()).data.view(-1)[0] = float("nan")


@dataclass(frozen=True)
class WriteHashes:
    """Kills nobody: writes down at each step what the parameters of this rank are, by name and bit.

    Attributes:
        folder: for one file a rank, a line a step.
        faults: what happens at these places besides.
    """

    folder: Path
    faults: FaultPlan

    def at(self, place: str, step: int) -> None:
        if place == "step":
            digest, names = hashlib.sha256(), []
            for name, parameter in _WATCHED["model"].named_parameters():
                names.append(name)
                digest.update(name.encode() + parameter.detach().numpy().tobytes())
            with (self.folder / f"rank-{own_rank()}").open("a") as file:
                file.write(f"{step} {len(names)} {digest.hexdigest()}\n")
        self.faults.at(place, step)


def drive(folder: Path, config: RunConfig, run_id: str, faults: FaultPlan, **environment: str) -> Any:
    """Trains with a driver of its own, on a Ray of its own unless `environment` says else; returns how it ended.

    Args:
        folder: for the driver's files; `driver` holds its process id.
        config, run_id, faults: of the run.
        environment: of the driver, besides this process's.
    """
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parents[1]), str(here)])
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    file = folder / "job.pickle"
    file.write_bytes(pickle.dumps((config, run_id, faults, folder / "driver")))
    return subprocess.run(
        [sys.executable, here / "driver.py", file], env={**inherited, "PYTHONPATH": path, **environment}, check=False,
        timeout=600, capture_output=True, text=True,
    )  # fmt: skip


def own_rank() -> int:
    """This trainer's rank; 0 where there is but one."""
    from torch import distributed

    return distributed.get_rank() if distributed.is_initialized() else 0


def actor_names(namespace: str, beginnings: Sequence[str]) -> list[str]:
    """Names of the living actors that begin so."""
    import ray

    entries: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    names = [entry["name"] for entry in entries if entry["namespace"] == namespace]
    return sorted(name for name in names if name.startswith(tuple(beginnings)))


def living_pids(namespace: str, beginnings: Sequence[str]) -> list[int]:
    """The processes of the actors whose names begin so, once there is one of each that answers.

    Serve may not be up yet, and what was killed before is listed until Ray knows.
    """
    from ray.exceptions import RayActorError

    until = time.monotonic() + WAIT_S
    while True:
        found = [actor_names(namespace, [beginning]) for beginning in beginnings]
        with contextlib.suppress(ValueError, RayActorError):  # it has just died: another one comes
            if all(found):
                return [pid_of(name, namespace) for names in found for name in names]
        assert time.monotonic() < until, f"not of each of {beginnings} an actor: {found}"
        time.sleep(0.1)


def pid_of(name: str, namespace: str) -> int:
    """The process of a named actor."""
    import ray

    actor = ray.get_actor(name, namespace=namespace)
    pid: Any = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
    return pid


def first_at(marker: Path) -> bool:
    """Whether nobody was here before; from now on somebody was."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
