"""How often the kernels on a site's live path ran, and how long a forward of theirs took.

Every run is counted, which is an addition. Time is taken on the steps that health is sampled on, and so costs no more
than telemetry may. On CUDA it is told by events, which are read when the interval ends: no step waits for the device.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

NUM_WAITING = 256
"""Pairs of CUDA events that are kept unread; beyond that the oldest are given up."""


class Runs(NamedTuple):
    """What one kernel did in an interval.

    Attributes:
        num: its forwards on the live path: those of training steps, of validations, and of replays for other kernels.
        latency_ms: mean time of its forward in training, in milliseconds; None where no step was sampled.
    """

    num: int = 0
    latency_ms: float | None = None


class Meter:
    """Counts and times by seed. A copy of it, as of the model around it, begins anew."""

    def __init__(self) -> None:
        self._num: Counter[str] = Counter()
        self._seconds: dict[str, tuple[float, int]] = {}  # their sum, and how many
        self._waiting: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque(maxlen=NUM_WAITING)

    def __reduce__(self) -> tuple[type[Meter], tuple[()]]:
        return Meter, ()

    def run(
        self, seed_id: str, forward: Callable[[], torch.Tensor], timed_on: torch.device | None = None
    ) -> torch.Tensor:
        """Runs a kernel's forward and counts it.

        Args:
            seed_id: whose kernel.
            forward: its forward; where it raises, nothing is counted.
            timed_on: the device whose time is taken too, the CPU or CUDA; None, or another, takes none.
        """
        if timed_on is None or timed_on.type not in {"cpu", "cuda"}:
            y = forward()
        elif timed_on.type == "cuda":
            y = self._run_on_cuda(seed_id, forward, timed_on)
        else:
            began = perf_counter()
            y = forward()
            self._took(seed_id, perf_counter() - began)
        self._num[seed_id] += 1
        return y

    def runs(self, seed_id: str) -> Runs:
        """What its kernel did since the last `reset`; does not wait for a device."""
        self._read()
        total, num = self._seconds.get(seed_id, (0.0, 0))
        return Runs(self._num[seed_id], 1e3 * total / num if num else None)

    def reset(self) -> None:
        """Begins a new interval. Forwards that a device has not done yet count to that one."""
        self._num.clear()
        self._seconds.clear()

    def _run_on_cuda(self, seed_id: str, forward: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        y = forward()
        end.record(stream)
        self._waiting.append((seed_id, begin, end))
        return y

    def _took(self, seed_id: str, seconds: float) -> None:
        total, num = self._seconds.get(seed_id, (0.0, 0))
        self._seconds[seed_id] = total + seconds, num + 1

    def _read(self) -> None:
        """Reads the events that are over."""
        while self._waiting and self._waiting[0][2].query():
            seed_id, begin, end = self._waiting.popleft()
            self._took(seed_id, begin.elapsed_time(end) / 1e3)
