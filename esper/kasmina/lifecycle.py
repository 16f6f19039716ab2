"""How seeds move from stage to stage: on command, with what has arrived for them, and by time.

It changes layers and reports what it did as a `Change`; it knows nothing of the loop, the optimizer or the policy. How
kernels come is of `arrivals`, how alphas move of `ramps`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from esper.config import KasminaConfig
from esper.kasmina.arrivals import Arrivals
from esper.kasmina.gates import Gate, GateFacts, gate, target_of
from esper.kasmina.layer import Layer, Layers, all_layers, layer_at
from esper.kasmina.loader import LoadedKernel
from esper.kasmina.ramps import Ramps
from esper.kasmina.seed import Retirement, Seed
from esper.kasmina.shadow import AllReduce
from esper.kasmina.strategies import judged
from esper.leyline.compiled import runs_compiled
from esper.leyline.errors import (
    EsperError,
    IllegalTransitionError,
    KernelRejectedError,
    NotFoundError,
    PermanentError,
    SafetyError,
    UserError,
)
from esper.leyline.growth import Change
from esper.leyline.native import RungChange
from esper.leyline.seeds import TRANSITIONS, SeedStage
from esper.leyline.signals import (
    Action,
    BlendStrategy,
    Evidence,
    EvidenceKind,
    KasminaControlCommand,
    LifecycleEvent,
)

RETIRABLE = frozenset({SeedStage.GRAFTING, SeedStage.STABILIZING, SeedStage.EVALUATING, SeedStage.FINE_TUNING})
CANCELLED_EPOCHS = 1
"""Control intervals after which a seed whose kernel was refused is DORMANT again."""
_REFUSED = (PermanentError, UserError, SafetyError)
"""What a loader says of a kernel that will never do. A transient error says nothing of it."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When something happens, and in which run."""

    run_id: str
    epoch: int
    step: int


class Lifecycle:
    """The seeds of one host.

    Attributes:
        version: grows with every change of the live path or of the set of shadows.
        clock: steps that were prepared.
        val_loss: the last finite validation loss that was told; None before the first.
        moment: the last one that was told.
        arrivals: kernels on their way in.
        mean, world: how figures are averaged over so many ranks in place, under DDP; None alone.
        shadows: the seeds in TRAINING with their layers.
        pending: events that happened outside `apply` and `prepare` and are reported by the next of either.
    """

    def __init__(self, module: nn.Module, layers: Layers, config: KasminaConfig) -> None:
        self.module = module
        self.layers = layers
        self.config = config
        self.arrivals = Arrivals(module, layers)
        self.mean: AllReduce | None = None
        self.world = 1
        self._ramps = Ramps(config)
        self.version = 0
        self.clock = 0
        self.num_planted = 0
        self.num_grafts = 0
        self.moment = Moment("", 0, 0)
        self.val_loss: float | None = None
        self.pending: list[LifecycleEvent] = []
        self.shadows: list[tuple[Layer, Seed]] = []
        self._busy = False

    def configure(self, config: KasminaConfig) -> None:
        """Goes by these limits and rates from now on."""
        self.config = config
        self._ramps.configure(config)

    # ---- views

    def plant(self, layer: Layer) -> Seed:
        """Sets a fresh DORMANT seed at a site; ids are never used again."""
        seed = layer.plant(f"s{self.num_planted}")
        self.num_planted += 1
        seed.put("entered", self.clock)
        return seed

    def share(self, mean: AllReduce, world: int, patience_s: float) -> None:
        """Says how figures are averaged over ranks; see `Growable.share`."""
        self.mean = self.arrivals.mean = self._ramps.mean = mean
        self.arrivals.patience_s = patience_s
        self.world = world

    def find(self, seed_id: str) -> tuple[Layer, Seed]:
        """Returns a seed and its layer; raises `NotFoundError`."""
        for layer in all_layers(self.layers):
            for seed in layer.seeds:
                if seed.seed_id == seed_id:
                    return layer, seed
        raise NotFoundError(f"no seed {seed_id} in this host")

    def gate(self, layer: Layer, seed: Seed) -> Gate:
        """The gate of a seed's present stage."""
        stage = seed.stage
        facts = GateFacts(
            loaded=seed.facts is not None,
            zero_at_birth=seed.facts is not None and seed.facts.zero_at_birth,
            has_baseline=self.val_loss is not None,
            val_finite=seed.val_finite,
            retiring=seed.retirement is not None,
            errors=seed.figure("errors"),
            fault=seed.fault,
        )
        evidence = seed.harm if stage.is_blended else seed.evidence
        return gate(seed.view(layer.signature), evidence, self.config, facts)

    # ---- commands

    def check(self, command: KasminaControlCommand) -> str | None:
        """Why a command cannot be applied now; None if it can. Where kernels are waited for, this loads it, and
        `apply` takes it from here.

        Raises:
            TransientError: if a kernel is to be waited for and the hub does not answer.
        """
        try:
            layer, seed, target = self._target(command)
            refusal = self._refusal(layer, seed, command, target)
            if refusal is None and command.action is Action.GERMINATE and self.arrivals.wait:
                self.arrivals.hold(layer, command.kernel_id or "")
        except (NotFoundError, IllegalTransitionError, *_REFUSED) as error:
            return str(error)
        return refusal

    def apply(self, command: KasminaControlCommand, moment: Moment) -> Change:
        """Carries out one command.

        Raises:
            IllegalTransitionError: if the table has no such step.
            NotFoundError: if there is no such seed.
            TransientError: if a kernel is to be waited for and the hub does not answer; nothing has changed then.
        """
        self.moment = moment
        layer, seed, target = self._target(command)
        told = self._take_pending()
        refusal = self._refusal(layer, seed, command, target)
        if refusal is not None:
            reason = f"refused: {refusal} (asked for: {command.reason})"
            return told + Change((self._event(layer, seed, seed.stage, target, reason, moment, refused=True),))
        act = self._advance
        if command.action is Action.GERMINATE:
            act = self._germinate
        elif command.action is Action.RETIRE:
            act = self._retire
        elif command.action is Action.CULL:
            act = self._cull
        change = told + act(layer, seed, target, command, moment)
        self._refresh(layer)
        return change

    def _target(self, command: KasminaControlCommand) -> tuple[Layer, Seed, SeedStage]:
        layer = layer_at(self.layers, command.site)
        seed = layer.seed(command.seed_id)
        stage = seed.stage
        target = {
            Action.GERMINATE: SeedStage.GERMINATED,
            Action.CULL: SeedStage.CULLED,
            Action.RETIRE: SeedStage.CULLED,
        }.get(command.action) or target_of(seed.view(layer.signature))
        if target is None or target not in TRANSITIONS[stage]:
            allowed = ", ".join(sorted(TRANSITIONS[stage])) or "nothing"
            raise IllegalTransitionError(
                f"{command.action} does not apply to seed {seed.seed_id}, which is {stage}; it can become {allowed}",
                field="stage",
            )
        if command.action is Action.RETIRE and stage not in RETIRABLE:
            raise IllegalTransitionError(f"a seed in {stage} is not blended in: cull it instead", field="stage")
        return layer, seed, target

    def _refusal(self, layer: Layer, seed: Seed, command: KasminaControlCommand, target: SeedStage) -> str | None:
        match command.action:
            case Action.GERMINATE:
                return self._why_not_germinate(layer, seed, command)
            case Action.ADVANCE:
                found = self.gate(layer, seed)
                if not found.open:
                    return f"the gate to {target} is shut: {found.words}"
                racing = [other.seed_id for other in layer.rivals(seed)] if target is SeedStage.GRAFTING else ()
                return f"it races with {', '.join(racing)}: the losers are culled first" if racing else None
            case Action.RETIRE:
                return "it is retiring already" if seed.retirement else None
            case Action.CULL:
                return None

    def _why_not_germinate(self, layer: Layer, seed: Seed, command: KasminaControlCommand) -> str | None:
        if self.arrivals.loader is None:
            return "no asset hub is attached"
        if runs_compiled(self.module, layer.path) and not layer.is_fixed:
            return "the host was compiled after it was wrapped, and would not see the kernel: wrap it last"
        if not command.kernel_id:
            return "the command names no kernel"
        return _why_no_race(layer, seed, command.strategy)

    # ---- the acts; each returns what it changed

    def _germinate(
        self, layer: Layer, seed: Seed, target: SeedStage, command: KasminaControlCommand, moment: Moment
    ) -> Change:
        kernel_id = command.kernel_id or ""
        outcome = self._outcome(lambda: self.arrivals.take(layer, kernel_id)) if self.arrivals.wait else None
        seed.strategy, seed.lr_factor, seed.trace_id = command.strategy, command.lr_factor, command.command_id
        loaded = outcome.facts.blueprint if isinstance(outcome, LoadedKernel) else None
        seed.requested, seed.requested_blueprint = kernel_id, loaded or command.blueprint
        if seed.offer is not None and seed.offer.kernel_id != kernel_id:
            seed.offer = None  # a trial of another kernel says nothing of this one
        seed.trial = None if seed.offer is None else seed.offer.trial
        change = Change((self._enter(layer, seed, target, command.reason, moment),))
        if outcome is None:
            self.arrivals.request(layer, seed)
            return change
        return change + self._take_in(layer, seed, outcome, moment)

    def _advance(
        self, layer: Layer, seed: Seed, target: SeedStage, command: KasminaControlCommand, moment: Moment
    ) -> Change:
        gate = self.gate(layer, seed).words
        # a command that quotes the gate needs no second saying
        words = command.reason if gate in command.reason else f"{command.reason}; {gate}"
        if target is SeedStage.TRAINING:
            seed.begin_training(layer.kernel(seed), self.config.shadow_lr)
            self.version += 1
        elif target is SeedStage.GRAFTING:
            return self._graft(layer, seed, words, moment)
        event = self._enter(layer, seed, target, words, moment)
        if target is SeedStage.FOSSILIZED:
            self.plant(layer)
        return Change((event,))

    def graft_now(self, seed_id: str, reason: str, moment: Moment) -> Change:
        """See `Growable.graft_now`."""
        layer, seed = self.find(seed_id)
        if seed.stage is not SeedStage.TRAINING:
            raise IllegalTransitionError(
                f"seed {seed_id} is {seed.stage}; only one in TRAINING is grafted", field="stage"
            )
        change = self._take_pending() + self._graft(layer, seed, reason, moment)
        self._refresh(layer)
        return change

    def _graft(self, layer: Layer, seed: Seed, reason: str, moment: Moment) -> Change:
        direct = seed.strategy is BlendStrategy.DIRECT
        if direct:
            seed.evidence = seed.trial or Evidence(
                kind=EvidenceKind.NONE,
                reason="direct: trained with the host from its first step, so nothing was compared",
            )
        seed.optimizer = None
        seed.baseline = self.val_loss
        seed.val_finite = True
        seed.alpha = 1.0 if direct else 0.0
        self.num_grafts += 1
        seed.put("graft_order", self.num_grafts)
        seed.put("released", 1)
        for field in ("typical", "measured", "has_measured"):
            seed.put(field, 0)
        self.version += 1
        kernel = layer.kernel(seed).requires_grad_(requires_grad=True)
        event = self._enter(layer, seed, SeedStage.GRAFTING, reason, moment)
        return Change((event,), joined=((seed.seed_id, tuple(kernel.parameters())),), path_changed=True)

    def _cull(
        self, layer: Layer, seed: Seed, _target: SeedStage, command: KasminaControlCommand, moment: Moment
    ) -> Change:
        return self._remove(layer, seed, SeedStage.CULLED, command.reason, moment)

    def _retire(
        self, _layer: Layer, seed: Seed, _target: SeedStage, command: KasminaControlCommand, _moment: Moment
    ) -> Change:
        seed.retirement = Retirement(seed.alpha, command.reason)
        seed.reason = f"retiring: {command.reason}"
        seed.put("ramp_done", 0)
        seed.put("ramp_total", 0)
        return Change()

    def _remove(self, layer: Layer, seed: Seed, to: SeedStage, reason: str, moment: Moment) -> Change:
        blended, had_shadow = seed.stage.is_blended, seed.stage is SeedStage.TRAINING
        self.arrivals.forget(seed)
        event = self._enter(layer, seed, to, reason, moment)
        left = layer.take_kernel(seed)
        seed.drop_kernel()
        self.version += int(blended or had_shadow)
        self._refresh(layer)
        return Change((event,), left=left, path_changed=blended)

    # ---- kernels

    def _outcome(self, load: Callable[[], LoadedKernel]) -> LoadedKernel | EsperError:
        try:
            return load()
        except _REFUSED as error:
            return error

    def _take_in(self, layer: Layer, seed: Seed, outcome: LoadedKernel | EsperError, moment: Moment) -> Change:
        if isinstance(outcome, EsperError):
            return self._remove(layer, seed, SeedStage.CANCELLED, f"kernel refused: {outcome}", moment)
        offer, seed.offer = seed.offer, None
        if offer is not None:
            try:
                offer.give_to(outcome.module)
            except KernelRejectedError as error:  # the same on every rank: all hold the same weights
                return self._remove(layer, seed, SeedStage.CANCELLED, f"kernel refused: {error}", moment)
        self.arrivals.put(layer, seed, outcome)
        return Change(rungs=self._take_rungs())

    def load(self, layer: Layer, seed: Seed, kernel_id: str) -> None:
        """Loads a kernel into a DORMANT seed, which becomes GERMINATED.

        Raises:
            IllegalTransitionError: if the seed is not DORMANT.
            EsperError: what the loader raises; the seed is as it was.
        """
        if seed.stage is not SeedStage.DORMANT:
            raise IllegalTransitionError(f"seed {seed.seed_id} is {seed.stage}; only a DORMANT one takes a kernel")
        loaded = self.arrivals.take(layer, kernel_id)
        seed.requested = kernel_id
        reason = "a kernel was loaded by hand"
        self.pending.append(self._enter(layer, seed, SeedStage.GERMINATED, reason, self.moment))
        self.arrivals.put(layer, seed, loaded)
        self._refresh(layer)

    # ---- at a step

    def step(self, moment: Moment, steps_per_epoch: int) -> Change:
        """Takes in finished kernels and moves every ramp by one step."""
        self.moment = moment
        self.clock += 1
        self.arrivals.step()
        change = self._take_pending()
        if not self._busy:
            return change
        for layer, seed in self._candidates():
            if self.arrivals.is_awaited(seed):
                outcome = self.arrivals.collect(layer, seed)
                change += Change() if outcome is None else self._take_in(layer, seed, outcome, moment)
            elif seed.retirement is not None or seed.stage is SeedStage.GRAFTING:
                retired = self._ramps.step(layer, seed, steps_per_epoch)
                if retired and seed.retirement is not None:
                    reason = f"retired: {seed.retirement.reason}"
                    change += self._remove(layer, seed, SeedStage.CULLED, reason, moment)
        self._refresh()
        return change

    # ---- at an interval

    def close_interval(self, moment: Moment, val_loss: float | None) -> None:
        """Counts one control interval, compares blended seeds with their pre-graft level, and ends embargoes."""
        self.moment = moment
        finite = val_loss is not None and -float("inf") < val_loss < float("inf")
        if finite:
            self.val_loss = val_loss
        for layer in all_layers(self.layers):
            layer.table.age()
        for layer, seed in self._candidates():
            if seed.stage.is_blended and val_loss is not None:
                self._compare(seed, val_loss, finite=finite)
            if seed.stage is SeedStage.GRAFTING and seed.retirement is None:
                self._ramps.measure(layer, seed)
                if val_loss is not None and seed.baseline is not None:
                    seed.put("released", judged(seed.figure("released"), val_loss, seed.baseline))
            self._end_embargo(layer, seed, moment)

    def _compare(self, seed: Seed, val_loss: float, *, finite: bool) -> None:
        seed.val_finite = finite
        if not finite or seed.baseline is None:
            seed.harm = None
            return
        seed.harm = Evidence(
            kind=EvidenceKind.HARM,
            gain=seed.baseline - val_loss,
            baseline=seed.baseline,
            candidate=val_loss,
            num_pairs=1,
            reason="validation against its level before the graft; says nothing of worth",
        )

    def _end_embargo(self, layer: Layer, seed: Seed, moment: Moment) -> None:
        limits = {
            SeedStage.CULLED: self.config.embargo_epochs,
            SeedStage.ROLLED_BACK: self.config.embargo_epochs,
            SeedStage.CANCELLED: CANCELLED_EPOCHS,
        }
        limit = limits.get(seed.stage)
        if limit is not None and seed.figure("epochs") >= limit:
            self.pending.append(self._enter(layer, seed, SeedStage.DORMANT, "the embargo is over", moment))

    # ---- helpers

    def restore_requests(self) -> None:
        """Asks again for the kernels that GERMINATED seeds still wait for."""
        for layer, seed in self._candidates():
            if seed.stage is SeedStage.GERMINATED and seed.facts is None and not self.arrivals.is_awaited(seed):
                self.arrivals.request(layer, seed)
        for layer in all_layers(self.layers):
            for seed in layer.seeds:
                self.arrivals.request_native_again(layer, seed)
        self._refresh()

    def _refresh(self, layer: Layer | None = None) -> None:
        if layer is not None:
            layer.sync(self.module.get_submodule(layer.path))
        current = self._candidates()
        self.shadows = [(layer, seed) for layer, seed in current if seed.stage is SeedStage.TRAINING]
        self._busy = len(self.arrivals) > 0 or any(
            seed.stage is SeedStage.GRAFTING or seed.retirement is not None for _, seed in current
        )

    def _candidates(self) -> list[tuple[Layer, Seed]]:
        return [(layer, seed) for layer in all_layers(self.layers) for seed in layer.candidates]

    def _take_pending(self) -> Change:
        events, self.pending = tuple(self.pending), []
        return Change(events, rungs=self._take_rungs())

    def _take_rungs(self) -> tuple[RungChange, ...]:
        return tuple(
            RungChange(
                run_id=self.moment.run_id,
                step=self.moment.step,
                epoch=self.moment.epoch,
                site=notice.layer.site,
                seed=notice.seed.seed_id,
                blueprint=notice.seed.facts.blueprint if notice.seed.facts else None,
                kernel_id=notice.seed.facts.kernel_id if notice.seed.facts else None,
                rung=notice.rung,
                reason=notice.reason,
                trace_id=notice.seed.trace_id,
            )
            for notice in self.arrivals.take_notices()
        )

    def _enter(self, layer: Layer, seed: Seed, stage: SeedStage, reason: str, moment: Moment) -> LifecycleEvent:
        event = self._event(layer, seed, seed.stage, stage, reason, moment)
        seed.enter(stage, reason, clock=self.clock)
        return event

    def _event(
        self,
        layer: Layer,
        seed: Seed,
        old: SeedStage,
        new: SeedStage,
        reason: str,
        moment: Moment,
        *,
        refused: bool = False,
    ) -> LifecycleEvent:
        view = seed.view(layer.signature)
        return LifecycleEvent(
            run_id=moment.run_id,
            step=moment.step,
            epoch=moment.epoch,
            site=layer.site,
            seed=seed.seed_id,
            blueprint=view.blueprint,
            kernel_id=view.kernel_id,
            from_stage=old,
            to_stage=new,
            evidence=seed.harm if seed.harm is not None else seed.evidence,
            reason=reason,
            refused=refused,
            trace_id=view.trace_id,
        )


def _why_no_race(layer: Layer, seed: Seed, strategy: BlendStrategy) -> str | None:
    """Why a kernel may not train beside those that have begun at its site; None if it may, or there are none."""
    others = layer.rivals(seed)
    if any(other.stage.is_blended for other in others):
        return "another kernel of this site is on its way into the live path"
    if others and BlendStrategy.DIRECT in {strategy, *(other.strategy for other in others)}:
        return "a direct kernel takes no evidence, and so cannot race with others at its site"
    return None
