"""The governor at work: holds the last good snapshots, feeds the vitals to the pure core, and goes back when told."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from esper.config import GovernorConfig
from esper.leyline.errors import NonFiniteError
from esper.leyline.growth import SeedView
from esper.leyline.seeds import SeedStage
from esper.leyline.signals import Action, KasminaControlCommand
from esper.leyline.summary import Rollback
from esper.tolaria import governor, snapshot
from esper.tolaria.adaptation import Adaptation
from esper.tolaria.chronicle import Chronicle
from esper.tolaria.contents import tensors
from esper.tolaria.course import Course
from esper.tolaria.numerics import digests, rng_state
from esper.tolaria.overflowing import Overflowing
from esper.tolaria.tree import clone

log = logging.getLogger(__name__)

AGREE_EVERY = 8
"""Steps between agreements of several ranks on whether to go back: each costs a round trip."""

HOST_DIVERGES = "the host itself diverges; lower the learning rate"
RANKS_DIVERGE = (
    "one worker computes other bits: look at its memory, and for code that changes weights on one rank alone"
)


@dataclass(frozen=True, slots=True)
class Good:
    """A state in which the vitals were sound.

    Attributes:
        state: of training, from `snapshot.take`.
        losses: the history that was known there.
        blended: whether a kernel was on the live path that had not proven itself.
    """

    state: dict[str, Any]
    losses: tuple[float, ...]
    blended: bool


class Guard:
    """The governor of one run.

    Args:
        course: the run.
        adaptation: removes the seeds that are blamed.
        chronicle: told of every rollback.
        limits: when to go back.

    Attributes:
        words: `ok`, or what was last done; for Tamiyo.
        embargo: `site` or `site:blueprint` to the first epoch at which it may grow again.
    """

    def __init__(self, course: Course, *, adaptation: Adaptation, chronicle: Chronicle, limits: GovernorConfig) -> None:
        self._course = course
        self._adaptation = adaptation
        self._chronicle = chronicle
        self._limits = limits
        self._vitals = governor.Vitals()
        self._complaint: str | None = None
        self._ring: list[Good] = []  # the newest at the end
        self._watching = adaptation.watching
        self._overflowing = Overflowing(course.growable, course.optimization)
        self._sound_sites: set[str] = set()
        self._unblended: Good | None = None  # the newest without a kernel on trial; it may have left the ring
        self._stood_at: int | None = None  # step at which the run stood as the newest snapshot has it
        self._blamed: set[str] = set()
        # of the host's buffers those that are finite at the start: a mask may be made of infinities
        buffers = course.growable.module.named_buffers()
        self._sound_buffers = frozenset(name for name, buffer in buffers if _is_finite(buffer))
        self.words = "ok"
        self.embargo: dict[str, int] = {}

    def watch(self, loss: float, *, sampled: bool = False) -> None:
        """Takes in the loss of a step, and looks at its gradients and at what it did to kernels on trial.

        Args:
            loss: of the step.
            sampled: whether health was taken on it.
        """
        course, adaptation = self._course, self._adaptation
        fault = course.growable.take_fault()
        if fault is not None:
            self._complaint = self._complaint or f"a kernel fails: {fault}"
        left_out = self._overflowing.look(sampled=sampled)
        self._vitals, judgement = governor.judge(self._vitals, loss, self._limits, left_out=left_out)
        if judgement.verdict is governor.Verdict.ROLLBACK:
            self._complaint = self._complaint or judgement.reason
        if course.optimization.scaler is None:  # else gradients that overflow are its business: it leaves the step out
            self._complaint = self._complaint or governor.judge_gradient(self._watching.gradient_norm())
        self._complaint = self._complaint or self._out_of_line()
        if course.step < adaptation.watch_until and self._complaint is None:
            self._complaint = governor.judge_norm(adaptation.norm, adaptation.weight_norm(), self._limits)

    def act(self) -> bool:
        """Goes back if there is a reason, and says whether it did. For several ranks only every `AGREE_EVERY` steps."""
        ranks = self._course.ports.ranks
        if ranks.world > 1:
            if self._course.step % AGREE_EVERY:
                return False
            self._complaint = ranks.agree(self._complaint)
        if self._complaint is None:
            return False
        self.roll_back(self._complaint)
        return True

    def examine(self) -> str | None:
        """At the end of an epoch: goes back if there is a reason, and returns it. Collective."""
        reason = self._course.ports.ranks.agree(self._complaint or self._ailment())
        if reason is not None:
            self.roll_back(reason)
            return reason
        reason = self._divergence()
        if reason is not None:
            self.roll_back(reason, remedy=RANKS_DIVERGE)
        return reason

    def remember(self) -> None:
        """Takes the snapshot to go back to, and lets go of the oldest that are too many."""
        course, blended = self._course, bool(self._on_trial())
        good = Good(snapshot.take(course.growable, course.optimization), self._vitals.losses, blended)
        if self._stood_at == course.step:
            self._ring.pop()  # this is that one again, but for what was removed
        self._ring, self._stood_at = [*self._ring, good][-self._limits.snapshots :], course.step
        if not blended:
            self._unblended = good
        self._adaptation.measure_norm()
        self._overflowing.begin()
        self._watching.measure_host()
        self._watching.look_again()

    def passed(self) -> None:
        """An epoch ended in health."""
        self._vitals = governor.after_snapshot(self._vitals)

    def roll_back(self, reason: str, *, remedy: str = HOST_DIVERGES) -> None:
        """Restores the last good snapshot bit by bit, and puts the blame on the seeds that were blended meanwhile.

        A seed that was grafted since is culled (the restored host never met it); one that was blended already is
        retired. If it is blamed again, or if going back did not help, what was good then was not: the snapshot from
        before its graft is restored, and the seed culled; where none is to blame, the snapshot before the last is. The
        sites of blamed seeds are under embargo for `kasmina.embargo_epochs`. Collective.

        Args:
            reason: why.
            remedy: what people can do about it if going back does not help.

        Raises:
            NonFiniteError: if this happened `max_rollbacks` times without a healthy epoch between.
        """
        course = self._course
        self._complaint = None
        num_rollbacks = self._vitals.rollbacks + 1
        if num_rollbacks > self._limits.max_rollbacks:
            raise NonFiniteError(
                f"set back {self._limits.max_rollbacks} times in a row, and again: {reason}",
                remedy=remedy,
            )
        log.warning("run.rolled_back", extra={"step": course.step, "reason": reason})
        self.words = f"rolled back at step {course.step}: {reason}"
        self._chronicle.recorder.decision(course.epoch, self.words)
        self._chronicle.recorder.rollback(Rollback(epoch=course.epoch, step=course.step, reason=reason))
        blamed = self._on_trial()
        again = num_rollbacks > 1 or any(seed.seed_id in self._blamed for seed in blamed)
        self._blamed |= {seed.seed_id for seed in blamed}
        good = self._good_after(num_rollbacks, before_grafts=again and bool(blamed))
        self._vitals, self._stood_at = governor.after_rollback(self._vitals, good.losses), course.step
        for seed in blamed:
            self._chronicle.tell(self._chronicle.event(seed, SeedStage.ROLLED_BACK, reason))
            self._put_under_embargo(seed)
        snapshot.give_back(good.state, course.growable, course.optimization)
        self._overflowing.rescaled()
        course.ports.faults.at("rolling_back", course.step)
        self._adaptation.path_changed(watched=bool(blamed))
        for seed in blamed:
            self._remove(seed.seed_id, f"rolled back: {reason}", at_once=again)

    def state_dict(self) -> dict[str, Any]:
        """The state but for the last snapshot, which is the checkpoint itself. Collective.

        Older ones are in it as far as they are needed: in deterministic mode all, since a resumed run goes back to the
        same; else only the one from before the grafts that are on trial.
        """
        return {
            "vitals": governor.vitals_state(self._vitals),
            "words": self.words,
            "embargo": dict(self.embargo),
            "norm": self._adaptation.norm,
            "watch_until": self._adaptation.watch_until,
            "sound_sites": sorted(self._sound_sites),
            "blamed": sorted(self._blamed),
            "kept": [self._saved(good) for good in self._kept()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`; the state of training is restored already, and remembered."""
        self._overflowing.rescaled()
        self._vitals = governor.vitals_from(state["vitals"])
        self.words = str(state["words"])
        self.embargo = {key: int(until) for key, until in state["embargo"].items()}
        self._adaptation.norm = float(state["norm"])
        self._adaptation.watch_until = int(state["watch_until"])
        self._sound_sites = set(state.get("sound_sites", ()))  # younger than the first checkpoints
        self._blamed = set(state.get("blamed", ()))  # younger than the first checkpoints, as what follows
        last = replace(self._ring[-1], losses=self._vitals.losses)
        everything = [*(self._loaded(kept) for kept in state.get("kept", ())), last]
        self._ring = everything[-self._limits.snapshots :]
        self._unblended = next((good for good in reversed(everything) if not good.blended), None)

    def _good_after(self, num_rollbacks: int, *, before_grafts: bool) -> Good:
        """The snapshot to go back to; newer ones are forgotten."""
        if before_grafts and self._unblended is not None:
            upto = [i for i, good in enumerate(self._ring) if good is self._unblended]
            self._ring = self._ring[: upto[0] + 1] if upto else [self._unblended]
        elif num_rollbacks > 1 and len(self._ring) > 1:
            self._ring.pop()
        return self._ring[-1]

    def _kept(self) -> list[Good]:
        """What a checkpoint holds of the snapshots, oldest first."""
        older = self._ring[:-1] if self._course.config.deterministic else []
        unblended = self._unblended if self._on_trial() else None
        if unblended is None or any(good is unblended for good in older):
            return older
        return [unblended, *older]

    def _saved(self, good: Good) -> dict[str, Any]:
        state = good.state | {"rng": self._course.ports.ranks.gather(good.state["rng"])}
        return {"state": state, "losses": list(good.losses), "blended": good.blended}

    def _loaded(self, kept: Mapping[str, Any]) -> Good:
        """Inverse of `_saved`; a rank that is new keeps its own generators."""
        state, rank = clone(kept["state"]), self._course.ports.ranks.rank
        own = state["rng"][rank] if rank < len(state["rng"]) else rng_state()
        return Good(state | {"rng": own}, tuple(kept["losses"]), bool(kept["blended"]))

    def _ailment(self) -> str | None:
        """What is wrong with the weights; None if they are fit for a snapshot."""
        module = self._course.growable.module
        buffers = ((name, buffer) for name, buffer in module.named_buffers() if name in self._sound_buffers)
        for name, tensor in (*module.named_parameters(), *buffers):
            if not _is_finite(tensor):
                return f"{name} is not finite"
        sites = self._overflowing.forgiven(self._course.growable.soundness())
        found = governor.judge_activations(sites, self._sound_sites) or self._out_of_line()
        self._sound_sites |= {site for site, (num_samples, _) in sites.items() if num_samples}
        if found is not None or self._course.step > self._adaptation.watch_until:
            return found
        return governor.judge_norm(self._adaptation.norm, self._adaptation.weight_norm(), self._limits)

    def _out_of_line(self) -> str | None:
        """Which kernel on trial is out of line with the host."""
        host, limits = self._watching.host_scale, self._limits
        judged = (
            governor.judge_graft(graft.name, weight=graft.weight, update=graft.update, host=host, limits=limits)
            for graft in self._watching.grafts()
        )
        return next((words for words in judged if words is not None), None)

    def _divergence(self) -> str | None:
        """Which tensor is not bit-equal on all ranks; None if all are. Collective, the same on every rank."""
        ranks = self._course.ports.ranks
        if ranks.world == 1:
            return None
        own = digests(tensors(self._course.growable.module))
        if len(set(ranks.gather(tuple(own.values())))) == 1:
            return None
        everywhere = ranks.gather(own)
        names = sorted({name for one in everywhere for name in one})
        unequal = [name for name in names if len({one.get(name) for one in everywhere}) > 1]
        return f"the ranks have diverged: {unequal[0]} differs, and {len(unequal) - 1} more of {len(names)} tensors"

    def _put_under_embargo(self, seed: SeedView) -> None:
        until = self._course.epoch + 1 + self._course.config.kasmina.embargo_epochs
        self.embargo[seed.site] = until
        if seed.blueprint:
            self.embargo[f"{seed.site}:{seed.blueprint}"] = until

    def _on_trial(self) -> list[SeedView]:
        return [seed for seed in self._course.growable.seeds() if seed.stage.is_blended and seed.stage.is_active]

    def _remove(self, seed_id: str, reason: str, *, at_once: bool) -> None:
        seed = self._course.seed(seed_id)
        if seed is None or not seed.stage.is_active:
            return
        action = Action.RETIRE if seed.stage.is_blended and not at_once else Action.CULL
        command = KasminaControlCommand(action=action, site=seed.site, seed_id=seed_id, reason=reason)
        self._adaptation.apply(command)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all())
