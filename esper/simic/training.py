"""The training of a policy: imitation of what was logged, then PPO from rollouts; goes on after a kill where it was.

After every step of it the whole state is written to `<storage>/simic/<name>/state.pt`, and what people may want to see
to `progress.json` beside it. At the end the policy goes to the store, with a card that says what it was trained on.
"""

from __future__ import annotations

import io
import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from esper.config import RunConfig
from esper.leyline import DataError, NotFoundError
from esper.leyline.policies import PolicyCard, PolicyOrigin, PolicyStore
from esper.simic.experience import Experience, code_digest
from esper.simic.gae import effective_share
from esper.simic.identity import (
    Stretch,
    change_in_words,
    check_iterations,
    check_same,
    entropy_in_words,
    settings_of_training,
)
from esper.simic.imitation import imitate
from esper.simic.judging import judge_beside_heuristic
from esper.simic.lessons import Lessons, lessons_of, split
from esper.simic.moments import Episode
from esper.simic.playing import Playing, group_of
from esper.simic.ppo import Ppo, Samples
from esper.simic.replay import Replay
from esper.simic.reward import Twin
from esper.simic.rollouts import EXPLORER, NET, Ask, Played, Rollouts
from esper.simic.sampling import (
    estimates_again,
    evaluated,
    forecasts,
    fresh_estimates,
    harm_ahead,
    joined,
    samples_of,
)
from esper.simic.settings import TrainTamiyoConfig
from esper.simic.weighing import levelled, run_weights
from esper.storage import Storage
from esper.tamiyo.batch import collate
from esper.tamiyo.calibration import teach
from esper.tamiyo.net import FEATURES, PolicyNet, forget
from esper.tamiyo.observation import OBSERVATION_VERSION
from esper.tamiyo.shape import NetShape

_LOG = logging.getLogger(__name__)

_SAVED_EVERY = 24
"""Runs of the warm-up, after which the state is written."""


@dataclass(frozen=True, slots=True)
class Taught:
    """An episode of the net, with the log-probabilities of its choices when they were made."""

    lessons: Lessons
    log_probs: np.ndarray


class Training:
    """One training.

    Args:
        config: see there.
        tasks: the configurations of its runs.
        rollouts: plays them.
        storage: where state, experience and the policy go.
        store: of policies.
        told: hears of each step, as a plain dict with `stage`.
    """

    def __init__(
        self,
        config: TrainTamiyoConfig,
        tasks: Sequence[RunConfig],
        rollouts: Rollouts,
        *,
        storage: Storage,
        store: PolicyStore,
        told: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._config, self._tasks, self._rollouts = config, list(tasks), rollouts
        self._storage, self._store, self._told = storage, store, told or _silent
        self._folder = f"simic/{config.name}"
        self._settings = settings_of_training(config, tasks)
        self.net = PolicyNet(NetShape.model_validate(config.net), seed=config.seed)
        self.ppo = Ppo(self.net, collate, config.ppo, seed=config.seed)
        self._replay: Replay[Taught] = Replay(config.rollout.kept, seed=config.seed)
        self._played = Playing(rollouts, storage, config.reward, self._told)
        self._runs: list[str] = []
        self._warm: dict[int, str] = {}  # runs of the warm-up; empty for one that failed
        self._seen: dict[str, np.ndarray] = {}
        self._stretches: list[Stretch] = []
        self.iteration = -1  # of the next update; -1: imitation comes first
        self.history: list[dict[str, Any]] = []

    def run(self) -> str:
        """Trains to the end and returns the policy's version.

        Raises:
            DataError: if a state of other settings, or of more updates, lies in the way, or no episode could be played.
            StorageError: if the storage fails.
        """
        self._restore()
        if self.iteration < 0:
            self._imitate()
            self.iteration = 0
            self._save()
        while self.iteration < self._config.iterations:
            self._improve()
            self.iteration += 1
            self._save()
        return self._publish()

    # ---------------------------------------------------------------- the parts

    def _imitate(self) -> None:
        config = self._config
        logged = [*Experience(self._storage).episodes(policies=list(config.imitation.policies))]
        fresh = self._warm_up()
        mine = set(self._warm.values())
        lessons = [lessons_of(one, config.reward) for one in logged if one.about.run_id not in mine]
        num_logged = len(lessons)
        own = [lessons_of(one, config.reward, twin=self._played.twin(ask)) for ask, one in fresh]
        worths = run_weights(
            [(ask.task, ask.seed, one.total) for (ask, _), one in zip(fresh, own, strict=True)], config.imitation
        )
        lessons += [replace(one, weight=worth) for one, worth in zip(own, worths, strict=True)]
        lessons = [one for one in lessons if one.items]
        self._see(lessons)
        self._runs += [one.of for one in lessons]
        if not lessons or not config.imitation.epochs:
            self._tell("imitation", episodes=len(lessons), words="nothing was imitated")
            return
        learned, held_out = split(lessons, config.imitation.held_out, seed=config.seed)
        report = imitate(self.net, collate, learned, held_out, config.imitation, seed=config.seed)
        self._tell("imitation", episodes=len(lessons), logged=num_logged, **asdict(report))

    def _warm_up(self) -> list[tuple[Ask, Episode]]:
        """Plays the fresh runs that are not there yet, and returns all of them. Every few of them are written down."""
        config = self._config
        asks = [self._warm_ask(i) for i in range(config.warm_up)]
        places = {_ask_key(ask): i for i, ask in enumerate(asks)}

        def heard(one: Played) -> None:
            self._warm[places[_ask_key(one.ask)]] = one.episode.about.run_id if one.episode is not None else ""

        while missing := [i for i in range(len(asks)) if i not in self._warm]:
            part = [asks[i] for i in missing[:_SAVED_EVERY]]
            self._played.find_twins(part)
            try:
                self._played.play(part, f"warm-up {missing[0]} of {len(asks)}", heard)
            finally:  # after Ctrl-C too: a run that is not known for its own would be imitated beside its second time
                self._save()
        runs = {run: i for i, run in self._warm.items() if run}
        if not runs:
            return []
        # one whose FLOPs were spent before its last epoch is no less an episode
        logged = Experience(self._storage).episodes(runs=list(runs), only_whole=False)
        found = [(runs[one.about.run_id], one) for one in logged]
        return [(asks[i], one) for i, one in sorted(found, key=lambda entry: entry[0])]

    def _warm_ask(self, number: int) -> Ask:
        config = self._config
        group, place = divmod(number, 1 + config.explore)
        seed = config.seed + group // len(self._tasks)
        policy = EXPLORER if place else config.imitation.policies[0]
        return Ask(group % len(self._tasks), seed, policy, draw=place, flops=config.rollout.flops)

    def _improve(self) -> None:
        """One update of PPO."""
        asks = self._asks()
        self._played.find_twins(asks)
        self.net.eval()
        played = [*self._played.play(asks, f"update {self.iteration + 1}")]
        played.sort(key=lambda one: (one.ask.task, one.ask.seed, one.ask.draw))  # whoever ended first
        settled = self._played.settled(played)
        lessons = [one for _, one in settled]
        if not lessons:
            problems = "; ".join(sorted({one.problem for one in played}))
            raise DataError(f"none of {len(asks)} rollouts could be played: {problems}")
        self._runs += [one.of for one in lessons]
        self._see(lessons)
        self._weigh_entropy()
        groups = [group_of(ask) for ask, _ in settled]
        samples, taught = self._fresh(lessons, groups)
        again, refused, share = self._again()
        report = self.ppo.update(joined([*samples, *again]), mean_harm=_mean([one.harm for one in lessons]))
        for one, part in zip(taught, samples, strict=True):
            self._replay.add(one, float(np.abs(part.advantages).mean()))
        totals = [one.total for one in lessons]
        self._tell(
            "ppo",
            iteration=self.iteration + 1,
            episodes=len(lessons),
            failed=len(asks) - len(lessons),
            mean_return=_mean(totals),
            stderr=_stderr(totals),
            mean_harm=_mean([one.harm for one in lessons]),
            operations=_operations(lessons),
            replayed=len(again),
            too_old=refused,
            effective=share,
            **asdict(report),
        )

    def _weigh_entropy(self) -> None:
        iterations = self._config.iterations
        if not self._stretches or self._stretches[-1][1] != iterations:
            self._stretches.append((self.iteration, iterations))
        self.ppo.entropy_weight = self._config.ppo.entropy_weight * (1.0 - self.iteration / iterations)

    def _fresh(self, lessons: Sequence[Lessons], groups: Sequence[str]) -> tuple[list[Samples], list[Taught]]:
        """Samples of fresh episodes, levelled among those of their task and seed (`groups`)."""
        found, taught, beyond = [], [], []
        for one in lessons:
            log_probs, values = evaluated(self.net, one)
            worth = fresh_estimates(one, values, self._config.ppo)
            found.append(samples_of(one, log_probs, worth, harm_ahead(one)))
            taught.append(Taught(one, log_probs))
            beyond.append(one.total - float(values[0]))
        return levelled(found, beyond, groups), taught

    def _again(self) -> tuple[list[Samples], int, float]:
        """Samples of older policies by V-trace, how many episodes were too old, and what share the rest is worth."""
        if not len(self._replay) or not self._config.rollout.replayed:
            return [], 0, 0.0
        ppo = self._config.ppo
        places, drawn, _ = self._replay.sample(self._config.rollout.replayed)
        found: list[Samples] = []
        shares: list[float] = []
        refused = 0
        for place, one in dict(zip(places, drawn, strict=True)).items():
            log_probs, values = evaluated(self.net, one.lessons)
            ratios = log_probs - one.log_probs
            if (share := effective_share(ratios)) < ppo.min_effective:
                refused += 1
                self._replay.update([place], np.zeros(1))
                continue
            worth = estimates_again(one.lessons, values, ratios, ppo)
            cut = np.minimum(np.exp(ratios), 1.0)
            found.append(samples_of(one.lessons, log_probs, worth, cut * harm_ahead(one.lessons)))
            self._replay.update([place], np.array([np.abs(worth.advantages).mean()]))
            shares.append(share)
        return found, refused, _mean(shares) if shares else 0.0

    # ---------------------------------------------------------------- rollouts

    def _asks(self) -> list[Ask]:
        rollout, first = self._config.rollout, self.iteration * self._config.rollout.episodes
        card, weights = self._card()
        numbers = range(first, first + rollout.episodes)
        groups = [(i // rollout.draws, i % rollout.draws) for i in numbers]
        return [
            Ask(
                task=group % len(self._tasks),
                seed=self._config.seed + group // len(self._tasks) % rollout.seeds,
                policy=NET,
                card=card,
                weights=weights,
                draw=self.iteration * rollout.draws + place,
                flops=rollout.flops,
            )
            for group, place in groups
        ]

    # ---------------------------------------------------------------- the end

    def _publish(self) -> str:
        # what was 0 in all that it learned from says nothing to it: its weights there are still those it was born with
        unseen = forget(self.net, self._seen)
        calibration = self._calibrate()
        card, weights = self._card()
        config = self._config
        results = (
            judge_beside_heuristic(
                self._rollouts,
                self._tasks,
                (card, weights),
                config.reward,
                num_seeds=config.judged,
                flops=config.rollout.flops,
            )
            if config.judged
            else []
        )
        origin = PolicyOrigin(
            runs=tuple(dict.fromkeys(self._runs)),
            hosts=tuple(sorted({task.host.type for task in self._tasks})),
            tasks=tuple(sorted({task.name for task in self._tasks})),
            episodes=len(self._runs),
            seeds=tuple(sorted(self._played.seeds)),
            code_digest=code_digest(),
        )
        entropy = entropy_in_words(self._stretches, self.iteration)
        told = {
            "trained_on": origin,
            "parents": (f"imitation of {', '.join(self._config.imitation.policies)}",),
            "calibration": calibration,
            "results": tuple(results),
            "notes": f"{self.iteration} updates of PPO after imitation{entropy}; rewards of"
            f" {self._config.reward.model_dump()}; features it never saw: {', '.join(unseen) or 'none'}",
        }
        version = self._store.put(card.model_copy(update=told), weights)
        self._tell("policy", version=version, results=results, calibration=calibration)
        return version

    def _card(self) -> tuple[PolicyCard, bytes]:
        """The net as it is, with a card of the least."""
        weights, shape = self.net.to_bytes(), self.net.shape.model_dump(mode="json")
        name = self._config.name
        return (
            PolicyCard.of(weights, name=name, kind=NET, shape=shape, observation_version=OBSERVATION_VERSION),
            weights,
        )

    def _calibrate(self) -> dict[str, Any]:
        """Teaches the net's doubt from fresh episodes: how far its forecasts are from what comes."""
        asks = self._asks()
        self._played.find_twins(asks)
        played = [one for one in self._played.play(asks, "calibration") if one.episode is not None]
        lessons = [one for _, one in self._played.settled(played)]
        try:
            return teach(self.net, forecasts(lessons), seed=self._config.seed)
        except DataError as error:
            _LOG.warning("policy.uncalibrated", extra={"reason": str(error)})
            return {"refused": str(error)}

    def _see(self, lessons: Sequence[Lessons]) -> None:
        """Remembers which features were ever anything but 0."""
        for one in lessons:
            for item in one.items:
                for kind in FEATURES:
                    values = getattr(item.observation, kind)
                    seen = (values.reshape(-1, values.shape[-1]) != 0).any(axis=0)
                    self._seen[kind] = self._seen[kind] | seen if kind in self._seen else seen

    # ---------------------------------------------------------------- state

    def _tell(self, stage: str, **figures: Any) -> None:
        row = {"stage": stage, **figures}
        self.history.append(row)
        self._told(row)

    def _save(self) -> None:
        state = {
            "settings": json.dumps(self._settings),
            "stretches": self._stretches,
            "iteration": self.iteration,
            "net": self.net.state_dict(),
            "ppo": self.ppo.state_dict(),
            "twins": {key: (list(twin.val_losses), twin.total_flops) for key, twin in self._played.twins.items()},
            "runs": self._runs,
            "seeds": sorted(self._played.seeds),
            "warm": self._warm,
            "seen": {kind: seen.tolist() for kind, seen in self._seen.items()},
            "history": json.dumps(self.history),
        }
        into = io.BytesIO()
        torch.save(state, into)
        self._storage.write(f"{self._folder}/state.pt", into.getvalue())
        self._storage.write(f"{self._folder}/progress.json", json.dumps(self.history, indent=1).encode())

    def _restore(self) -> None:
        try:
            data = self._storage.read(f"{self._folder}/state.pt")
        except NotFoundError:
            return
        state = torch.load(io.BytesIO(data), weights_only=True)
        where = f"{self._storage.shown}/{self._folder}"
        if "stretches" not in state:
            raise DataError(
                f"the training in {where} is of an earlier version, which did not keep its settings",
                field="name",
                remedy="begin anew under another name (name=NAME), or remove that folder",
            )
        check_same(json.loads(state["settings"]), self._settings, where)
        check_iterations(state["iteration"], self._config.iterations, where)
        self.net.load_state_dict(state["net"])
        self.ppo.load_state_dict(state["ppo"])
        self.iteration = state["iteration"]
        self._played.twins = {key: Twin(tuple(losses), flops) for key, (losses, flops) in state["twins"].items()}
        self._runs, self._played.seeds = state["runs"], set(state["seeds"])
        self._warm, self._seen = state["warm"], {kind: np.array(seen) for kind, seen in state["seen"].items()}
        self.history = json.loads(state["history"])
        self._stretches = [(first, iterations) for first, iterations in state["stretches"]]
        self._told({"stage": "resumed", "iteration": self.iteration})
        if self._stretches and (before := self._stretches[-1][1]) != self._config.iterations:
            change = {"before": before, "iterations": self._config.iterations}
            self._tell("iterations", **change, words=change_in_words(self.iteration, **change))


def _silent(row: dict[str, Any]) -> None:
    """Says nothing."""


def _ask_key(ask: Ask) -> tuple[int, int, str, int]:
    return (ask.task, ask.seed, ask.policy, ask.draw)


def _operations(lessons: Sequence[Lessons]) -> dict[str, int]:
    """How often each operation was chosen."""
    found: dict[str, int] = {}
    for one in lessons:
        for item in one.items:
            found[item.choice.operation.name] = found.get(item.choice.operation.name, 0) + 1
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
