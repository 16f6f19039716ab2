"""Rollouts: an episode is a real training of a small network under a policy. Plays them in this process; knows no Ray.

Runs are deterministic: the same ask is the same episode, and a run and its twin without growth have the same host
weights, data and order, so what differs between them is growth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from esper.config import RunConfig, TamiyoConfig, load_config
from esper.leyline import (
    AdaptationSignal,
    AssetHub,
    Controller,
    EpochRecord,
    FieldReport,
    PolicyCard,
    SystemStatePacket,
    new_id,
)
from esper.simic.experience import about_run
from esper.simic.explorer import POLICY, Explorer
from esper.simic.moments import About, Episode, Moment
from esper.simic.reward import Twin
from esper.simic.settings import TrainTamiyoConfig
from esper.tamiyo import LocalController


@dataclass(frozen=True)
class Ask:
    """An episode to be played.

    Attributes:
        task: place among the tasks.
        seed: of the run.
        policy: as `tamiyo.policy` names it.
        card, weights: of the net, for `gnn`.
        greedy: decide as a run would, by what is most probable and with the policy's own gates, instead of drawing.
        flops: the run ends when it has spent so many times what the plain host costs for its epochs; None: at its end.
        draw: another number draws otherwise, of the same run.
    """

    task: int
    seed: int
    policy: str
    card: PolicyCard | None = None
    weights: bytes = b""
    greedy: bool = False
    draw: int = 0
    flops: float | None = None


@dataclass(frozen=True)
class Played:
    """An ask and its episode; None with the reason in words where the training failed."""

    ask: Ask
    episode: Episode | None
    problem: str = ""
    seconds: float = 0.0


class Rollouts(Protocol):
    """Plays episodes, perhaps many at a time."""

    def play(self, asks: Sequence[Ask]) -> Iterable[Played]:
        """Yields each as it ends, in any order."""
        ...


class MemoryLog:
    """An `ExperienceLog` that keeps one run's decisions in memory."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._moments: list[Moment] = []
        self.episode: Episode | None = None

    def decided(self, state: Mapping[str, Any], packet: SystemStatePacket, signal: AdaptationSignal) -> None:
        """See the port."""
        self._moments.append(Moment(dict(state), packet, signal))

    def close(self, last: EpochRecord | None, ended: Sequence[FieldReport], *, is_over: bool) -> str | None:
        """See the port."""
        self.episode = Episode(self._about, tuple(self._moments), last, tuple(ended), is_over)


def load_tasks(config: TrainTamiyoConfig, folder: Path) -> list[RunConfig]:
    """Returns the runs' configurations of a training.

    Args:
        config: names files and settings.
        folder: the files are beside.

    Raises:
        ConfigError: if a file or a setting is wrong.
    """
    common = ["deterministic=true", "simic.experience=false", "nissa.view=quiet", *config.overrides]
    return [
        load_config(folder / task, common)
        if isinstance(task, str)
        else load_config(folder / task.config, [*common, *task.set])
        for task in config.tasks
    ]


NET = "gnn"
"""The policy of an ask that brings weights."""

EXPLORER = "explorer"
"""The policy of an ask that grows by a plan of its own; see `esper.simic.explorer`."""


def tamiyo_of(task: RunConfig, ask: Ask) -> TamiyoConfig:
    """Returns Tamiyo's configuration of an episode.

    A net that learns is held back by no doubt of its own: what it draws is done, else its log-probability would not be
    that of what was done. The gates of every policy stand as ever. One that draws nothing is played as a run would use
    it, with its own gates.
    """
    if ask.policy == EXPLORER:
        return task.tamiyo.model_copy(update={"policy": POLICY})
    if ask.policy != NET:
        return task.tamiyo.model_copy(update={"policy": ask.policy})
    version = _card(ask).version
    own = {"version": version, "explore": not ask.greedy}
    free = {} if ask.greedy else {"max_uncertainty": None, "min_confidence": 0.0}
    return task.tamiyo.model_copy(update={"policy": NET, "gnn": task.tamiyo.gnn.model_copy(update=own | free)})


def _card(ask: Ask) -> PolicyCard:
    if ask.card is None:
        raise ValueError("an ask for a net's episode brings no card")
    return ask.card


def controller_for(config: RunConfig, ask: Ask) -> Controller:
    """Who decides an episode."""
    if ask.policy == EXPLORER:
        return Explorer(config.tamiyo, seed=ask.seed, draw=ask.draw, num_epochs=config.tolaria.epochs)
    return LocalController(
        config.tamiyo, seed=ask.seed + 7919 * ask.draw, policies=lambda _version: (_card(ask), ask.weights)
    )


class Unreported:
    """A hub that hears nothing of what became of kernels: else an episode would hang on those played before it, whose
    records stand among what the net sees.

    Args:
        hub: all else is asked of it.
    """

    def __init__(self, hub: AssetHub) -> None:
        self._hub = hub

    def report(self, report: FieldReport) -> None:
        """Keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)


class Player:
    """Plays episodes one after the other, here. Data and kernels of a task are made once.

    Args:
        tasks: configurations of runs.
    """

    def __init__(self, tasks: Sequence[RunConfig]) -> None:
        self._tasks = list(tasks)
        self._made: dict[int, tuple[Any, Any, bytes]] = {}
        self._units: dict[int, float] = {}

    def play(self, asks: Iterable[Ask]) -> Iterator[Played]:
        """See `Rollouts`. What fails is told, and the next one is played."""
        import time

        from esper.leyline import EsperError

        for ask in asks:
            began = time.monotonic()
            try:
                episode = self.run(ask)
            except (EsperError, ValueError, ArithmeticError, RuntimeError) as error:
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                yield Played(ask, None, problem, time.monotonic() - began)
            else:
                yield Played(ask, episode, seconds=time.monotonic() - began)

    def run(self, ask: Ask) -> Episode:
        """Trains one run to its end and returns its episode.

        Raises:
            EsperError: if the training fails.
        """
        from esper.api import configured_workload, train_local

        task = self._tasks[ask.task]
        config = task.model_copy(update={"seed": ask.seed, "tamiyo": tamiyo_of(task, ask)})
        data, hub, key = self._prepared(ask.task)
        # nothing that learns sees the test part
        workload = configured_workload(config, data, with_test=False)
        run_id = f"rollout-{config.name}-{ask.policy}-{ask.seed}-{new_id()[:8]}"
        log = MemoryLog(about_run(config, run_id))
        records: list[EpochRecord] = []
        limit = None if ask.flops is None else ask.flops * self._unit(ask.task)
        with tempfile.TemporaryDirectory(prefix="esper-rollout-") as directory:
            train_local(
                workload,
                config,
                directory=directory,
                run_id=run_id,
                hub=None if ask.policy == "none" else cast("AssetHub", Unreported(hub)),
                bus=None,
                controller=controller_for(config, ask),
                public_key=key,
                experience=log,
                on_epoch=records.append,
                stop=lambda: "its FLOPs are spent" if limit and records and _spent(records) >= limit else None,
            )
        assert log.episode is not None  # the trainer closes the log of a run that ends
        return log.episode

    def _unit(self, number: int) -> float:
        """FLOPs of all epochs of a task's plain host: training and validation, and nobody takes its health."""
        from esper.api import configured_host
        from esper.simic.spending import epoch_flops

        if number not in self._units:
            task, data = self._tasks[number], self._prepared(number)[0]
            self._units[number] = task.tolaria.epochs * epoch_flops(task, data, configured_host(task, data))
        return self._units[number]

    def _prepared(self, number: int) -> tuple[Any, Any, bytes]:
        """Data, hub and public key of a task. The data's split is that of the task's own seed, for all its episodes."""
        from esper.api import configured_host, local_hub_of
        from esper.data import load_data
        from esper.tolaria.workload import example_of

        if number not in self._made:
            task = self._tasks[number]
            data = load_data(task.data, task=task.task, seed=task.seed)
            self._made[number] = (data, *local_hub_of(configured_host(task, data), example_of(data.train), task))
        return self._made[number]


def _spent(records: Sequence[EpochRecord]) -> int:
    return records[-1].total_flops


def twin_of(episode: Episode) -> Twin:
    """Returns what a run without growth is as a twin."""
    records = [moment.packet.epoch for moment in episode.moments]
    losses = tuple(record.val_loss for record in records if record.val_loss is not None)
    return Twin(losses, records[-1].total_flops)
