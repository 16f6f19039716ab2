"""Trials by fork, from the run's side: what may be asked for, what comes back, and how the winner begins.

Rank 0 alone speaks with the port; what it found is broadcast where ranks must do the same. Nothing here waits: forks
are looked at when a decision is due.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch

from esper.leyline.errors import EsperError
from esper.leyline.evidence import Evidence, EvidenceKind
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Action, AdaptationSignal, KasminaControlCommand
from esper.leyline.trials import (
    Fork,
    ForkPrice,
    ForkResult,
    TrialCandidate,
    TrialOutcome,
    TrialRequest,
    TrialResult,
    TrialState,
    key_of,
)
from esper.tolaria.chronicle import Chronicle
from esper.tolaria.course import Course
from esper.tolaria.packing import pack
from esper.tolaria.reach import Reach

log = logging.getLogger(__name__)

SYSTEM = "trials"


class Trying:
    """Trials of one run.

    Args:
        course: the run.
        chronicle: told of what was tried.
        reach: told what the run goes without.
    """

    def __init__(self, course: Course, *, chronicle: Chronicle, reach: Reach) -> None:
        self._course = course
        self._chronicle = chronicle
        self._reach = reach
        self._wanted: TrialRequest | None = None
        self._request: TrialRequest | None = None
        self._forks: tuple[Fork, ...] = ()
        self._version = -1
        self._result: TrialResult | None = None
        self._weights: dict[str, bytes] = {}
        self._val_samples = 0
        self._price: ForkPrice | None = None

    # ---- what Tamiyo is told

    def state(self) -> TrialState | None:
        """How trials stand now; None in a run without them. Looks at the forks and books those that have ended.

        Raises nothing: a port that fails makes the trial void.
        """
        if not self._course.config.tamiyo.trials.enabled:
            return None
        if self._request is not None:
            self._look(self._request)
        under_way = "" if self._request is None else self._request.trial_id
        if self._result is not None or under_way:
            return TrialState(reason="a trial is not settled yet", under_way=under_way, result=self._result)
        return self._room()

    def validated(self, num_samples: int) -> None:
        """Takes in how many samples a validation has."""
        self._val_samples = num_samples

    def heard(self, signal: AdaptationSignal, refused: Mapping[str, str] | None = None) -> None:
        """Takes in what Tamiyo made of the last state: a trial that it wants, and whether it has used the result.

        Args:
            signal: whose commands have been carried out.
            refused: why the run did not do so, by the id of the command.
        """
        if not self._course.is_first:
            return
        result, self._result = self._result, None
        self._wanted = signal.trial
        if result is not None:
            command = next((one for one in signal.commands if one.trial_id == result.trial_id), None)
            if command is None:
                self._chronicle.tried(result, winner="")
            else:
                refusal = (refused or {}).get(command.command_id, "")
                self._chronicle.tried(result, winner=self._of(command), refusal=refusal)
        self._weights = {}

    # ---- the trial

    def begin(self) -> None:
        """Starts the forks of the trial that is wanted, from the run's present state, which is between two steps."""
        request, self._wanted = self._wanted, None
        port = self._course.ports.trials
        if request is None or port is None or self._price is None:
            return
        forks = tuple(_forks(request, self._price))
        try:
            port.start(pack(self._course), forks)
        except EsperError as error:
            self._end(request, {}, failure=f"it did not begin: {error}")
            return
        self._request, self._forks, self._version = request, forks, self._course.growable.topology_version
        self._course.ports.faults.at("forked", self._course.epoch)
        log.info("trial.begun", extra={"run": self._course.run_id, "trial": request.trial_id, "forks": len(forks)})

    def close(self, reason: str) -> None:
        """Ends a trial that still runs, with the run. What it cost is booked."""
        if self._request is not None:
            self._void(self._request, reason)
        result, self._result, self._wanted, self._weights = self._result, None, None, {}
        if result is not None:
            self._chronicle.tried(result, winner="")

    def give_up(self, reason: str) -> None:
        """Ends a trial that still runs, and books it; tells nobody and raises nothing, whatever the port does."""
        if self._request is None:
            return
        try:
            self._void(self._request, reason)
        except Exception as error:  # noqa: BLE001 - the run fails already, and its own error is what people must see
            log.warning("trial.uncancelled", extra={"run": self._course.run_id, "reason": str(error)})

    def _look(self, request: TrialRequest) -> None:
        course, port = self._course, self._course.ports.trials
        assert port is not None
        if course.growable.topology_version != self._version:
            self._void(request, "the run's own live path changed meanwhile")
            return
        try:
            results = port.results()
        except EsperError as error:
            self._void(request, str(error))
            return
        if len(results) == len(self._forks):
            self._end(request, results)
        elif course.epoch - request.epoch > course.config.tamiyo.trials.late_epochs:
            self._void(request, f"it had not ended {course.epoch - request.epoch} epochs later")

    def _void(self, request: TrialRequest, reason: str) -> None:
        port = self._course.ports.trials
        assert port is not None
        try:
            results = port.cancel(reason)
        except EsperError as error:  # what was begun there, nobody knows: all is taken for spent
            log.warning("trial.uncancelled", extra={"reason": str(error)})
            results = {f.fork_id: ForkResult(f.fork_id, flops=f.max_flops, failure=str(error)) for f in self._forks}
        self._end(request, results, failure=reason)

    def _end(self, request: TrialRequest, results: Mapping[str, ForkResult], *, failure: str = "") -> None:
        self._request, self._forks = None, ()
        flops = sum(result.flops for result in results.values())
        self._course.ledger.add("trials", flops=flops)
        outcomes = () if failure else tuple(self._outcomes(request, results))
        if not failure and all(outcome.evidence is None for outcome in outcomes):
            failure = "; ".join(outcome.in_words(0.0) for outcome in outcomes)
        self._result = TrialResult(
            trial_id=request.trial_id,
            epoch=request.epoch,
            told=self._course.epoch,
            steps=request.steps,
            outcomes=outcomes,
            flops=flops,
            seconds=sum(result.seconds for result in results.values()),
            failure=failure,
        )
        log.info("trial.ended", extra={"run": self._course.run_id, "trial": request.trial_id, "failure": failure})

    def _outcomes(self, request: TrialRequest, results: Mapping[str, ForkResult]) -> Sequence[TrialOutcome]:
        baselines = [results[_fork_id(request, None, seed)] for seed in range(request.seeds)]
        found = []
        for candidate in request.candidates:
            own = [results[_fork_id(request, candidate, seed)] for seed in range(request.seeds)]
            evidence, failure = _compare(baselines, own)
            weights = own[0].weights if evidence is not None else None
            if weights is not None:
                self._weights[key_of(candidate)] = weights
            found.append(
                TrialOutcome(
                    candidate=candidate,
                    evidence=evidence,
                    flops=sum(result.flops for result in own),
                    seconds=sum(result.seconds for result in own),
                    weights=None if weights is None else hashlib.sha256(weights).hexdigest(),
                    failure=failure,
                )
            )
        return found

    # ---- the winner

    def offer(self, command: KasminaControlCommand) -> None:
        """Hands the weights of the fork that won to the seed for which a command is. Collective."""
        course = self._course
        if command.action is not Action.GERMINATE or not command.trial_id or course.seed(command.seed_id) is None:
            return
        found = course.ports.ranks.broadcast(self._found(command) if course.is_first else None)
        if found is None:
            self._reach.miss(SYSTEM, f"the weights of trial {command.trial_id[:8]} are gone; the kernel begins anew")
            return
        trial, weights = Evidence.model_validate(found[0]), found[1]
        tensors = None if weights is None else safetensors.torch.load(weights)
        if tensors is not None:
            device = course.device
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        course.growable.offer(command.seed_id, command.kernel_id or "", trial, tensors)

    def withdraw(self, command: KasminaControlCommand) -> None:
        """Takes the offer back where the command was refused: another time it would be of another host."""
        if command.action is Action.GERMINATE and command.trial_id:
            seed = self._course.seed(command.seed_id)
            if seed is not None and seed.stage is SeedStage.DORMANT:
                self._course.growable.offer(command.seed_id, "", None, None)

    def _found(self, command: KasminaControlCommand) -> tuple[dict[str, Any], bytes | None] | None:
        result = self._result
        if result is None or result.trial_id != command.trial_id:
            return None
        outcome = next((o for o in result.outcomes if key_of(o.candidate) == self._of(command)), None)
        if outcome is None or outcome.evidence is None:
            return None
        return outcome.evidence.model_dump(mode="json"), self._weights.get(key_of(outcome.candidate))

    def _of(self, command: KasminaControlCommand) -> str:
        return f"{command.site}/{command.kernel_id}/{command.strategy}"

    # ---- the budget

    def _room(self) -> TrialState:
        """What there is for a trial now, or why there is nothing."""
        course, settings, port = self._course, self._course.config.tamiyo.trials, self._course.ports.trials
        if port is None:
            return TrialState(reason="there is nowhere to train forks")
        if any(seed.stage.is_active for seed in course.growable.seeds()):
            return TrialState(reason="an adaptation is under way")
        try:
            idle = port.idle()
        except EsperError as error:
            return TrialState(reason=str(error))
        if not idle:
            return TrialState(reason="no CPU is idle")
        flops = course.ledger.snapshot().flops
        left = math.floor(settings.flops_share * (flops.total - flops.trials)) - flops.trials
        self._price = ForkPrice(  # kept, since what was asked for must be what is begun
            step=math.ceil(flops.host / max(1, course.step)),
            samples=course.config.tolaria.batch_size,
            validation=math.ceil(flops.validation / (course.epoch + 1)),
            val_samples=self._val_samples,
        )
        return TrialState(idle=idle, flops_left=max(0, left), price=self._price)

    # ---- for checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a trial that is lost with this process may have cost, to be booked by the run that goes on."""
        return {"reserved": sum(fork.max_flops for fork in self._forks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`: books it."""
        if self._course.is_first and state.get("reserved"):
            self._course.ledger.add("trials", flops=int(state["reserved"]))


def _forks(request: TrialRequest, price: ForkPrice) -> Sequence[Fork]:
    """Those that do not grow first: without them the others say nothing."""
    return [
        Fork(_fork_id(request, candidate, seed), candidate, seed, request.steps, price.limit(request.steps, candidate))
        for seed in range(request.seeds)
        for candidate in (None, *request.candidates)
    ]


def _fork_id(request: TrialRequest, candidate: TrialCandidate | None, seed: int) -> str:
    number = "none" if candidate is None else str(request.candidates.index(candidate))
    return f"{request.trial_id}-{seed}-{number}"


def _compare(baselines: Sequence[ForkResult], candidates: Sequence[ForkResult]) -> tuple[Evidence | None, str]:
    """Pairs forks seed by seed; returns the evidence, or why there is none. Seeds that lack a side fall out."""
    pairs = [(b, c) for b, c in zip(baselines, candidates, strict=True) if not (b.failure or c.failure)]
    if not pairs:
        words = [r.failure for r in candidates if r.failure] or [
            f"the fork without growth: {r.failure}" for r in baselines if r.failure
        ]
        return None, "; ".join(dict.fromkeys(words))
    gains = [[b - c for b, c in zip(base.losses, own.losses, strict=True)] for base, own in pairs]
    means = [math.fsum(row) / len(row) for row in gains]
    over_seeds = [math.fsum(column) / len(column) for column in zip(*gains, strict=True)]
    gain, num = math.fsum(means) / len(means), len(over_seeds)
    samples = math.fsum((value - gain) ** 2 for value in over_seeds) / max(1, num - 1) / num
    between = math.fsum((mean - gain) ** 2 for mean in means) / max(1, len(means) - 1) / len(means)
    evidence = Evidence(
        kind=EvidenceKind.FORK,
        gain=gain,
        stderr=math.sqrt(samples + between),
        baseline=math.fsum(base.loss for base, _ in pairs) / len(pairs),
        candidate=math.fsum(own.loss for _, own in pairs) / len(pairs),
        num_pairs=num * len(pairs),
        reason=f"{len(pairs)} pairs of forks over the same steps",
    )
    return evidence, ""
