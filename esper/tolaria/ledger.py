"""The running account of a run: FLOPs and seconds of everything, by purpose.

Knows neither torch nor how FLOPs are counted (`esper.tolaria.flops`); it adds, and its totals are sums by
construction. Seconds of a nested purpose are taken off the purpose around it, so that no second counts twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from esper.leyline.summary import Flops, Ledger, Seconds

FLOP_PURPOSES = tuple(name for name in Flops.model_fields if name != "total")
SECOND_PURPOSES = tuple(name for name in Seconds.model_fields if name != "total")


class LedgerBook:
    """Adds up costs by purpose: `host`, `shadow`, `telemetry`, `validation`; for seconds also `control`, `checkpoint`.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._flops = dict.fromkeys(FLOP_PURPOSES, 0)
        self._seconds = dict.fromkeys(SECOND_PURPOSES, 0.0)
        self._nested: list[float] = []  # seconds already booked inside each open `timed` block

    def add(self, purpose: str, *, flops: int = 0, seconds: float = 0.0) -> None:
        """Books a cost.

        Raises:
            ValueError: for an unknown purpose, FLOPs under a purpose that has none, or a cost that is negative
                or not finite.
        """
        if purpose not in self._seconds:
            raise ValueError(f"unknown purpose {purpose!r}; one of {', '.join(SECOND_PURPOSES)}")
        if flops and purpose not in self._flops:
            raise ValueError(f"{purpose} has no FLOPs; one of {', '.join(FLOP_PURPOSES)}")
        if flops < 0 or not math.isfinite(seconds) or seconds < 0:
            raise ValueError(f"a cost is finite and not negative, got {flops} FLOPs and {seconds} s")
        if flops:
            self._flops[purpose] += int(flops)
        self._seconds[purpose] += float(seconds)

    @contextmanager
    def timed(self, purpose: str) -> Iterator[None]:
        """Books the wall-clock seconds of the block, less those of `timed` blocks within it; also when it raises."""
        self.add(purpose)  # an unknown purpose fails before the work, not after it
        start = self._clock()
        self._nested.append(0.0)
        try:
            yield
        finally:
            elapsed = self._clock() - start
            within = self._nested.pop()
            self.add(purpose, seconds=max(0.0, elapsed - within))
            if self._nested:
                self._nested[-1] += elapsed

    def take_flops(self) -> Flops:
        """Returns the FLOPs so far and begins again from none."""
        taken = self.snapshot().flops
        self._flops = dict.fromkeys(FLOP_PURPOSES, 0)
        return taken

    def book(self, flops: Flops) -> None:
        """Adds what another account had under each purpose."""
        for purpose in FLOP_PURPOSES:
            self.add(purpose, flops=getattr(flops, purpose))

    def snapshot(self) -> Ledger:
        """Returns the account so far; the totals are the sums of the purposes."""
        return Ledger(
            flops=Flops(**self._flops, total=sum(self._flops.values())),
            seconds=Seconds(**self._seconds, total=sum(self._seconds.values())),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the account as JSON values. Blocks that are open now are not in it."""
        return {"flops": dict(self._flops), "seconds": dict(self._seconds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the account by one from `state_dict`.

        Raises:
            ValueError: if the state has other purposes than this version.
        """
        flops, seconds = dict(state["flops"]), dict(state["seconds"])
        for account in (flops, seconds):
            account.setdefault("trials", 0)  # younger than the first checkpoints
        if set(flops) != set(self._flops) or set(seconds) != set(self._seconds):
            raise ValueError(f"the ledger's state has purposes {sorted(flops)} and {sorted(seconds)}")
        self._flops = {purpose: int(value) for purpose, value in flops.items()}
        self._seconds = {purpose: float(value) for purpose, value in seconds.items()}
