"""Trials in the run's own process, one fork after the other, while the run waits: for benchmarks and tests.

On Ray forks train on other processes' cores, beside the run; see `actors.trials`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from esper.leyline.trials import Fork, ForkResult
from esper.tolaria.numerics import rng_state, set_rng_state

RunFork = Callable[[bytes, Fork], ForkResult]
"""From a packed state and what to do to what it came to; `esper.api.fork_local` with the rest filled in."""


class TrialsHere:
    """A `Trials` that runs each fork at once; the caller's random state stays as it was.

    Args:
        run: runs one fork.
        room: how many forks may begin at once.
    """

    def __init__(self, run: RunFork, *, room: Callable[[], int] = lambda: 1) -> None:
        self._run = run
        self._room = room
        self._results: dict[str, ForkResult] = {}

    def idle(self) -> int:
        """See `Trials`."""
        return self._room()

    def start(self, checkpoint: bytes, forks: Sequence[Fork]) -> None:
        """Runs all forks; see `Trials`."""
        before = rng_state()
        try:
            self._results = {fork.fork_id: self._run(checkpoint, fork) for fork in forks}
        finally:
            set_rng_state(before)

    def results(self) -> Mapping[str, ForkResult]:
        """See `Trials`."""
        return self._results

    def cancel(self, reason: str) -> Mapping[str, ForkResult]:
        """Nothing runs any more; see `Trials`."""
        del reason
        return self._results
