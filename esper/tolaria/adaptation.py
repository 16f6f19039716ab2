"""Carrying out commands: on every rank or on none, with the optimizer, the scheduler and the DDP wrapper following."""

from __future__ import annotations

import logging
import math

import torch

from esper.config import GovernorConfig
from esper.leyline.growth import PREFIX, Change
from esper.leyline.signals import KasminaControlCommand
from esper.tolaria.chronicle import Chronicle
from esper.tolaria.course import Course
from esper.tolaria.reach import Reach
from esper.tolaria.watching import Watching

log = logging.getLogger(__name__)


class Adaptation:
    """The hands of one run.

    Args:
        course: the run.
        chronicle: told of every event.
        reach: asks for kernels that are waited for.
        limits: of the governor; they say for how long the weights are watched after a change.

    Attributes:
        norm: norm of the live weights when the live path last changed (of the host's own, as of the last snapshot), or
            at the last snapshot.
        watching: looks at the kernels that came onto the live path.
        watch_until: step until which it is compared at every step.
    """

    def __init__(self, course: Course, *, chronicle: Chronicle, reach: Reach, limits: GovernorConfig) -> None:
        self._course = course
        self._chronicle = chronicle
        self._reach = reach
        self._limits = limits
        self.watching = Watching(course.growable, course.optimization)
        self.norm = 0.0
        self._own_norm = 0.0
        self.watch_until = 0

    def apply(self, command: KasminaControlCommand) -> str | None:
        """Carries out a command, or tells why not, and returns that. Collective."""
        course = self._course
        # deterministic mode waits for what it must have; else nobody waits for a rank that hangs in loading
        deadline_s = None if course.config.deterministic else course.config.tolaria.agree_s
        refusal = course.ports.ranks.agree(self._refusal(command), deadline_s=deadline_s)
        if refusal is None:
            change = self._reach.ask(
                "Urza",
                lambda: course.growable.apply(command, run_id=course.run_id, epoch=course.epoch, step=course.step),
            )
            if change is not None:
                self.absorb(change)
                return None
            refusal = "Urza does not answer"
        log.info("command.refused", extra={"site": command.site, "seed": command.seed_id, "reason": refusal})
        seed = course.seed(command.seed_id)
        if seed is not None:
            event = self._chronicle.event(seed, seed.stage, refusal, refused=True, blueprint=command.blueprint)
            self._chronicle.tell(event)
        return refusal

    def absorb(self, change: Change) -> None:
        """Takes in what a call did to the seeds."""
        optimization, growable = self._course.optimization, self._course.growable
        if change.left:
            optimization.leave(change.left)
        for seed_id, parameters in change.joined:
            seed = self._course.seed(seed_id)
            assert seed is not None
            optimization.join(seed_id, parameters, live=growable.live_parameters(), lr_factor=seed.lr_factor)
        if change.joined:
            self._course.ports.faults.at("grafting", self._course.step)
        if change.rungs:
            self._course.ports.faults.at("swapping", self._course.step)
        if change.path_changed or change.joined or change.left:
            self.path_changed()
        for event in change.events:
            self._chronicle.tell(event)
        for rung in change.rungs:
            self._chronicle.tell_rung(rung)
        if change.events:
            self._chronicle.look()
            self.watching.look_again()

    def path_changed(self, *, watched: bool = True) -> None:
        """The live path is another one from the next step on.

        Args:
            watched: whether kernels had a part in it: then the norm of the weights is watched for a while.
        """
        self._chronicle.recorder.graft(self._course.step)
        self._chronicle.outbox.mark(self._course.step)
        # the host's own weights are not gone through for it: a graft may not cost more the larger the host is
        self.norm = math.hypot(self._own_norm, self._norm(own=False))
        self.watch_until = self._course.step + (self._limits.watch_steps if watched else 0)
        self.watching.look_again()
        self.rebuild_parallel()

    def rebuild_parallel(self) -> None:
        """Wraps the model anew for its present live path."""
        growable = self._course.growable
        live = [name for name, _ in growable.live_parameters()]
        self._course.model = self._course.ports.ranks.parallel(growable.module, live)

    def weight_norm(self) -> float:
        """Norm of all live weights together."""
        return math.hypot(self._norm(own=True), self._norm(own=False))

    def measure_norm(self) -> None:
        """Takes the norm of weights that were found sound: what later ones are held against."""
        self._own_norm = self._norm(own=True)
        self.norm = math.hypot(self._own_norm, self._norm(own=False))

    def _norm(self, *, own: bool) -> float:
        """Norm of the host's own weights, or of its kernels' on the live path."""
        named = self._course.growable.live_parameters()
        tensors = [parameter.detach() for name, parameter in named if name.startswith(f"{PREFIX}.") is not own]
        return float(torch.nn.utils.get_total_norm(tensors)) if tensors else 0.0

    def _refusal(self, command: KasminaControlCommand) -> str | None:
        # a tuple, since None means "may be applied" here and "no answer" there
        answer = self._reach.ask("Urza", lambda: (self._course.growable.check(command),))
        return "Urza does not answer" if answer is None else answer[0]
