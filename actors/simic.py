"""Rollouts as Ray actors with a fraction of a CPU each: every one trains small networks, one after the other.

An actor that dies is replaced, and what it played is played again, once; one that takes longer than it may is ended.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from esper.config import RunConfig
from esper.simic.rollouts import Ask, Played
from esper.simic.settings import RolloutConfig

if TYPE_CHECKING:
    from esper.simic.rollouts import Player

_LOG = logging.getLogger(__name__)
_TRIES = 2
_POLL_S = 1.0


class RolloutWorker:
    """Plays episodes; see `esper.simic.rollouts.Player`.

    Args:
        tasks: configurations of runs.
    """

    def __init__(self, tasks: Sequence[RunConfig]) -> None:
        import torch

        torch.set_num_threads(1)
        self._tasks = tasks
        self._player: Player | None = None

    def play(self, ask: Ask) -> Played:
        """Trains one run to its end."""
        from esper.simic.rollouts import Player

        if self._player is None:
            self._player = Player(self._tasks)
        (played,) = self._player.play([ask])
        return played


class RayRollouts:
    """`Rollouts` on the Ray that this process has joined. To be closed.

    Args:
        tasks: configurations of runs.
        config: how many, with what, and how long.
    """

    def __init__(self, tasks: Sequence[RunConfig], config: RolloutConfig) -> None:
        self._tasks, self._config = list(tasks), config
        self._idle: list[Any] = [self._spawn() for _ in range(config.workers)]

    def _spawn(self) -> Any:
        import ray

        worker = ray.remote(RolloutWorker).options(num_cpus=self._config.cpus_per_worker, max_restarts=0)
        return worker.remote(self._tasks)

    def play(self, asks: Sequence[Ask]) -> Iterator[Played]:
        """See `Rollouts`."""
        import ray

        waiting = collections.deque((ask, 1) for ask in asks)
        under_way: dict[Any, tuple[Any, Ask, int, float]] = {}
        while waiting or under_way:
            while waiting and self._idle:
                worker, (ask, tries) = self._idle.pop(), waiting.popleft()
                under_way[worker.play.remote(ask)] = (worker, ask, tries, time.monotonic())
            done, _ = ray.wait(list(under_way), num_returns=1, timeout=_POLL_S)
            for reference in done or self._late(under_way):
                worker, ask, tries, began = under_way.pop(reference)
                played = self._take(reference, worker, ask, time.monotonic() - began)
                if played is not None:
                    yield played
                elif tries < _TRIES:
                    waiting.append((ask, tries + 1))
                else:
                    yield Played(ask, None, f"its worker died {tries} times")

    def _late(self, under_way: dict[Any, tuple[Any, Ask, int, float]]) -> list[Any]:
        now = time.monotonic()
        return [one for one, (_, _, _, began) in under_way.items() if now - began > self._config.deadline_s]

    def _take(self, reference: Any, worker: Any, ask: Ask, seconds: float) -> Played | None:
        """The episode; None if the worker died of it. The worker, or one in its place, is idle again."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            played = cast("Played", ray.get(reference, timeout=_POLL_S))
        except RayActorError as error:
            _LOG.warning("rollout.worker.died", extra={"reason": " ".join(str(error).split())[:200]})
            self._idle.append(self._spawn())
            return None
        except GetTimeoutError:
            ray.kill(worker)
            self._idle.append(self._spawn())
            return Played(ask, None, f"it took longer than {self._config.deadline_s:.0f} s", seconds)
        self._idle.append(worker)
        return played

    def close(self) -> None:
        """Ends the workers."""
        import ray

        for worker in self._idle:
            ray.kill(worker)
        self._idle = []
