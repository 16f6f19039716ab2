"""Random plans of chaos: who dies, or that the storage fails, and where in a run on Ray.

A plan is drawn from its number. Every victim meets every place once; the mode, the step, the number of workers and the
rank that dies are drawn.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fault_support import (
    NUM_EPOCHS,
    STEPS_PER_EPOCH,
    first_at,
    living_pids,
    own_rank,
    spoil_watched,
)

VICTIMS = ("worker", "driver", "urza", "oona", "tamiyo", "compiler", "storage")
PLACES = ("step", "grafting", "swapping", "checkpoint", "rolling_back")
NUM_PLANS = len(VICTIMS) * len(PLACES)

SICK_STEP = 4 * STEPS_PER_EPOCH + 5
"""A run that is to go back meets a NaN here, in the host's weights, while its kernel is blended in."""
PACE_S = 0.05
"""Added to a step of a run that is to swap: native code is opened beside it, and must be there before it ends."""
OUTAGE_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What is done to a run.

    Attributes:
        number: its seed.
        victim: one of `VICTIMS`; the storage is no process: it fails for `OUTAGE_S`.
        place: one of `PLACES`.
        step: at `step` the step, at `checkpoint` the epoch; None is the first time that the run comes there.
        deterministic: the mode of the run; native code never swaps in the deterministic one.
        num_workers: of the trainer.
        rank: of the worker that is there, and of the one that dies.
    """

    number: int
    victim: str
    place: str
    step: int | None
    deterministic: bool
    num_workers: int
    rank: int

    @classmethod
    def drawn(cls, number: int) -> Plan:
        """The plan of a number below `NUM_PLANS`."""
        pairs = list(product(VICTIMS, PLACES))
        random.Random("chaos").shuffle(pairs)
        victim, place = pairs[number]
        draw = random.Random(f"chaos-{number}")
        deterministic = draw.random() < 0.6 and place != "swapping"
        num_workers = draw.choice({"worker": (1, 2), "driver": (0, 1)}.get(victim, (0, 0, 1)))
        # rank 0 alone writes checkpoints
        rank = draw.randrange(num_workers) if num_workers and place != "checkpoint" else 0
        step = {"step": draw.randrange(NUM_EPOCHS * STEPS_PER_EPOCH), "checkpoint": draw.randrange(NUM_EPOCHS)}
        return cls(number, victim, place, step.get(place), deterministic, num_workers, rank)

    @property
    def kind(self) -> str:
        """Which undisturbed run it is compared with: `plain`, `sick` (it meets a NaN) or `swap`."""
        return {"rolling_back": "sick", "swapping": "swap"}.get(self.place, "plain")

    def is_at(self, place: str, step: int) -> bool:
        """Whether it strikes at this place of a `FaultPlan`."""
        wanted = "writing" if self.place == "checkpoint" else self.place
        return place == wanted and self.step in (None, step)

    def __str__(self) -> str:
        where = self.place if self.step is None else f"{self.place} {self.step}"
        mode = "deterministic" if self.deterministic else "ordinary"
        return f"{self.number}: {self.victim} at {where}, {mode}, {self.num_workers} workers"


@dataclass(frozen=True)
class Chaos:
    """The `FaultPlan` of a plan; strikes once in the run's life, whoever carries it.

    Attributes:
        kind: see `Plan.kind`.
        folder: for the marks that it leaves; outlives every process.
        plan: None disturbs nobody.
        storage: the run's storage.
        key: what the names of its actors carry.
    """

    kind: str
    folder: Path
    plan: Plan | None = None
    storage: Path = Path()
    key: str = ""

    def at(self, place: str, step: int) -> None:
        if (self.kind, place, step) == ("sick", "step", SICK_STEP):
            spoil_watched()
        if self.kind == "swap" and place == "step":
            time.sleep(PACE_S)
        plan = self.plan
        if plan is not None and plan.is_at(place, step) and own_rank() == plan.rank and first_at(self.fired):
            self._strike(plan)

    @property
    def fired(self) -> Path:
        """There once it has struck; holds the processes that it killed."""
        return self.folder / "fired"

    @property
    def driver(self) -> Path:
        """Holds the driver's process id."""
        return self.folder / "driver"

    @property
    def mended(self) -> Path:
        """There once the storage is whole again."""
        return self.folder / "mended"

    def _strike(self, plan: Plan) -> None:
        if plan.victim == "storage":
            self.fired.write_text(str(OUTAGE_S))
            fail_for(self.storage, OUTAGE_S, self.mended)
            return
        pids = self._victims(plan.victim)
        self.fired.write_text(" ".join(map(str, pids)))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def _victims(self, victim: str) -> list[int]:
        if victim == "worker":
            return [os.getpid()]
        if victim == "driver":
            return [int(self.driver.read_text())]
        beginning, namespace = {
            "urza": (f"urza-{self.key}", "esper"),
            "oona": (f"oona-{self.key}", "esper"),
            "compiler": (f"tezzeret-{self.key}", "esper"),
            "tamiyo": ("SERVE_REPLICA::tamiyo#", "serve"),
        }[victim]
        return living_pids(namespace, [beginning])


@dataclass(frozen=True)
class Row:
    """What a plan came to.

    Attributes:
        seconds: from the run's start to its last end.
        killed: processes.
        outcome: `bit-equal`, or the validation loss and the spread that it lies within.
        went_without: what the summary says.
    """

    plan: int
    victim: str
    place: str
    mode: str
    workers: int
    seconds: float
    killed: int
    outcome: str
    went_without: tuple[str, ...]


def fail_for(folder: Path, seconds: float, mended: Path) -> None:
    """Puts a file where a folder was, atomically, for a while: nothing below it can be read or written.

    A process of its own puts the folder back, whatever becomes of this one.
    """
    stand_in = folder.with_name(f"{folder.name}.away")
    stand_in.touch()
    exchange = [sys.executable, "-S", "-c", _EXCHANGE, str(folder), str(stand_in)]
    subprocess.run([*exchange, "0"], check=True)
    # by way of a shell, whose child nobody has to wait for
    beside = ["sh", "-c", '"$0" "$@" &', *exchange, str(seconds), str(mended)]
    subprocess.run(beside, check=True, start_new_session=True)


_EXCHANGE = """
import ctypes, os, sys, time
one, other, seconds, *mended = sys.argv[1:]
time.sleep(float(seconds))
here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: Linux lets two names change places at once
libc = ctypes.CDLL(None, use_errno=True)
if libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), swap):
    raise OSError(ctypes.get_errno(), f"cannot exchange {one} and {other}")
for path in mended:
    os.unlink(other)
    open(path, "w").close()
"""
