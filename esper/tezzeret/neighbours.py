"""Who shares the cores of a compiler: trainers that take steps, and how much nobody uses. Reads Linux's own counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from esper.leyline.presence import trainers

LOOK_EVERY_S = 0.5
"""Counts over a shorter time say nothing: Linux keeps them in hundredths of a second."""


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What was seen.

    Attributes:
        num_trainers: that take steps on cores which the compiler may use too.
        free_cores: of those, what nobody but the compiler uses; 1.5 is one and a half.
    """

    num_trainers: int = 0
    free_cores: float = 0.0


class Watch:
    """Looks at the cores that this process may use, at most every `LOOK_EVERY_S`.

    Args:
        family: the processes of the compiler.
        folder: see `presence.trainers`.
    """

    def __init__(self, family: Callable[[], list[int]], folder: Path | None = None) -> None:
        self._family = family
        self._folder = folder
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
        self._seen = Neighbours()
        self._at = 0.0
        self._idle_s, self._own_s = self._counts()

    def look(self) -> Neighbours:
        """The newest picture."""
        now = time.monotonic()
        if now - self._at >= LOOK_EVERY_S:
            idle_s, own_s = self._counts()
            # a process that ended took its count with it, and Linux's own of idle seconds may go back
            used_s = max(idle_s - self._idle_s, 0.0) + max(own_s - self._own_s, 0.0)
            free = min(used_s / (now - self._at), float(len(self._cores))) if self._at else 0.0
            self._seen = Neighbours(sum(map(self._shares, self._busy())), free)
            self._at, self._idle_s, self._own_s = now, idle_s, own_s
        return self._seen

    def _busy(self) -> list[int]:
        return [trainer.pid for trainer in trainers(self._folder) if trainer.is_busy]

    def _shares(self, pid: int) -> bool:
        with suppress(OSError):
            return not self._cores.isdisjoint(os.sched_getaffinity(pid))
        return False

    def _counts(self) -> tuple[float, float]:
        """Seconds that the cores were idle, and that the compiler used, since ever."""
        tick = os.sysconf("SC_CLK_TCK")
        idle = 0
        with suppress(OSError):
            for line in Path("/proc/stat").read_text().splitlines():
                name, *counts = line.split()
                if name.removeprefix("cpu").isdigit() and int(name.removeprefix("cpu")) in self._cores:
                    idle += int(counts[3]) + int(counts[4])
        own = 0
        for pid in self._family():
            with suppress(OSError, IndexError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own += sum(map(int, fields[11:15]))  # its own and that of what it waited for
        return idle / tick, own / tick
